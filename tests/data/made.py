"""Tiny files of every kind that a source can be made of."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor


class Letters:
    """A tokenizer of one id a character; it can be sent to workers."""

    def __call__(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([ord(letter) for letter in text[:length].ljust(length, "\0")])
        return ids, torch.arange(length) < len(text)

    def token_starts(self, text: str) -> list[int]:
        return list(range(len(text)))


def png(value: int, size: int = 8) -> bytes:
    """A square of one gray value."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def wav(value: float, samples: int = 800, rate: int = 8000) -> bytes:
    """A mono sound of one constant value in [-1, 1]."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.full(samples, round(value * 32767), "<i2").tobytes())
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(rows: int, first: int = 0) -> dict[str, list]:
    """Columns `text`, unique in each row, and `kind`, one of three names."""
    numbers = range(first, first + rows)
    return {"text": [f"row {n}" for n in numbers], "kind": ["abc"[n % 3] for n in numbers]}


def write_parquet(path: Path, columns: dict[str, list], row_group: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


def write_csv(path: Path, columns: dict[str, list]) -> Path:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([columns.keys(), *zip(*columns.values(), strict=True)])
    return write(path, buffer.getvalue())


def write_jsonl(path: Path, columns: dict[str, list]) -> Path:
    rows = zip(*columns.values(), strict=True)
    return write(path, "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))


def write_arrow(path: Path, columns: dict[str, list]) -> Path:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path


def write_shards(folder: Path, shards: int, rows: int) -> None:
    """`shards` tar files of `rows` samples with a picture, a sound, a text and a class."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"part-{shard:03d}.tar", "w") as tar:
            for row in range(shard * rows, (shard + 1) * rows):
                members = {
                    "png": png(row),
                    "wav": wav(row / 100),
                    "txt": f"row {row}".encode(),
                    "cls": b"%d" % (row % 3),
                }
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{row:05d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
