"""The contract of a source whose rows can be read in any order.

A row is a dictionary, column -> cell. A cell of a picture, sound or clip stays what was stored (a path, bytes, or the
`{"bytes", "path"}` of Hugging Face data sets) until a worker process decodes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]


class MapSource:
    """Rows that can be read in any order.

    Attributes:
        name: as in the recipe, for messages.
        columns: names of the columns.
        notes: what was read differently from what a user may think: files left out, splits found; a sentence each.
        splits: names that `split` may have; empty where any name gives the same rows (one file), or only the Hub knows.
        files: that the rows are of, in order, as far as they are on this machine; tells whether one has changed.
        fingerprint: equal for two sources only if all their rows are equal; None where only reading them can tell.
    """

    name: str
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    files: Sequence[str | Path] = ()
    fingerprint: str | None = None

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} does not say how many rows it has")

    def row(self, index: int) -> Row:
        """Row `index`, undecoded; raises DataError where it cannot be read."""
        raise TypeError(f"{type(self).__name__} has no rows")

    def values(self, column: str) -> Iterator[Any]:
        """One column's cells, in order."""
        return (self.row(index)[column] for index in range(len(self)))

    def distinct(self, column: str) -> Iterator[Any]:
        """All cells of a column that differ, in no order; where that takes reading each, some come more than once."""
        return self.values(column)

    def class_names(self, column: str) -> list[str] | None:
        """Names of the classes that a column holds the numbers of; None where it says none. A missing one is -1."""
        return None

    def present(self, columns: Sequence[str]) -> np.ndarray:
        """Numbers of the rows in which none of the columns is null, int64, ascending."""
        return np.arange(len(self))

    def select(self, columns: Sequence[str]) -> MapSource:
        """The same rows with these columns only, so that reading a row does not touch the others."""
        return self
