"""Whether start, speed and memory of the data side stay flat as rows grow.

    python scripts/bench_scale.py                          # 1 k, 100 k and 1 M rows
    python scripts/bench_scale.py --rows 10000000 --kinds parquet

Rows are tiny, a text of eight letters and one of ten classes, so that nothing is measured but what a row costs: in
parquet (row groups of 1,000), in tar files of webdataset with 10,000 samples each, and as empty pictures in folders of
classes. Each line is a process of its own with one worker. `start`: seconds until the first batch has come, in
brackets those of the process's CPU, which other load changes less; `again`: with what the first start kept. Then
batches of 64 rows a second, over 60 of them after the first 10, and resident memory of the process and of its worker
at the end. `stream` reads files where they are, `table` by number out of what `datasets` makes of them. Folders have
100 k files at most unless rows are asked for.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

if TYPE_CHECKING:
    from torch import Tensor

ROWS, BATCH, GROUP, SHARD, WARM, STEPS = (1_000, 100_000, 1_000_000), 64, 1_000, 10_000, 10, 60
NEEDS = {
    "parquet stream": ("text",),
    "parquet table": ("text", "label"),
    "tar stream": ("text",),
    "folder table": ("label",),
}
KINDS = tuple(NEEDS)
CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--data", type=Path, help="where the rows are made, and stay; else in a temporary folder")
    arguments = parser.parse_args()
    print("| rows | kind | start | again | steps/s | MiB | MiB, worker |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for kind in (name for name in KINDS if any(name.startswith(asked) for asked in arguments.kinds)):
            for rows in arguments.rows or (ROWS[:2] if kind.startswith("folder") else ROWS):
                where = make(kind.split()[0], rows, arguments.data or Path(temporary))
                cells = measured(where, kind, Path(temporary) / f"run {kind} {rows}")
                print(f"| {rows:,} | {kind} | {' | '.join(cells)} |", flush=True)


def make(kind: str, rows: int, folder: Path) -> Path:
    """Files with so many rows, which may be there already."""
    where = folder / f"{kind}_{rows}"
    if where.exists():
        return where
    where.mkdir(parents=True)
    if kind == "parquet":
        numbers = np.arange(rows)
        table = pa.table({"text": np.char.mod("%08d", numbers), "label": np.char.mod("class %d", numbers % CLASSES)})
        parquet.write_table(table, where / "train.parquet", row_group_size=GROUP)
    elif kind == "tar":
        for first in range(0, rows, SHARD):
            with tarfile.open(where / f"train-{first // SHARD:05d}.tar", "w") as tar:
                for number in range(first, min(first + SHARD, rows)):
                    for part, content in (("txt", f"{number:08d}"), ("cls", str(number % CLASSES))):
                        member = tarfile.TarInfo(f"{number:08d}.{part}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content.encode()))
    else:
        for number in range(rows):
            if number < CLASSES:
                (where / f"class {number}").mkdir()
            os.close(os.open(where / f"class {number % CLASSES}" / f"{number:08d}.png", os.O_CREAT))
    return where


def measured(where: Path, kind: str, run: Path) -> list[str]:
    """The cells of a line; see the module."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(str(where), kind, run, send))
    process.start()
    send.close()
    try:
        found: list[str] = receive.recv()
    finally:
        process.join()
    return found


def _measure(where: str, kind: str, run: Path, send: Connection) -> None:
    import datasets  # before the clock runs
    import torch

    from mmssl.data.loader import Loader
    from mmssl.recipe import Data

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = run / "cache"
    spec = Data(source=where, streaming=kind.endswith("stream"), max_bad=1.0)
    arguments: dict[str, Any] = {"batch_size": BATCH, "seed": 0, "workers": 1, "directory": run}
    cells = []
    for _ in range(2):
        began, cpu = time.perf_counter(), time.process_time()
        loader = Loader({"": spec}, NEEDS[kind], tokenizers={"text": Letters()}, **arguments)
        batches = loader.batches(0, WARM + STEPS + 1)
        next(batches)
        cells.append(f"{time.perf_counter() - began:.1f} s ({time.process_time() - cpu:.1f})")
    for _ in range(WARM):
        next(batches)
    began = time.perf_counter()
    for _ in range(STEPS):
        next(batches)
    speed = STEPS / (time.perf_counter() - began)
    own, worker = resident(os.getpid()), max(map(resident, descendants(os.getpid())))
    send.send([*cells, f"{speed:.0f}", f"{own:.0f}", f"{worker:.0f}"])


def resident(process: int) -> float:
    """MiB that a process holds of its own or shares."""
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def descendants(process: int) -> list[int]:
    """Processes that it started, and those that they started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [number for child in map(int, children) for number in (child, *descendants(child))]


class Letters:
    """A tokenizer of a number a letter."""

    def __call__(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        import torch

        ids = torch.tensor([ord(letter) for letter in text.ljust(length, "\0")])
        return ids, ids > 0


if __name__ == "__main__":
    main()
