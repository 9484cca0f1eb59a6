"""Rows with their labels, divided into those to learn from and those to be tested on, before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmssl.adaptation.placed import Placed, placed_cells
from mmssl.adaptation.readings import doubts, read_lists
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import SourceSplit, Split
from mmssl.adaptation.targets import find_target
from mmssl.adaptation.targets.base import HELD_OUT, Target
from mmssl.adaptation.targets.classes import Classes
from mmssl.data.annotated import AnnotatedSource
from mmssl.errors import DataError


@dataclass(frozen=True)
class LabeledRows:
    """Some rows of a split.

    Attributes:
        split: where they are.
        ids: their numbers there, int64 (N,), ascending.
        labels: of a target, (N, ...).
        groups: int64 (N,), rows that must not be divided; None where each is alone.
    """

    split: Split
    ids: Tensor
    labels: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Tensor) -> LabeledRows:
        groups = None if self.groups is None else self.groups[index]
        return replace(self, ids=self.ids[index], labels=self.labels[index], groups=groups)


@dataclass(frozen=True)
class Question:
    """Labeled rows and what their labels are.

    Attributes:
        target: of the labels.
        train: to learn from.
        test: to be scored on.
        where: the test rows come from.
        undivided: `, 'column' undivided` where there are groups.
        warnings: what a reader of the scores should know.
        notes: what was found in annotations.
    """

    target: Target
    train: LabeledRows
    test: LabeledRows
    where: str
    undivided: str
    warnings: list[str]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model, request: Request, *, hold_out: bool = False) -> Question:
        """Read the labels of all rows, and divide the rows.

        Args:
            model: whose encoder reads them.
            request: what is asked.
            hold_out: divide the training rows even where there are test rows.

        Raises:
            DataError: for a source or column that is not there, or labels that do not fit.
        """
        train, test = request.open(model, (model.encoder.modality,), learns=True)
        assert train is not None  # a probe that learns has training rows
        splits = [train] if test is None or hold_out else [train, test]
        named = request.target is not None and find_target((), request.target, "").placed
        cells = [placed_cells(split, request.label) if named else split.cells(request.label) for split in splits]
        present = [split.present(len(own)) for split, own in zip(splits, cells, strict=True)]
        missing = [
            np.array([own[row] is None for row in rows], dtype=bool) for own, rows in zip(cells, present, strict=True)
        ]
        ids = [rows[~none] for rows, none in zip(present, missing, strict=True)]
        warnings = [
            f"{int(none.sum())} of {len(none)} rows of {split.where} have no '{request.label}' and are left out "
            "(NA, None and null of a csv are read as none, and so is empty text)"
            for split, none in zip(splits, missing, strict=True)
            if none.any()
        ]
        known = [[own[row] for row in rows] for own, rows in zip(cells, ids, strict=True)]
        every = [cell for own in known for cell in own]
        if not named and request.target != "classes":
            every, told = read_lists(every, request.label, marks=request.target in (None, "labels"))
            known = [every[: len(known[0])], every[len(known[0]) :]][: len(known)]
            warnings += told
        where = f"{train.where}, column '{request.label}'"
        try:
            kind = find_target(every, request.target, where)
            if kind.placed and not named:
                known = [
                    [Placed(split, int(row), request.label) for row in rows]
                    for split, rows in zip(splits, ids, strict=True)
                ]
            target = kind.of([cell for own in known for cell in own])
        except DataError as error:
            raise DataError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
        whole = all(isinstance(cell, float) and cell.is_integer() for cell in every)
        if whole and request.target is None and len(set(every)) <= len(every) / 2:
            warnings.append(
                f"'{request.label}' holds whole numbers, read as values; if they are classes: target classes"
            )
        if isinstance(target, Classes):
            warnings += doubts(every, request.label)
        rows = [
            LabeledRows(split, torch.from_numpy(own), target.encode(labels))
            for split, own, labels in zip(splits, ids, known, strict=True)
        ]
        undivided = ""
        if request.groups:
            rows[0] = replace(rows[0], groups=train.groups(request.groups)[rows[0].ids])
            with suppress(DataError):  # test rows need no such column
                rows[1:] = [
                    replace(row, groups=split.groups(request.groups)[row.ids])
                    for row, split in zip(rows[1:], splits[1:], strict=True)
                ]
            undivided = f", '{request.groups}' undivided"
        if len(rows) == 1:
            seed = request.seeds[0] if request.split_seed is None else request.split_seed
            held = target.hold_out(rows[0].labels, HELD_OUT, seed, rows[0].groups)
            rows = [rows[0][~held], rows[0][held]]
            source = f"a fifth of {train.where}, held out{undivided}"
        else:
            source = splits[1].where
        try:
            warnings += target.check(rows[0].labels, rows[1].labels, where)
        except DataError as error:
            raise DataError("; ".join([str(error), *warnings])) from error
        return cls(target, rows[0], rows[1], source, undivided, warnings, _notes(splits))


def _notes(splits: Sequence[Split]) -> tuple[str, ...]:
    """What annotated folders hold."""
    sources = [split.source for split in splits if isinstance(split, SourceSplit)]
    return tuple(dict.fromkeys(source.notes[0] for source in sources if isinstance(source, AnnotatedSource)))
