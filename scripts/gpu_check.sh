#!/usr/bin/env bash
# What only a GPU can show, on one card and without a network: tests/gpu, with the time of each.
#   bash scripts/gpu_check.sh            on the first GPU
#   bash scripts/gpu_check.sh --cpu      what can be run without one, to see that it runs
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
[ "${1:-}" = --cpu ] && export MMSSL_GPU_TESTS=cpu
python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")'
python -m pytest -m gpu tests/gpu -q -rs --durations=0
