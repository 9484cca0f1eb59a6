"""How the columns of a csv file are parted."""

from __future__ import annotations

from pathlib import Path

SEPARATORS = (",", "\t", ";", "|")


def separator(file: str) -> str:
    """The first of `SEPARATORS` that the head of a file holds; a comma where it holds none, and of files at addresses.

    Spreadsheets write semicolons where a comma is the decimal point.
    """
    if "://" in file or not Path(file).is_file():
        return SEPARATORS[0]
    with Path(file).open(encoding="utf-8", errors="replace") as lines:
        head = lines.readline(1 << 16)
    return next((mark for mark in SEPARATORS if mark in head), SEPARATORS[0])
