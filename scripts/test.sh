#!/usr/bin/env bash
# Makes .venv, installs the project with its test extra, checks the code and runs the tests.
#
#     bash scripts/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install "[test]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/codespell
# One thread a worker: two workers of many threads each would fight for the cores.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" .venv/bin/python -m pytest -n 2 "$@"
