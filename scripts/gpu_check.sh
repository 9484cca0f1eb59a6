#!/usr/bin/env bash
# What only a GPU can show, on one card and without a network, in eight minutes: tests/gpu, a line each with its verdict,
# then the table of scripts/bench_gpu.py. timm, open_clip, datasets and av may be missing; pydantic and accelerate not.
#   bash scripts/gpu_check.sh            on the first GPU
#   bash scripts/gpu_check.sh --cpu      what can be run without one, to see that it runs
#   bash scripts/gpu_check.sh [--cpu] checks | bench      one half
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
bench=()
if [ "${1:-}" = --cpu ]; then export MMSSL_GPU_TESTS=cpu; bench=(--cpu --tiny --steps 3 --rounds 1); shift; fi
half="${1:-}"
python - <<'END'
import importlib.util, sys, torch
print(sys.version.split()[0], torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
need = ("accelerate", "pydantic", "annotated_types", "transformers", "torchvision", "torchaudio", "safetensors", "rich")
missing = [name for name in (*need, "pytest") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing, and nothing runs without: {', '.join(missing)}; install them, or put them into PYTHONPATH")
END
code=0
[ "$half" = bench ] || timeout 210 python -m pytest -m gpu tests/gpu -v -rs --no-header --durations=5 -p no:cacheprovider || code=$?
[ "$half" = checks ] || timeout 270 python scripts/bench_gpu.py --minutes 4 "${bench[@]}" || code=$?
exit $code
