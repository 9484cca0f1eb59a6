#!/usr/bin/env bash
# Makes .venv, installs the project with its test extra, checks the code and runs the tests.
#
#     bash scripts/test.sh                           all of them; what CI runs
#     bash scripts/test.sh --fast                    without those marked `long`
#     bash scripts/test.sh [arguments of pytest]     for instance tests/ops -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install "[test]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/codespell
if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not long and not slow" --durations 10 --durations-min 1 "$@"
fi
# A file stays with one worker, so that what its tests share is made once.
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
