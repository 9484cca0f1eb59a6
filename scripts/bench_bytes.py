"""What the processes of a run read of a stream in one epoch, and what one that is resumed halfway reads.

    python scripts/bench_bytes.py
    python scripts/bench_bytes.py --rows 100000 --processes 1 8 64

Rows are texts of 1 kB, in parquet (row groups of 100) and in tar files of webdataset (10,000 samples each). `index`
is what is read before the first step to find out where rows are, once for a run. Then what each process reads in an
epoch, the least and the most, and all of them together as a share of the files (of parquet: of the column that is
read); last, all together of a run that is resumed halfway. Bytes are those that are asked of files, in MB.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from bench_scale import Letters
from pyarrow import parquet
from torch import Tensor

from mmssl.data.loader import Loader
from mmssl.data.ranges import Ranges
from mmssl.recipe import Data

LETTERS, GROUP, SHARD, BATCH = 1_000, 100, 10_000, 64
KINDS = ("parquet", "tar")


class FirstLetters(Letters):
    """Of the first eight letters: reading is measured, not what a text costs then."""

    def __call__(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        return super().__call__(text[:8], length)


def make(kind: str, rows: int, folder: Path) -> int:
    """Files with so many rows; the bytes that an epoch has to read."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    texts = [draws.integers(33, 127, LETTERS, dtype=np.uint8).tobytes() for _ in range(rows)]
    if kind == "parquet":
        file = folder / "train.parquet"
        parquet.write_table(pa.table({"text": [text.decode() for text in texts]}), file, row_group_size=GROUP)
        footer = parquet.read_metadata(file)
        groups = map(footer.row_group, range(footer.num_row_groups))
        return sum(group.column(0).total_compressed_size for group in groups)
    for first in range(0, rows, SHARD):
        with tarfile.open(folder / f"train-{first // SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, rows)):
                member = tarfile.TarInfo(f"{number:08d}.txt")
                member.size = LETTERS
                tar.addfile(member, io.BytesIO(texts[number]))
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=81_920)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    counted = [0]

    def count(self: Ranges, start: int, stop: int, real=Ranges._bytes) -> bytes:  # type: ignore[no-untyped-def]
        counted[0] += stop - start
        return real(self, start, stop)

    Ranges._bytes = count  # type: ignore[method-assign]

    def read(loader: Loader, start: int, stop: int) -> int:
        counted[0] = 0
        for _ in loader.batches(start, stop):
            pass
        return counted[0]

    print("| files | processes | index | each process | together | resumed halfway |\n|---|---|---|---|---|---|")
    steps = arguments.rows // BATCH
    with tempfile.TemporaryDirectory() as temporary:
        for kind in KINDS:
            where, run = Path(temporary) / kind, Path(temporary) / f"run {kind}"
            size = make(kind, arguments.rows, where)
            spec = Data(source=str(where), streaming=True)

            def opened(share: int, shares: int, spec: Data = spec, run: Path = run) -> Loader:
                division = {"batch_size": BATCH, "seed": 0, "share": share, "shares": shares, "directory": run}
                return Loader({"": spec}, ("text",), tokenizers={"text": FirstLetters()}, **division)

            counted[0] = 0
            opened(0, 1)
            index = counted[0]
            for shares in arguments.processes:
                own = [read(opened(share, shares), 0, steps) for share in range(shares)]
                late = sum(read(opened(share, shares), steps // 2, steps) for share in range(shares))
                print(
                    f"| {kind}, {size / 1e6:.1f} MB | {shares} | {index / 1e6:.1f} | "
                    f"{min(own) / 1e6:.1f} to {max(own) / 1e6:.1f} | {sum(own) / size:.1%} | {late / size:.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
