"""Labeled rows for adaptation, from whatever the caller has: a source, a data set or batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from mmssl.batch import Batch
from mmssl.data.columns import find_classes
from mmssl.data.loader import read
from mmssl.data.sources import MapSource, Source, StreamSource, open_source
from mmssl.encoders.base import Encoder
from mmssl.errors import DataError, nearest
from mmssl.recipe import Data

if TYPE_CHECKING:
    import datasets

Labeled: TypeAlias = "str | Path | Data | datasets.Dataset | datasets.IterableDataset | Iterable[Batch]"


@dataclass(frozen=True)
class Opened:
    """A source with the settings to decode it."""

    spec: Data
    source: Source
    where: str


@dataclass(frozen=True)
class Rows:
    """Labeled batches.

    Attributes:
        batches: with `label` and the encoder's key.
        where: what they are, for the table.
        group: number of the row in the source -> group; None where groups stand in the batches or there are none.
    """

    batches: Iterable[Batch]
    where: str
    group: Sequence[int] | None = None


def open_pair(
    train: Any,
    test: Any,
    encoder: Encoder,
    *,
    label: str,
    groups: str | None = None,
    data: Data | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
) -> tuple[Rows, Rows | None]:
    """Training and test rows with common class numbers; see `mmssl.adapt` for the arguments.

    Returns:
        Training rows, and test rows unless they are to be held out of them.

    Raises:
        DataError: for a source, column or label that is not there or does not fit.
    """
    first = _open(train, data, columns, limit)
    if first is None:
        if test is not None and _open(test, data, columns, limit) is not None:
            raise DataError(
                "train is batches and test is a source: their class numbers may differ; give both in one form"
            )
        return Rows(train, "batches"), None if test is None else Rows(test, "batches")
    if test is None:
        second = _own_test(first)
    elif (second := _open_test(test, data, columns, limit)) is None:
        raise DataError("train is a source and test is batches: their class numbers may differ; give both in one form")
    if second is not None and second.spec == first.spec and first.spec.source != _DATASET:
        raise DataError(f"train and test are the same rows: {first.where}; leave test out to hold some of them out")

    sources = [first] if second is None else [first, second]
    rows = _labeled(sources, encoder, label, groups, batch_size, workers)
    return rows[0], rows[1] if second is not None else None


def open_asked(
    train: Any,
    test: Any,
    *,
    data: Data | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> tuple[Opened | None, Opened | None]:
    """Where training and test rows are, for a probe that can do without training rows; see `mmssl.adapt`.

    Test rows are those of `test`, else those of the training source's test split, else the training rows, of which
    there are none then.

    Returns:
        Training source, None where there is none; test source, None for batches.

    Raises:
        DataError: for a source that is not there.
    """
    if test is not None:
        return _open(train, data, columns, limit), _open_test(test, data, columns, limit)
    if isinstance(train, str | Path):
        asked = _open_test(train, data, columns, limit)
        assert asked is not None  # a name is never batches
        if asked.spec.split == "train":
            return None, asked
        try:
            return _open(train, data, columns, limit), asked
        except DataError:
            return None, asked  # there is a test split alone
    first = _open(train, data, columns, limit)
    second = _own_test(first) if first is not None and first.spec.split == "train" else None
    return (None, first) if second is None else (first, second)


def read_rows(
    opened: Opened,
    needs: Sequence[str],
    tokenizers: Mapping[str, Any],
    *,
    label: str | None = None,
    classes: Sequence[str] | Sequence[int] | None = None,
    groups: str | None = None,
    batch_size: int = 256,
    workers: int = 0,
) -> Rows:
    """Rows of several modalities; `label` is the column's name as the user gives it.

    Raises:
        DataError: for a column that is not there, or a label that is none of `classes`.
    """
    for name in filter(None, (label and _column(opened, label), groups)):
        _check_column(opened, name)
    batches = read(
        opened.spec,
        needs,
        label=label and _column(opened, label),
        classes=classes,
        tokenizers=tokenizers,
        batch_size=batch_size,
        workers=workers,
        source=opened.source,
    )
    return Rows(batches, opened.where, _numbers(opened.source.values(groups)) if groups else None)


def values_of(opened: Opened, column: str) -> list[Any]:
    """A column's cells; `label` may stand for what the recipe maps to it.

    Raises:
        DataError: where it is not there.
    """
    name = _column(opened, column)
    _check_column(opened, name)
    return list(opened.source.values(name))


def open_rows(
    data: Data, encoder: Encoder, *, label: str, groups: str | None, limit: int, batch_size: int = 256
) -> Rows:
    """The rows of one source alone; see `open_pair`."""
    first = _open(data, None, None, limit)
    assert first is not None  # only batches have no source
    return _labeled([first], encoder, label, groups, batch_size, 0)[0]


def groups_of(rows: Rows, rest: Batch, groups: str | None) -> Tensor | None:
    """Group of every row that was read, int64 (N,).

    Args:
        rows: that were read.
        rest: what their batches held beside the encoder's input.
        groups: column or key; None for no groups.

    Raises:
        DataError: where batches lack the key.
    """
    if groups is None:
        return None
    if rows.group is not None:
        return torch.tensor(rows.group)[rest["id"]]
    if groups not in rest:
        raise DataError(f"the batches have no key '{groups}' for the groups; they have: {', '.join(rest)}")
    return rest[groups].long()


def labels_of(rows: Rows, rest: Batch) -> Tensor:
    """Class of every row, int64 (N,).

    Raises:
        DataError: where there is none, or not one whole number a row.
    """
    labels = rest.get("label")
    if labels is None:
        raise DataError(f"{rows.where}: the batches have no 'label'; they have: {', '.join(rest)}")
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) == 0 or labels.min() < 0:
        raise DataError(
            f"{rows.where}: a label should be one class number from 0 a row, found {labels.dtype} {(*labels.shape,)}"
        )
    return labels.long()


_DATASET = "dataset"


def _labeled(
    opened: Sequence[Opened], encoder: Encoder, label: str, groups: str | None, batch_size: int, workers: int
) -> list[Rows]:
    """Training and test sources, in this order, as rows with common class numbers."""
    for one in opened:
        for name in filter(None, (_column(one, label), groups if one is opened[0] else None)):
            _check_column(one, name)
    classes = find_classes(chain.from_iterable(one.source.values(_column(one, label)) for one in opened))
    if classes is None:
        raise DataError(f"column '{label}' holds lists: a probe learns one class a row")
    tokenizer = getattr(encoder, "tokenizer", None)
    return [
        Rows(
            read(
                one.spec,
                (encoder.modality,),
                label=_column(one, label),
                classes=classes,
                tokenizers={encoder.modality: tokenizer} if tokenizer else None,
                batch_size=batch_size,
                workers=workers,
                source=one.source,
            ),
            one.where,
            _numbers(one.source.values(groups)) if groups and one is opened[0] else None,
        )
        for one in opened
    ]


def _check_column(one: Opened, name: str) -> None:
    if name not in one.source.columns:
        have = ", ".join(one.source.columns)
        raise DataError(f"{one.where} has no column '{name}'{nearest(name, one.source.columns)}; it has: {have}")


def _open_test(given: Any, data: Data | None, columns: Mapping[str, str] | None, limit: int | None) -> Opened | None:
    """Test rows: of a name the test split, or else the validation split, or else what is there."""
    try:
        found = _open(given, data, columns, limit)
    except DataError:
        if not isinstance(given, str | Path):
            raise
        for split in ("test", "validation"):  # of a folder that holds nothing else
            try:
                return _open(given, data, columns, limit, split)
            except DataError:
                continue
        raise
    return (_own_test(found) or found) if found is not None and isinstance(given, str | Path) else found


def _open(
    given: Any, data: Data | None, columns: Mapping[str, str] | None, limit: int | None, split: str = "train"
) -> Opened | None:
    """The source, or None for batches; `split` is for a name, anything else has its own."""
    changes: dict[str, Any] = {}
    if columns is not None:
        changes["columns"] = dict(columns)
    if limit is not None:
        changes["limit"] = limit
    if isinstance(given, Data):
        return _opened(given.model_copy(update=changes))
    settings = data or Data(source=_DATASET)
    # Of a recipe's data only how to decode and name columns carries over to another source.
    fresh = settings.model_copy(
        update={"source": _DATASET, "split": split, "config": None, "streaming": False, "limit": None, **changes}
    )
    if isinstance(given, str | Path):
        opened = _opened(fresh.model_copy(update={"source": str(given)}))
        # Another source may have other names; only what the caller named for this one has to be there.
        named = {key: name for key, name in opened.spec.columns.items() if columns or name in opened.source.columns}
        return replace(opened, spec=opened.spec.model_copy(update={"columns": named}))
    if isinstance(given, Mapping):
        raise DataError(f"one split is needed, not all of {', '.join(map(str, given))}; give train[...] and test[...]")
    if type(given).__module__.partition(".")[0] != "datasets":
        return None
    import datasets

    if isinstance(given, datasets.IterableDataset):
        return Opened(fresh, StreamSource(given.take(limit) if limit else given, _DATASET), "the given data set")
    some = given.select([i * len(given) // limit for i in range(limit)]) if limit and limit < len(given) else given
    return Opened(fresh, MapSource.from_dataset(some), "the given data set")


def _opened(spec: Data) -> Opened:
    return Opened(spec, open_source(spec), f"{spec.source}, split {spec.split}")


def _column(one: Opened, label: str) -> str:
    """The label's column: a recipe may have mapped `label` to it."""
    return one.spec.columns.get(label, label)


def _own_test(train: Opened) -> Opened | None:
    """The `test` split of a source, else `validation`; None where it has neither, or is but one file."""
    if train.spec.source == _DATASET:
        return None
    try:
        open_source(train.spec.model_copy(update={"split": "no_such_split"}))
    except DataError:
        pass
    else:
        return None  # a source that takes any name would give the training rows again
    for split in ("test", "validation"):
        if split != train.spec.split:
            try:
                return _opened(train.spec.model_copy(update={"split": split}))
            except DataError:
                continue
    return None


def _numbers(values: Iterable[Any]) -> list[int]:
    """Each value as the number of its first appearance; None is a group of its own each time."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(("row", i) if value is None else value, len(seen)) for i, value in enumerate(values)]
