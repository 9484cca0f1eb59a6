"""Rows for adaptation from whatever the caller has: a source, a data set or batches. Nothing is decoded until read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mmssl.batch import Batch, count_rows
from mmssl.data.base import MapSource, Row
from mmssl.data.columns import CENTER, TextToIds, find_column, is_missing
from mmssl.data.features import name_of
from mmssl.data.files import expand
from mmssl.data.loader import read
from mmssl.data.order import find_present
from mmssl.data.sources import Source, TableSource, open_source
from mmssl.data.stream import StreamSource
from mmssl.errors import DataError, RecipeError, no_column
from mmssl.recipe import MOST_WORKERS, Data

if TYPE_CHECKING:
    import datasets

Labeled: TypeAlias = "str | Path | Data | datasets.Dataset | datasets.IterableDataset | Iterable[Batch]"


@dataclass(frozen=True)
class Reads:
    """What networks read of a row, and how it is decoded.

    Attributes:
        needs: batch keys out of `image`, `text`, `audio`, `video`.
        tokenizers: modality -> tokenizer.
        workers: processes that decode.
    """

    needs: tuple[str, ...]
    tokenizers: Mapping[str, TextToIds]
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= MOST_WORKERS:
            raise RecipeError(f"workers = {self.workers}: expected 0 to {MOST_WORKERS}")


class Split:
    """Rows of one split, by their numbers: cells of a column without decoding the rest, and batches of chosen rows.

    Attributes:
        where: what they are, for the table.
        reads: what `read` decodes.
    """

    where: str
    reads: Reads

    def present(self, total: int) -> np.ndarray:
        """Numbers of the rows, out of `total`, that have what is read, int64, ascending."""
        raise TypeError(f"{type(self).__name__} has no rows")

    def cells(self, column: str) -> list[Any]:
        """A column of all rows; None where a cell, or the class in it, is missing; see `is_missing`.

        Raises:
            DataError: where there is no such column.
        """
        raise TypeError(f"{type(self).__name__} has no columns")

    def read(self, picks: Iterable[Sequence[int]] | None = None, batch_size: int = 256) -> Iterator[Batch]:
        """A batch for each of `picks`, numbers of rows, with `id`; undecodable rows are left out and logged.

        The rows of a stream come in ascending order alone; see `random_access`. Without picks every row comes once, in
        order, `batch_size` at a time.
        """
        raise TypeError(f"{type(self).__name__} reads nothing")

    def random_access(self, rows: Sequence[int]) -> Split:
        """A split from which these rows can be read in any order; those of a stream are kept undecoded."""
        return self

    def groups(self, column: str) -> Tensor:
        """Each cell as the number of its first appearance, int64; a missing one is a group of its own."""
        seen: dict[Any, int] = {}
        numbered = (("row", i) if cell is None else cell for i, cell in enumerate(self.cells(column)))
        return torch.tensor([seen.setdefault(cell, len(seen)) for cell in numbered], dtype=torch.int64)


@dataclass(frozen=True)
class SourceSplit(Split):
    """Rows of a source; see `Split`.

    Attributes:
        spec: how they are decoded and their columns named.
        source: where they come from.
    """

    spec: Data
    source: Source
    where: str
    reads: Reads

    @property
    def columns(self) -> list[str]:
        """Those that are decoded."""
        return [find_column(self.spec, key, self.source.columns) for key in self.reads.needs]

    @property
    def centers(self) -> list[str]:
        """The column of seconds that windows lie around, where there is one."""
        return [self.spec.columns[CENTER]] if CENTER in self.spec.columns else []

    def present(self, total: int) -> np.ndarray:
        """See `Split`; of a stream all rows, for what they lack is seen when they are read."""
        columns = self.columns
        return np.arange(total) if isinstance(self.source, StreamSource) else find_present(self.source, columns)

    def cells(self, column: str) -> list[Any]:
        """See `Split`; a name that the recipe's `columns` map, such as `label`, is that column."""
        name = self.spec.columns.get(column, column)
        if name not in self.source.columns:
            raise DataError(no_column(self.where, name, self.source.columns))
        values, names = self.source.values(name), self.source.class_names(name)
        if names is None:
            return [None if is_missing(cell) else cell for cell in values]
        # By name, for two data sets may number the same classes differently; a missing one is -1.
        return [name_of(cell, names) for cell in values]

    def read(self, picks: Iterable[Sequence[int]] | None = None, batch_size: int = 256) -> Iterator[Batch]:
        """See `Split`."""
        return read(
            self.spec,
            self.reads.needs,
            tokenizers=self.reads.tokenizers,
            batch_size=batch_size,
            workers=self.reads.workers,
            source=self.source,
            picks=picks,
            windows=self.spec.windows,
        )

    def random_access(self, rows: Sequence[int]) -> Split:
        """See `Split`."""
        if not isinstance(self.source, StreamSource):
            return self
        wanted, columns = set(rows), list(dict.fromkeys([*self.columns, *self.centers]))
        kept = {i: row for i, row in enumerate(self.source.select(columns).rows()) if i in wanted}
        return replace(self, source=_Kept(kept, columns, self.source.name))


class _Kept(MapSource):
    """Undecoded rows of a stream by their numbers."""

    def __init__(self, rows: Mapping[int, Row], columns: Sequence[str], name: str) -> None:
        self.rows, self.columns, self.name = rows, tuple(columns), name

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        return self.rows[index]


class BatchSplit(Split):
    """Rows of batches that the caller has made; the key of the labels is that of the column asked for."""

    def __init__(self, batches: Iterable[Batch], reads: Reads, limit: int | None = None) -> None:
        # Kept, because the labels of all rows are read before any row is chosen.
        self.batches = batches if isinstance(batches, list | tuple) else list(batches)
        self.where, self.reads = "batches", reads
        for key, value in ((key, value) for batch in self.batches for key, value in batch.items()):
            if not isinstance(value, torch.Tensor):
                raise DataError(
                    f"batches: '{key}' should be a tensor, found {type(value).__name__}; number the classes, or give a "
                    "datasets.Dataset or a file, whose columns may hold names"
                )
        self.ends = np.cumsum([count_rows(batch) for batch in self.batches])
        if not self.batches or self.ends[-1] == 0:
            raise DataError("batches: there are no rows")
        self.rows = min(int(self.ends[-1]), limit or int(self.ends[-1]))
        for key in reads.needs:
            if f"{key}_aspect" in self.batches[0]:
                raise DataError(f"batches: '{key}' is squeezed to a square; decode it with fit: crop")
            if key not in self.batches[0]:
                raise DataError(f"'{key}' is read, and the batches have: {', '.join(self.batches[0]) or 'nothing'}")

    def present(self, total: int) -> np.ndarray:
        """All of them."""
        return np.arange(total)

    def cells(self, column: str) -> list[Any]:
        """See `Split`; class number -1 is a missing one, and of zeros and ones (B, C) the labels are those at ones."""
        if column not in self.batches[0]:
            raise DataError(f"the batches have no key '{column}'; they have: {', '.join(self.batches[0])}")
        values = torch.cat([batch[column].cpu() for batch in self.batches])[: self.rows]
        if values.ndim == 1 and not values.is_floating_point():
            if values.min() < -1:
                raise DataError(
                    f"batches: '{column}' should be class numbers from 0, or -1 for none; found {values.min()}"
                )
            return [None if cell == -1 else cell for cell in values.tolist()]
        if values.ndim == 2 and not values.is_floating_point():
            if values.min() < 0 or values.max() > 1:
                raise DataError(f"batches: '{column}' (B, C) should be zeros and ones, found up to {values.max()}")
            return list(values.bool().tolist())
        if values.ndim == 3 and not values.is_floating_point():
            return list(values.numpy())
        if values.ndim > 2:
            raise DataError(
                f"batches: '{column}' should be (B,), (B, C) or class numbers (B, H, W), found {values.dtype} "
                f"{(*values.shape,)}"
            )
        return [None if is_missing(cell) else cell for cell in values.tolist()]

    def read(self, picks: Iterable[Sequence[int]] | None = None, batch_size: int = 256) -> Iterator[Batch]:
        """See `Split`."""
        if picks is None:
            picks = in_order(np.arange(self.rows), batch_size)
        keys = [key for need in self.reads.needs for key in (need, f"{need}_mask") if key in self.batches[0]]
        for rows in picks:
            index = np.asarray(rows)
            numbers = np.searchsorted(self.ends, index, side="right")
            # Runs of rows of one batch.
            cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(index)]
            parts: dict[str, list[Tensor]] = {key: [] for key in keys}
            for first, last in pairwise(cuts):
                batch, number = self.batches[numbers[first]], numbers[first]
                own = torch.from_numpy(index[first:last] - (self.ends[number - 1] if number else 0))
                for key in keys:
                    parts[key].append(batch[key][own.to(batch[key].device)])
            yield {**{key: torch.cat(some) for key, some in parts.items()}, "id": torch.from_numpy(index)}


def in_order(rows: np.ndarray, batch_size: int) -> Iterator[Sequence[int]]:
    """Picks of `batch_size` rows that take each of `rows` once, for `Split.read`."""
    return (rows[first : first + batch_size].tolist() for first in range(0, len(rows), batch_size))


def open_splits(
    train: Any,
    test: Any,
    reads: Reads,
    *,
    learns: bool,
    data: Data | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    max_bad: float | None = None,
) -> tuple[Split | None, Split | None]:
    """Training and test rows; see `mmssl.adapt` for the arguments.

    Test rows are those of `test`, else those of the training source's test split. Where there are neither, they are
    left to be held out of the training rows if `learns`, and are all the rows that there are if not.

    Returns:
        Training rows, None where there are none, which only one that learns nothing can do with; test rows, None where
        they are to be held out.

    Raises:
        DataError: for a source that is not there, and for rows that would be trained and tested on.
    """

    def opened(given: Any, split: str = "train") -> Split:
        return open_rows(given, reads, data, columns, limit, split, max_bad)

    if not learns and test is None and isinstance(train, str | Path):
        test = train
    first: Split | None = None
    try:
        first = opened(train)
    except DataError:
        if learns or test is None:
            raise  # else there may be test rows alone
    if test is None:
        asked = learns or (isinstance(first, SourceSplit) and first.spec.split == "train")
        own = _own_test(first) if asked and isinstance(first, SourceSplit) else None
        return (first, own) if learns or own is not None else (None, first)
    second = _open_test(test, opened)
    if learns and isinstance(first, SourceSplit) is not isinstance(second, SourceSplit):
        forms = ("batches", "a source") if isinstance(second, SourceSplit) else ("a source", "batches")
        raise DataError(
            f"train is {forms[0]} and test is {forms[1]}: their class numbers may differ; give both in one form"
        )
    if _same(first, second):
        if learns:
            raise DataError(
                f"train and test are the same rows: {second.where}; leave test out to hold some of them out"
            )
        return None, second
    return first, second


_DATASET = "dataset"


def _open_test(given: Any, opened: Callable[..., Split]) -> Split:
    """Test rows: of a name the test split, or else the validation split, or else what is there."""
    try:
        found = opened(given)
    except DataError:
        if not isinstance(given, str | Path):
            raise
        for split in ("test", "validation"):  # of a folder that holds nothing else
            try:
                return opened(given, split)
            except DataError:
                continue
        raise
    return (_own_test(found) or found) if isinstance(given, str | Path) and isinstance(found, SourceSplit) else found


def are_batches(given: Any) -> bool:
    """Whether rows are given as batches, which say nothing of how they were decoded."""
    named = given is None or isinstance(given, str | Path | Data)
    return not named and type(given).__module__.partition(".")[0] != "datasets"


def open_rows(
    given: Any,
    reads: Reads,
    data: Data | None,
    columns: Mapping[str, str] | None,
    limit: int | None,
    split: str,
    max_bad: float | None = None,
) -> Split:
    """Rows of a source, a data set or batches; `split` is for a name, anything else has its own.

    Args:
        given: see `mmssl.adapt`.
        reads: what is read of a row.
        data: how to decode and name columns.
        columns: batch key -> column.
        limit: most rows.
        split: of a source that is named.
        max_bad: share of rows that may be undecodable.
    """
    asked = {"columns": None if columns is None else dict(columns), "limit": limit, "max_bad": max_bad}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if isinstance(given, Data):
        return _of_source(given.model_copy(update=changes), reads)
    settings = data or Data(source=_DATASET)
    # Of a recipe's data only how to decode and name columns carries over to another source.
    anew = settings.model_copy(
        update={"source": _DATASET, "split": split, "config": None, "streaming": False, "limit": None, **changes}
    )
    if isinstance(given, str | Path):
        opened = _of_source(anew.model_copy(update={"source": str(given)}), reads)
        # Another source may have other names; only what the caller named for this one has to be there.
        named = {key: name for key, name in opened.spec.columns.items() if columns or name in opened.source.columns}
        return replace(opened, spec=opened.spec.model_copy(update={"columns": named}))
    if isinstance(given, Mapping):
        raise DataError(f"one split is needed, not all of {', '.join(map(str, given))}; give train[...] and test[...]")
    if are_batches(given):
        return BatchSplit(given, reads, limit)
    import datasets

    if isinstance(given, datasets.IterableDataset):
        source: Source = StreamSource(given, _DATASET, limit=limit)
    else:
        some = given.select([i * len(given) // limit for i in range(limit)]) if limit and limit < len(given) else given
        source = TableSource(some)
    return SourceSplit(anew.for_probes, source, "the given data set", reads)


def _of_source(spec: Data, reads: Reads) -> SourceSplit:
    return SourceSplit(spec.for_probes, open_source(spec), where(spec), reads)


def where(spec: Data) -> str:
    """How a table names the rows of a source."""
    return f"{spec.source}, split {spec.split}"


def _same(first: Split | None, second: Split) -> bool:
    if not (isinstance(first, SourceSplit) and isinstance(second, SourceSplit)):
        return first is second
    return first.spec == second.spec and first.spec.source != _DATASET


def _own_test(train: SourceSplit) -> SourceSplit | None:
    """The `test` split of a source, else `validation`; None where it has neither, or is but one file."""
    if train.spec.source == _DATASET:
        return None
    if not train.source.splits and expand(os.path.expandvars(train.spec.source)):
        return None  # files of one split, which would give the training rows again
    for split in ("test", "validation"):
        if split != train.spec.split:
            try:
                return _of_source(train.spec.model_copy(update={"split": split}), train.reads)
            except DataError:
                continue
    return None
