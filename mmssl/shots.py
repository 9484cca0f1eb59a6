"""How few labels are learned from: so many of each class, or a share of them all."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator


def read_shots(given: int | str) -> int | str:
    """`10` (rows a class) as a number, and `1 %` (of the labeled rows) as `1%`.

    Raises:
        ValueError: for anything else.
    """
    number, percent, rest = str(given).replace(" ", "").partition("%")
    try:
        value = Fraction(repr(float(number))) if percent else int(number)
    except ValueError:
        value = 0
    if rest or isinstance(given, bool) or not (0 < value <= 100 if percent else 1 <= value < 2**31):
        raise ValueError("should be rows a class, as 10, or a share of the labeled rows, as 1%")
    return f"{float(value):.10g}%" if percent else int(value)


Shots = Annotated[int | str, BeforeValidator(read_shots)]
"""A whole number of rows a class, or a share as text: `1%`."""
SHARE = "% of labels"


def quotas(shots: int | str, sizes: Sequence[int]) -> list[int]:
    """Rows of each class: at most all it has.

    A share is that of each class, at least one row; what rounding down leaves of the share of all rows goes to the
    classes that lost most by it.

    Args:
        shots: see `read_shots`.
        sizes: rows that each class has.
    """
    if isinstance(shots, int):
        return [min(shots, size) for size in sizes]
    share = Fraction(shots.rstrip("%")) / 100
    parts = [share * size for size in sizes]
    found = [min(size, max(1, int(part))) for size, part in zip(sizes, parts, strict=True)]
    left = round(sum(parts)) - sum(found)
    for place in sorted(range(len(sizes)), key=lambda place: found[place] - parts[place])[: max(0, left)]:
        found[place] += 1
    return found


def shots_in_words(shots: int | str, one: str = "a class") -> str:
    """`10 a class`, with what `one` says, or `1 % of labels`."""
    return f"{shots} {one}" if isinstance(shots, int) else f"{shots.rstrip('%')} {SHARE}"


def with_rows(title: str, rows: Sequence[int]) -> str:
    """Of a title that ends with a share how many rows it is, by each seed: `1 % of labels (24 rows)`."""
    if not rows or not title.endswith(SHARE):
        return title
    number = f"{min(rows):,} to " * (min(rows) < max(rows)) + f"{max(rows):,}"
    return f"{title} ({number} row{'s' * (max(rows) > 1)})"
