#!/usr/bin/env bash
# From nothing to a pretrained, probed encoder: makes .venv, installs, runs the recipe `quickstart`.
#
#     bash scripts/quickstart.sh          into runs/quickstart; an unfinished run there is resumed, a finished one shown
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install ""
.venv/bin/mmssl run quickstart --out runs/quickstart --resume
echo
echo "everything is in $(pwd)/runs/quickstart; activate the environment with: source $(pwd)/.venv/bin/activate"
