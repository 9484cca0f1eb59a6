"""What cells of labels may mean besides what they look like: lists written as text, marks, names by mistake."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

from mmssl.errors import counted

ABSENT = {"nan", "none", "null", "n/a", "na", "<na>"}
"""Names that say, more likely than a class, that there is no label."""
SEPARATORS = ";|,"
LONGEST = 10_000  # characters of a list that is written as text


def read_lists(cells: Sequence[Any], label: str, *, marks: bool) -> tuple[list[Any], list[str]]:
    """Cells with lists in place of what stands for them, and a sentence about each such reading.

    A csv has no lists, so they are text there, as JSON or as Python prints them. Of classes in a fixed order, lists of
    zeros and ones say which there are; a list of labels holds none of them twice.

    Args:
        cells: of all rows, of which none is missing.
        label: the column.
        marks: whether zeros and ones may be such marks.
    """
    notes = []
    if cells and all(isinstance(cell, str) for cell in cells):
        lists = [list_of(cell) for cell in cells]
        if all(found is not None for found in lists):
            cells = lists
            notes.append(f"'{label}' holds lists that are written as text, and is read as lists")
    if marks and _are_marks(cells):
        cells = [[bool(mark) for mark in cell] for cell in cells]
        notes.append(
            f"'{label}' holds {len(cells[0])} zeros and ones a row, read as marks of labels 0 to {len(cells[0]) - 1} "
            "by their places; if they are numbers: target values"
        )
    return list(cells), notes


def list_of(text: str) -> list[Any] | None:
    """The list that is written there; None where there is none."""
    if len(text) > LONGEST or not (text.strip().startswith("[") and text.strip().endswith("]")):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return found if isinstance(found, list) else None


def _are_marks(cells: Sequence[Any]) -> bool:
    """Lists of zeros and ones, equally long, of which one at least cannot be a list of labels."""
    if not cells or not all(isinstance(cell, list) and len(cell) == len(cells[0]) > 1 for cell in cells):
        return False
    marks = [mark for cell in cells for mark in cell]
    if any(isinstance(mark, bool) or not isinstance(mark, int | float) or mark not in (0, 1) for mark in marks):
        return False
    return any(len(set(cell)) < len(cell) or any(isinstance(mark, float) for mark in cell) for cell in cells)


def doubts(cells: Sequence[Any], label: str) -> list[str]:
    """Sentences about names and whole numbers that are read as classes and may be meant otherwise.

    Args:
        cells: of all rows, of which none is missing; others than names and whole numbers raise no doubt.
        label: the column.
    """
    if all(isinstance(cell, str) for cell in cells):
        return _doubts_of_names(list(dict.fromkeys(cells)), cells, label)
    if not all(isinstance(cell, int) for cell in cells):
        return []
    below = sorted({cell for cell in cells if cell < 0})
    if not below or 0 not in cells:  # -1 and 1 are two classes
        return []
    rows = sum(cell < 0 for cell in cells)
    return [
        f"'{label}' holds {', '.join(map(str, below[:3]))} in {counted(rows, 'row')}, read as a class like others; if "
        "it says that there is no label, leave these cells empty"
    ]


def _doubts_of_names(names: Sequence[str], cells: Sequence[str], label: str) -> list[str]:
    told = []
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
    if same := [some for some in alike.values() if len(some) > 1]:
        shown = "; ".join(" and ".join(map(repr, some)) for some in same[:3])
        told.append(
            f"'{label}' holds names that differ in spaces or capitals alone, read as classes of their own: {shown}"
        )
    if absent := [name for name in names if name.strip().casefold() in ABSENT]:
        rows = sum(cell in absent for cell in cells)
        told.append(
            f"'{label}' holds {', '.join(map(repr, absent))} in {counted(rows, 'row')}, read as a class like "
            "others; if it says that there is no label, leave these cells empty"
        )
    for mark in SEPARATORS:
        parts = [part.strip() for name in names for part in set(name.split(mark))]
        if any(mark in name for name in names) and len(set(parts)) < len(parts):
            joined = next(name for name in names if mark in name)
            told.append(
                f"'{label}' holds names such as {joined!r}, read as one class each; several labels a row are lists, in "
                'a csv written as ["a", "b"]'
            )
            break
    return told
