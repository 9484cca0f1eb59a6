"""Labels that are about places of a picture: masks and boxes, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmssl.adaptation.rows import BatchSplit, SourceSplit, Split
from mmssl.adaptation.targets.base import Target
from mmssl.data.sources import StreamSource
from mmssl.errors import DataError
from mmssl.media.mask import Frame


@dataclass(frozen=True, eq=False)
class Placed:
    """Where a cell is that says something about places of the picture in its row.

    Attributes:
        split: of the row.
        row: its number.
        column: of the cell.
    """

    split: Split
    row: int
    column: str

    def read(self) -> tuple[Any, Frame | None]:
        """The cell, undecoded, and how its picture is seen; None where that is seen as it is.

        Raises:
            DataError: where there is no picture, or rows cannot be read in any order.
        """
        split = self.split
        if isinstance(split, BatchSplit):
            number = int(np.searchsorted(split.ends, self.row, side="right"))
            first = split.ends[number - 1] if number else 0
            return split.batches[number][self.column][self.row - first].cpu().numpy(), None
        assert isinstance(split, SourceSplit)  # there are no others
        if isinstance(split.source, StreamSource):
            raise DataError("labels of pictures are read in any order, and a stream has one; set streaming: false")
        (picture,), name = split.columns, split.spec.columns.get(self.column, self.column)
        cells, how = split.source.select([picture, name]).row(self.row), split.spec.image
        return cells[name], Frame.of(cells[picture], how.size, "pad" if how.fit == "pad" else "crop")

    @property
    def where(self) -> str:
        """For an error."""
        return f"{self.split.where}, column '{self.column}', row {self.row}"


class InPicture(Target):
    """A target whose cells are `Placed`. Labels are int64 (N,), numbers of these, so that choosing rows decodes none.

    Args:
        cells: of all rows.
    """

    placed = True

    def __init__(self, cells: Sequence[Placed]) -> None:
        self.cells = list(cells)
        self._numbers = {cell: number for number, cell in enumerate(self.cells)}

    @classmethod
    def of(cls, cells: Sequence[Any]) -> Self:
        """From `Placed` cells, of which none is read."""
        return cls(cells)

    def encode(self, cells: Sequence[Any]) -> Tensor:
        """Numbers of cells, int64 (N,)."""
        return torch.tensor([self._numbers[cell] for cell in cells], dtype=torch.int64)

    def check(self, labels: Tensor, truth: Tensor, where: str) -> list[str]:
        """A row to learn from and one for the test."""
        if not len(labels) or not len(truth):
            raise DataError(f"{where}: {len(labels)} rows to learn from and {len(truth)} for the test; each takes one")
        return []
