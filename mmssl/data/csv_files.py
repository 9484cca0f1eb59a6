"""How the columns of a csv file are parted, and which of them hold names that look like numbers."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path

SEPARATORS = (",", "\t", ";", "|")
HEAD = 1 << 16
"""Letters of a file that are looked at."""


def separator(file: str) -> str:
    """The one of `SEPARATORS` that parts the head of a file into columns; a comma for files at addresses.

    It is the one that gives most rows as many cells as the first one has, two at least: a comma may be in a name, as in
    `text (free, short);label`. Spreadsheets write semicolons where a comma is the decimal point. Of equal ones it is
    the first, or the tab in a file that is named for it.
    """
    if "://" in file or not Path(file).is_file():
        return SEPARATORS[0]
    with Path(file).open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        head = lines.read(HEAD)
    marks = sorted(SEPARATORS, key=lambda mark: mark != "\t") if file.lower().endswith(".tsv") else SEPARATORS
    found = max(marks, key=lambda mark: _share(head, mark))
    return found if _share(head, found) else SEPARATORS[0]


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


def as_written(files: Iterable[str], mark: str) -> dict[str, Callable[[str], str | None]]:
    """Columns that are to be read letter by letter, as `pandas.read_csv` takes its `converters`.

    They are those in which a whole number begins with a 0: a code or name such as 007, which another row's 7 is not.
    """
    found: dict[str, Callable[[str], str | None]] = {}
    for file in files:
        if "://" in file or not Path(file).is_file():
            continue
        with Path(file).open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            if not any(_CODE.search(line) for line in lines):
                continue
            lines.seek(0)
            rows = csv.reader(lines, delimiter=mark)
            names = next(rows, [])
            coded = {place for row in rows for place, cell in enumerate(row[: len(names)]) if _CODE.fullmatch(cell)}
            found |= {names[place]: _text for place in coded}
    return found


_CODE = re.compile(r"(?<![\w.:+-])0\d+(?![\w.:-])")


def _text(cell: str) -> str | None:
    return cell or None
