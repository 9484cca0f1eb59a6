"""Rows that come in one order only, of files that are read where they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmssl.data.base import Row
from mmssl.data.features import names_of_classes, undecoded
from mmssl.data.ranges import wait_after
from mmssl.data.shards import take_names
from mmssl.data.stored import Folders, Merged, distinct, explained, resolved, stored, visible

if TYPE_CHECKING:
    from datasets import IterableDataset


class StreamSource:
    """Rows that come in one order only, so that nothing has to be kept on disk.

    Probes read them one after the other; training divides the files among readers, see `mmssl.data.shared`.

    Args:
        dataset: a streaming Hugging Face data set; pictures, sounds and clips in it are left undecoded.
        name: as in the recipe, for messages.
        folders: column -> folder, against which relative paths in that column are resolved.
        merged: column -> columns of which the one that a row has takes its place, such as jpg and png of shards.
        limit: rows that there are at most.
        blanks: whether rows are lines of text files, of which blank ones are none.

    Attributes:
        loaded: the data set as it was given, with all its files, columns and rows.
        notes, splits, files: see `MapSource`.
    """

    notes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    files: Sequence[str | Path] = ()

    def __init__(
        self,
        dataset: IterableDataset,
        name: str,
        folders: Folders | None = None,
        merged: Merged | None = None,
        limit: int | None = None,
        blanks: bool = False,
    ) -> None:
        self.loaded, self.name, self.limit, self.blanks = dataset, name, limit, blanks
        self.folders, self.merged = folders or {}, merged or {}
        if blanks:
            dataset = dataset.filter(not_blank, input_columns="text")
        self.dataset = undecoded(dataset.take(limit) if limit else dataset)
        columns = self.dataset.column_names
        if columns is None:
            with explained(name):
                columns = list(next(iter(self.dataset), {}))
        self.columns = visible(columns, self.merged)

    def rows(self) -> Iterator[Row]:
        """All rows, undecoded, in the order of the files; the same at every call."""
        take_names()
        with explained(self.name):
            for row in self._patiently():
                yield resolved(row, self.folders, self.merged)

    def _patiently(self) -> Iterator[Row]:
        """The data set's rows; where a server fails, those that are left after a while, the others passed over."""
        read, attempt = 0, 0
        while True:
            try:
                for row in self.dataset.skip(read) if read else self.dataset:
                    yield row
                    read, attempt = read + 1, 0
                return
            except Exception as error:
                if self.files:  # of this machine, which have no server
                    raise
                attempt += 1
                wait_after(self.name, error, attempt)

    def values(self, column: str) -> Iterator[Any]:
        """One column's cells, in order."""
        return (row[column] for row in self.select([column]).rows())

    def distinct(self, column: str) -> Iterator[Any]:
        """See `MapSource`."""
        # What is read sample by sample has types only then: a shard's class may be a number here and a name there.
        tables = self.loaded._ex_iterable.iter_arrow is not None
        if len(names := stored([column], self.merged)) > 1 or not tables:
            yield from self.values(column)
        else:
            with explained(self.name):
                yield from distinct(self.dataset, *names)

    def class_names(self, column: str) -> list[str] | None:
        """See `MapSource`."""
        return names_of_classes(self.dataset, column)

    def count(self) -> int:
        """Number of rows, by reading them all."""
        with explained(self.name):
            return sum(table.num_rows for table in self.dataset.with_format("arrow").iter(1000))

    def select(self, columns: Sequence[str]) -> StreamSource:
        """The same rows with these columns only."""
        return self._with(self.dataset.select_columns(stored(columns, self.merged)), tuple(columns))

    def present(self, columns: Sequence[str]) -> StreamSource:
        """The rows in which none of the columns is null; they are numbered anew."""
        groups = [stored([column], self.merged) for column in columns]
        return self._with(self.dataset.filter(partial(_has_each, groups)), self.columns)

    def _with(self, dataset: IterableDataset, columns: tuple[str, ...]) -> StreamSource:
        """This source with another chain of reading."""
        source = StreamSource.__new__(StreamSource)
        source.__dict__.update(self.__dict__, dataset=dataset, columns=columns)
        return source


def not_blank(text: str) -> bool:
    """Whether a line holds more than white space."""
    return bool(text.strip())


def _has_each(groups: Sequence[Sequence[str]], row: Row) -> bool:
    return all(any(row[name] is not None for name in group) for group in groups)
