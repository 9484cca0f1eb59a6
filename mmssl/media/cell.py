"""A cell of a data set as something a decoder can open: bytes, a path, or the `{"bytes", "path"}` of `datasets`.

And as a table holds it, without the bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.errors import DataError


def open_cell(cell: Any, kind: str) -> tuple[io.BytesIO | str, str]:
    """What to hand to a decoder, and how to call it in an error.

    Args:
        cell: bytes, a path, or a mapping with `bytes` or `path`.
        kind: `image`, `audio` or `video`, for the error.

    Raises:
        DataError: where the cell or its file is empty, or it is of another type, or names a file that is not there.
    """
    path = None
    if isinstance(cell, Mapping) and {"bytes", "path"} & cell.keys():
        path, cell = cell.get("path"), cell.get("bytes")
        cell = path if cell is None else cell
    if isinstance(cell, bytes | bytearray | memoryview):
        name = f"{kind} '{path}'" if path else f"{kind} of {len(cell)} bytes"
        if not len(cell):
            raise DataError(f"{name} is empty")
        return io.BytesIO(cell), name
    if isinstance(cell, str | Path):
        if not Path(cell).is_file():
            raise DataError(f"there is no {kind} file '{cell}'")
        if not Path(cell).stat().st_size:
            raise DataError(f"{kind} '{cell}' is empty")
        return str(cell), f"{kind} '{cell}'"
    if cell is None:
        raise DataError(f"the {kind} cell is empty")
    fields = f" of {', '.join(map(str, cell))}, of which COLUMN.FIELD names one" if isinstance(cell, Mapping) else ""
    raise DataError(f"cannot read {kind} from {type(cell).__name__}{fields}: expected bytes, a path or a decoded array")


def sentence(error: BaseException) -> str:
    """The error's message on one line, never empty."""
    return " ".join(str(error).split()) or type(error).__name__


class Dropped:
    """A cell of raw media without a path."""


def plain(cell: Any) -> Any:
    """A cell as a column of a table holds it: of media their path."""
    if isinstance(cell, bytes | bytearray | np.ndarray):
        return Dropped()
    if isinstance(cell, Mapping):
        if {"bytes", "path"} & cell.keys():
            return cell.get("path") or Dropped()
        return Dropped() if {"array", "frames"} & cell.keys() else dict(cell)
    return cell
