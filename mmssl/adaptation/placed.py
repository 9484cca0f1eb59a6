"""Labels about places of a picture, seconds of a sound or words of a text, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mmssl.adaptation.rows import BatchSplit, SourceSplit, Split
from mmssl.adaptation.targets.base import Target
from mmssl.data.base import MapSource
from mmssl.data.columns import WINDOWS, Decoder, as_text, find_column
from mmssl.data.stream import StreamSource
from mmssl.errors import DataError, RecipeError, no_column
from mmssl.media.mask import Frame
from mmssl.media.text import Tokenizer

# Selecting columns of a table takes a hundred times as long as reading a row.
_SELECTED: WeakKeyDictionary[MapSource, dict[tuple[str, ...], MapSource]] = WeakKeyDictionary()


def _selected(source: MapSource, columns: tuple[str, ...]) -> MapSource:
    known = _SELECTED.setdefault(source, {})
    if columns not in known:
        some = source.select(columns)
        if some is source:  # which would keep itself alive
            return source
        known[columns] = some
    return known[columns]


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
            DataError: where there is no picture.
        """
        (cell, *_), frame = self.read_with()
        return cell, frame

    def read_with(self, *columns: str) -> tuple[list[Any], Frame | None]:
        """Likewise, and the cells of other columns of the row; None for a column that is not there.

        Raises:
            DataError: where there is no picture.
        """
        split = self.split
        if isinstance(split, BatchSplit):
            number = int(np.searchsorted(split.ends, self.row, side="right"))
            first = split.ends[number - 1] if number else 0
            cell = split.batches[number][self.column][self.row - first].cpu().numpy()
            return [cell, *(None for _ in columns)], None
        assert isinstance(split, SourceSplit)  # there are no others
        assert not isinstance(split.source, StreamSource)  # `placed_cells` takes none
        (picture,), how = split.columns, split.spec.image
        names = [split.spec.columns.get(self.column, self.column), *columns]
        there = [name for name in names if name in split.source.columns]
        cells = _selected(split.source, (picture, *there)).row(self.row)
        frame = Frame.of(cells[picture], how.size, "pad" if how.fit == "pad" else "crop", how.extent)
        return [cells[name] if name in there else None for name in names], frame

    def read_timed(self) -> tuple[Any, float, float]:
        """The cell, undecoded, and start and length in seconds of what is read of the row's sound or clip.

        Raises:
            DataError: where that cannot be told.
        """
        split = self.split
        if not isinstance(split, SourceSplit):
            raise DataError(f"{self.where}: batches do not say which seconds they hold; give a data set or a file")
        assert not isinstance(split.source, StreamSource)  # `placed_cells` takes none
        need_one_window(split, "events")
        decoder = Decoder(split.spec, split.reads.needs, columns=split.source.columns)
        name = split.spec.columns.get(self.column, self.column)
        cells = _selected(split.source, tuple(dict.fromkeys([*decoder.reads, name]))).row(self.row)
        lengths = {"audio": split.spec.audio.seconds, "video": split.spec.video.frames / split.spec.video.fps}
        seconds = max(lengths[key] for key in split.reads.needs)
        return cells[name], decoder.start(cells, WINDOWS["middle"]), seconds

    def read_words(self) -> tuple[Any, Tensor]:
        """The cell, undecoded, and where each word of the row's text begins; see `word_places`.

        Raises:
            DataError: where there is no text.
        """
        split = self.split
        places = word_places(split, self.row)
        assert isinstance(split, SourceSplit)  # `word_places` takes no other
        assert not isinstance(split.source, StreamSource)  # `placed_cells` takes none
        name = split.spec.columns.get(self.column, self.column)
        return _selected(split.source, (name,)).row(self.row)[name], places

    @property
    def where(self) -> str:
        """For an error."""
        return f"{self.split.where}, column '{self.column}', row {self.row}"


def need_one_window(split: Split, probe: str) -> None:
    """Raise RecipeError where several windows of a sound or clip are read, for a probe of its places or seconds."""
    if isinstance(split, SourceSplit) and split.spec.windows > 1:
        raise RecipeError(f"{probe} looks at one window of a sound or clip, and windows = {split.spec.windows}; set 1")


def word_places(split: Split, row: int) -> Tensor:
    """The place of the first token of each word of a row's text among its ids, int64; -1 for words beyond them.

    Words are what stands between white space, or the entries of a list.

    Raises:
        DataError: where there is no text, or rows cannot be read in any order.
        RecipeError: where a tokenizer does not tell where a token begins.
    """
    if not isinstance(split, SourceSplit):
        raise DataError("batches hold ids and no words; give a data set or a file")
    if isinstance(split.source, StreamSource):
        raise DataError(f"{split.where}: words are read in any order, and a stream has one; download it")
    (column,) = split.columns
    text = as_text(_selected(split.source, (column,)).row(row)[column])
    tokenizer = split.reads.tokenizers["text"]
    assert isinstance(tokenizer, Tokenizer)  # an encoder of texts has no other
    return tokenizer.first_places(text, split.spec.text.length)


def frame_of(split: Split, row: int, modality: str) -> Frame | None:
    """How the picture or clip of a row is seen; None where it is seen as it is.

    Raises:
        DataError: where there is none, or rows cannot be read in any order.
    """
    if not isinstance(split, SourceSplit):
        return None
    if isinstance(split.source, StreamSource):
        raise DataError(f"{split.where}: places are read in any order, and a stream has one; download it")
    column = find_column(split.spec, modality, split.source.columns)
    cell = _selected(split.source, (column,)).row(row)[column]
    if modality == "video":
        return Frame.of_clip(cell, split.spec.video.size, split.spec.video.fit)
    how = split.spec.image
    return Frame.of(cell, how.size, "pad" if how.fit == "pad" else "crop", how.extent)


def placed_cells(split: Split, column: str) -> list[Placed | None]:
    """The cells of a column, one for each row and of which none is read; None for those that are missing.

    Raises:
        DataError: where there is no such column, or rows cannot be read in any order.
    """
    if not isinstance(split, SourceSplit):
        return [None if cell is None else Placed(split, row, column) for row, cell in enumerate(split.cells(column))]
    source, name = split.source, split.spec.columns.get(column, column)
    if name not in source.columns:
        raise DataError(no_column(split.where, name, source.columns))
    if isinstance(source, StreamSource):
        raise DataError(f"{split.where}: labels of pictures are read in any order, and a stream has one; download it")
    cells: list[Placed | None] = [None] * len(source)
    for row in source.present([name]).tolist():
        cells[row] = Placed(split, row, column)
    return cells


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
