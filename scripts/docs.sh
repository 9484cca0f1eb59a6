#!/usr/bin/env bash
# Makes .venv, installs the project with its docs extra, and writes the documentation to build/docs/index.html.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install "[docs]"
.venv/bin/python scripts/docs.py "$@"
