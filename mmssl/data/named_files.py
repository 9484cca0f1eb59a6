"""Whether the files that a column of a table names are there, before a row is decoded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from textwrap import shorten
from typing import Any

from mmssl.data.base import MapSource
from mmssl.errors import DataError

ASKED = 8
"""Rows that are looked at, spread over the table."""
SHOWN = 200
"""Characters of a path in a sentence."""
LONGEST = 255
"""Characters of the name of a file; a text that is longer is no path."""


def check_named_files(source: MapSource, columns: Sequence[str]) -> None:
    """Raise DataError where none of the files is there that some rows name, with where one of its name is.

    Args:
        source: a table.
        columns: those that may name files.
    """
    numbers = sorted({i * len(source) // ASKED for i in range(ASKED)}) if len(source) else []
    rows = [source.row(number) for number in numbers]
    for column in columns:
        named = [path for row in rows if (path := _path(row[column]))]
        if named and not any(map(os.path.exists, named)):  # which a text that is no path is asked without an error
            raise DataError(
                f"{source.name}: none of {len(named)} files asked that column '{column}' names is there, such as "
                f"{shorten(named[0], SHOWN)}; a path is read from the folder of its table{_elsewhere(source, named[0])}"
            )


def _path(cell: Any) -> str | None:
    if isinstance(cell, Mapping):
        cell = cell.get("path") if cell.get("bytes") is None else None
    return cell if isinstance(cell, str) and cell else None


def _elsewhere(source: MapSource, named: str) -> str:
    path = Path(named)
    if len(path.name) > LONGEST:
        return ""
    tables = {Path(file).parent for file in source.files}
    found = [other for folder in tables for other in folder.glob(f"*/{escape(path.name)}")]
    if found:
        return f", and {found[0]} has that name: write its folder into the column, or put the table there"
    ways = (f"{below}{escape(path.name)}.*" for below in ("", "*/")) if not path.suffix else ()
    found = [other for way in ways for folder in tables for other in folder.glob(way)]
    return f", and {found[0]} has that name and an extension: write the whole of it into the column" if found else ""
