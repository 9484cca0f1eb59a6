"""What tells whether a source is the one that a run began with, and whether a cell is one that was decoded before."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmssl.data.base import MapSource
from mmssl.data.sources import Source

# What tells one source from another: rows whose content is looked at, bytes of a file among them, files whose size is.
SAMPLE, HEAD, FILES = 64, 4096, 100_000


def digest(source: Source, stream: str | None = None) -> str:
    """Number of rows and a hash: of a sample of them, and of the names and sizes of the files that they are of.

    Of a stream, which would have to be read for rows, its columns and files, and how it is shared, which `stream` says.
    Of paths the last two parts count, and of files no time, so that a folder may be moved or copied. A file that has
    kept its size is told from what it was by the rows of the sample alone, and by the first bytes of files among these.
    """
    content = hashlib.blake2b(repr(sorted(source.columns)).encode(), digest_size=8)
    for file in _spread(source.files, FILES):
        content.update(repr((Path(file).name, _size(file))).encode())
    if not isinstance(source, MapSource):
        return f"{(stream or 'a stream').replace(',', '')}, {content.hexdigest()}"
    size = len(source)
    if source.fingerprint is not None:
        return f"{size} rows, {source.fingerprint}"
    for number in _spread(range(size), SAMPLE):
        row = source.row(number)
        for column in sorted(source.columns):
            content.update(repr(_glimpse(row[column])).encode())
    return f"{size} rows, {content.hexdigest()}"


def _spread(things: Sequence[Any], most: int) -> list[Any]:
    """`most` of them, evenly, or all where there are no more."""
    return [things[number] for number in sorted({i * len(things) // most for i in range(most)})] if things else []


def _size(file: str | Path) -> int | None:
    """In bytes; None for what is no file here."""
    try:
        return os.stat(file).st_size
    except (OSError, ValueError):  # a text may be too long for a name, or hold what none can
        return None


def _glimpse(cell: Any) -> Any:
    if isinstance(cell, bytes):
        return len(cell), cell[:256]
    if isinstance(cell, np.ndarray):
        return cell.shape, str(cell.dtype), cell.tobytes()[:256]
    if isinstance(cell, Mapping):
        return [(key, _glimpse(cell[key])) for key in sorted(cell)]
    if isinstance(cell, str) and os.sep in cell:
        return Path(cell).parts[-2:], _head(cell)
    return cell


def _head(file: str) -> tuple[int | None, bytes]:
    """Size and first bytes of a file."""
    size = _size(file)
    if size is None or not os.path.isfile(file):
        return size, b""
    with open(file, "rb") as opened:
        return size, opened.read(HEAD)


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Names, types, shapes and bits."""
    content = hashlib.blake2b(digest_size=20)
    for name, value in tensors.items():
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def add_cell(content: Any, cell: Any) -> None:
    """Bytes, arrays and pictures by what is in them; a file by its path, size and time of change."""
    if isinstance(cell, bytes | bytearray | memoryview):
        content.update(b"bytes %d " % len(cell))
        content.update(cell)
    elif isinstance(cell, np.ndarray):
        content.update(f"array {cell.dtype} {cell.shape} ".encode())
        content.update(np.ascontiguousarray(cell).data)
    elif isinstance(cell, Mapping):
        for key, value in cell.items():
            content.update(f"{key}: ".encode())
            # The path of what is stored as bytes is only a name.
            add_cell(content, None if key == "path" and cell.get("bytes") is not None else value)
    elif isinstance(cell, list | tuple):
        content.update(b"list %d " % len(cell))
        for value in cell:
            add_cell(content, value)
    elif isinstance(cell, str | Path) and len(str(cell)) < 4096 and "\n" not in str(cell) and os.path.isfile(cell):
        state = Path(cell).stat()
        content.update(f"file {cell} {state.st_size} {state.st_mtime_ns} ".encode())
    elif cell is None or isinstance(cell, str | Path | int | float):
        content.update(f"{type(cell).__name__} {cell!r} ".encode())
    else:  # such as a picture, of which `repr` tells an address that another one may have next
        content.update(f"{type(cell).__name__} ".encode() + pickle.dumps(cell))
