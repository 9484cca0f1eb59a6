"""How the columns of a csv file are parted, and which of them hold names that look like numbers."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from mmssl.data.files import extension, some_of
from mmssl.errors import DataError

SEPARATORS = (",", "\t", ";", "|")
HEAD = 1 << 16
"""Letters of a file that are looked at."""


PART = 10_000
"""Rows that `datasets` reads at a time, each part with kinds of columns of its own."""


def separator(file: str) -> str:
    """The one of `SEPARATORS` that parts the head of a file into columns; a comma for files at addresses.

    It is the one that gives most rows as many cells as the first one has, two at least: a comma may be in a name, as in
    `text (free, short);label`. Spreadsheets write semicolons where a comma is the decimal point. Of equal ones it is
    the first, or the tab in a file that is named for it.
    """
    if "://" in file or not Path(file).is_file():
        return SEPARATORS[0]
    with _opened(file) as lines:
        head = lines.read(HEAD)
    marks = sorted(SEPARATORS, key=lambda mark: mark != "\t") if extension(file) == ".tsv" else SEPARATORS
    found = max(marks, key=lambda mark: _share(head, mark))
    return found if _share(head, found) else SEPARATORS[0]


def _opened(file: str) -> Any:
    """A text, unpacked where its name says that it is packed."""
    import fsspec

    return fsspec.open(file, "rt", compression="infer", encoding="utf-8-sig", errors="replace", newline="")


def _share(head: str, mark: str) -> float:
    """Of rows that have as many cells as the first; 0 where that is one."""
    try:
        rows = [len(row) for row in csv.reader(head.splitlines(keepends=True), delimiter=mark) if row]
    except csv.Error:
        return 0.0
    if not rows or rows[0] < 2:
        return 0.0
    whole = rows[:-1] if len(head) == HEAD and len(rows) > 1 else rows  # the last one is cut
    return whole.count(rows[0]) / len(whole)


def check_cells(files: Iterable[str], mark: str) -> None:
    """Raise DataError for a file whose first rows have more cells than names, of which pandas would shift all others.

    And for empty ones among others. Files at addresses are not looked at.
    """
    here = _here(files)
    empty = []
    for file in here:
        with _opened(file) as lines:
            first = list(islice((row for row in csv.reader(lines, delimiter=mark) if row), 2))
        if not first:
            empty.append(file)
        if len(first) > 1 and len(first[1]) > len(first[0]):
            raise DataError(f"{file}: rows have more cells than the first line has names (as by a comma at their end)")
    if 0 < len(empty) < len(here):
        raise DataError(
            f"{some_of(empty)}: empty, without the line of names that a csv begins with; remove what is empty, or "
            "bring it back"
        )


def _here(files: Iterable[str]) -> list[str]:
    return [file for file in files if "://" not in file and Path(file).is_file()]


def reading(files: Iterable[str], mark: str) -> dict[str, Any]:
    """Arguments with which `datasets` reads these files.

    Columns with `converters` are read letter by letter: those in which a whole number begins with a 0, a code or name
    such as 007, which another row's 7 is not; and those that hold numbers alone in one file, or part of it, and names
    in another.
    """
    here = _here(files)
    mixed, one_by_one = _looked_through(here, mark)
    found: dict[str, Callable[[str], str | None]] = dict.fromkeys(mixed, _text)
    for file in here:
        with _opened(file) as lines:
            if not any(_CODE.search(line) for line in lines):
                continue
            lines.seek(0)
            rows = csv.reader(lines, delimiter=mark)
            names = next(rows, [])
            coded = {place for row in rows for place, cell in enumerate(row[: len(names)]) if _CODE.fullmatch(cell)}
            found |= {names[place]: _text for place in coded}
    # `datasets` puts tables of one row together before it looks at the names of their columns.
    return {"sep": mark, "converters": found} | ({"writer_batch_size": 1} if one_by_one else {})


def _looked_through(files: Iterable[str], mark: str) -> tuple[list[str], bool]:
    """What the parts of the files tell, as `datasets` reads them.

    Returns:
        Columns of which pandas makes numbers in one part and texts in another, and whether there are two parts of one
        row, one after the other, with their columns in another order.
    """
    import pandas as pd  # type: ignore[import-untyped]

    kinds: dict[str, set[bool]] = {}
    single: list[str] | None = None
    reordered = False
    for file in files:
        with _opened(file) as lines, pd.read_csv(lines, sep=mark, chunksize=PART) as parts:
            for part in parts:
                names = list(part.columns) if len(part) == 1 else None
                alike = names is not None and single is not None and sorted(names) == sorted(single)
                reordered |= alike and names != single
                single = names
                for name in part.columns[part.notna().any()]:
                    kinds.setdefault(name, set()).add(pd.api.types.is_numeric_dtype(part[name]))
    return [name for name, own in kinds.items() if len(own) > 1], reordered


# The 0 comes before what must not be before it: a text is searched for a letter eight times as fast as for a condition.
_CODE = re.compile(r"0(?<![\w.:+-]0)\d+(?![\w.:-])")


def _text(cell: str) -> str | None:
    return cell or None
