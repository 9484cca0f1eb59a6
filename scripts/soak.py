"""Whether a long run holds more and more: memory, open files and records over many steps of a tiny recipe.

    python scripts/soak.py                               # 20,000 steps from a table, and as many from a stream
    python scripts/soak.py --steps 2000 --kinds stream

A network of one layer is trained on texts of eight letters, which two workers decode, a record every ten steps and a
checkpoint every thousand. Each line is after another thousand steps: resident memory of the process, and of its workers
together, open files of both, size of metrics.jsonl and of TensorBoard's file, steps a second since the line before. The
exit status is 1 where memory or files of the last line are more than a tenth above those of a fifth of the way.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench_scale import descendants, make, resident

ROWS, EVERY, EARLY, MORE = 2_000, 1_000, 0.2, 1.1
KINDS = ("table", "stream")
NETWORK = {
    "model": "transformers/bert",
    "tokenizer": "train:60",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
}


def recipe(source: Path, steps: int, streaming: bool) -> dict[str, Any]:
    """The smallest that has words to predict."""
    return {
        "encoders": {"text": NETWORK},
        "objective": {"name": "masked_language"},
        "data": {"source": str(source), "streaming": streaming, "text": {"length": 12}},
        "training": {"steps": steps, "batch_size": 4, "workers": 2, "log_every": 10, "save_every": EVERY},
    }


def train(tree: dict[str, Any], out: Path) -> None:
    """The run, in a process of its own."""
    import torch

    import mmssl

    torch.set_num_threads(1)
    mmssl.run(tree, out=out, quiet=True)


def soak(tree: dict[str, Any], out: Path) -> bool:
    """Print the lines of a run; whether it stayed flat."""
    process = multiprocessing.get_context("spawn").Process(target=train, args=(tree, out))
    process.start()
    steps, seen, since = tree["training"]["steps"], 0, time.perf_counter()
    lines: dict[int, list[float]] = {}
    print("| step | MiB | MiB, workers | files | files, workers | metrics.jsonl, KiB | TensorBoard, KiB | steps/s |")
    print("|---|---|---|---|---|---|---|---|")
    while process.is_alive():
        time.sleep(0.05)
        step = last_step(out / "metrics.jsonl")
        if process.pid is None or step // EVERY == seen // EVERY or step == steps:
            continue
        now = time.perf_counter()
        workers = [one for one in descendants(process.pid) if "resource_tracker" not in command(one)]
        lines[step] = [
            resident(process.pid),
            sum(map(resident, workers)),
            open_files(process.pid),
            sum(map(open_files, workers)),
            (out / "metrics.jsonl").stat().st_size / 1024,
            sum(file.stat().st_size for file in out.rglob("events.*")) / 1024,
            (step - seen) / (now - since),
        ]
        print(f"| {step:,} | {' | '.join(f'{value:.0f}' for value in lines[step])} |", flush=True)
        seen, since = step, now
    if process.exitcode:
        raise RuntimeError(f"the run ended with {process.exitcode}")
    early, late = lines[min(lines, key=lambda step: abs(step - EARLY * steps))], lines[max(lines)]
    return all(after <= MORE * before for before, after in zip(early[:4], late[:4], strict=True))


def last_step(path: Path) -> int:
    """Of the last whole record; 0 where there is none."""
    with suppress(OSError, ValueError, IndexError):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2048))
            whole = file.read().rpartition(b"\n")[0]
        return int(json.loads(whole.splitlines()[-1])["step"])
    return 0


def open_files(process: int) -> int:
    """Descriptors, pipes and sockets too."""
    return len(os.listdir(f"/proc/{process}/fd"))


def command(process: int) -> str:
    """How it was called."""
    return Path(f"/proc/{process}/cmdline").read_text("utf-8", "replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    flat = []
    with tempfile.TemporaryDirectory() as folder:
        source = make("parquet", ROWS, Path(folder))
        for kind in options.kinds:
            print(f"\n{kind}\n")
            flat.append(soak(recipe(source, options.steps, kind == "stream"), Path(folder) / kind))
            print(f"\n{'flat' if flat[-1] else 'it grew'}")
    return 0 if all(flat) else 1


if __name__ == "__main__":
    sys.exit(main())
