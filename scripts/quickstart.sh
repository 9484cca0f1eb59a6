#!/usr/bin/env bash
# From nothing to an answer: makes .venv, installs, and asks which of three pretext tasks transfers best on a generated
# world. Each task trains a small network on unlabeled pictures; next to it are the network untrained, the raw pictures,
# and the network trained on labels.
#
#     bash scripts/quickstart.sh          into runs/compared; a call that was killed goes on, a finished one is shown
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install ""
.venv/bin/mmssl compare --data toy --label shape --tasks rotation,simclr,jigsaw --size 32 --batch 64 \
    --encoder '{model: timm/resnet10t, channels: [16, 32, 64, 128], stem_width: 8}' \
    --budget steps=800 --seeds 2 --rates 1,3 --shots 100 --limit 2000 --no-audit --jobs 2 --out runs/compared
echo
echo "the page: $(pwd)/runs/compared/report.html; activate the environment with: source $(pwd)/.venv/bin/activate"
