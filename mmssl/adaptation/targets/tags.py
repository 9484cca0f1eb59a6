"""The class of every word of a text: a list of names or whole numbers, one for each word between white space."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmssl.adaptation.metrics import ACCURACY, MACRO_F1
from mmssl.adaptation.placed import InPicture, Placed
from mmssl.data.columns import is_missing
from mmssl.errors import DataError

NONE = {-1, -100}
"""Numbers that others write for a word without a class, in place of a gap."""


class Tags(InPicture):
    """Answers are chances, float (M, W, C): of each class for each word that is read, or (M, 1, C) for all alike.

    Accuracy is the share of right words, F1 that of each class against the rest, averaged over the classes that words
    have or are said to have. Words without a class do not count, nor do those beyond `text.length`.

    Args:
        cells: of all rows.
    """

    metrics = (MACRO_F1, ACCURACY)

    def __init__(self, cells: Sequence[Placed]) -> None:
        super().__init__(cells)
        self._read: dict[int, tuple[list[Any], int]] = {}

    @classmethod
    def recognizes(cls, cells: Sequence[Any]) -> bool:
        """Never: lists of names are several labels a row, unless somebody says otherwise."""
        return False

    def tags(self, labels: Tensor) -> list[list[Any]]:
        """Of rows, int64 (N,): the tags of those words that are read.

        Raises:
            DataError: for a cell that holds none, or another number of them than there are words.
        """
        for number in labels.tolist():
            if number not in self._read:
                place = self.cells[number]
                cell, words = place.read_words()
                tags = _listed(cell)
                if tags is None or any(isinstance(tag, float | list | dict) for tag in tags):
                    raise DataError(f"{place.where}: tags are a list of names or whole numbers, found {cell!r:.60}")
                if len(tags) != len(words):
                    raise DataError(
                        f"{place.where}: {len(tags)} tags, and {len(words)} words between white space; a list of words "
                        "in place of the text divides it as the tags do"
                    )
                seen = (words >= 0).tolist()
                self._read[number] = [tag for tag, there in zip(tags, seen, strict=True) if there], len(tags)
        return [self._read[number][0] for number in labels.tolist()]

    def look(self, labels: Tensor, truth: Tensor) -> list[str]:
        """Tags that can be read, of two classes at least; the classes are those of all of these rows."""
        rows = [*self.tags(labels), *self.tags(truth)]
        names = _names(rows)
        if len({type(name) for name in names}) > 1:
            raise DataError("tags are names in some rows and numbers in others")
        self.names, self.width = tuple(sorted(names)), len(names)
        if len(_names(self.tags(labels))) < 2:
            where = self.cells[int(labels[0])].where
            raise DataError(f"{where}: all words of the {len(labels)} training rows have one tag or none")
        read, there = sum(map(len, rows)), sum(self._read[number][1] for number in torch.cat([labels, truth]).tolist())
        cut = f"{there - read} of {there} words are beyond text.length, or no token begins in them, and do not count"
        return [cut] if read < there else []

    def classes(self, labels: Tensor) -> Tensor:
        """Class numbers of the words that are read, int64 (N, W); -1 for a word without a class, and beyond a text."""
        known = {name: number for number, name in enumerate(self.names)}
        rows = [torch.tensor([known.get(tag, -1) for tag in row], dtype=torch.int64) for row in self.tags(labels)]
        return pad_sequence(rows, batch_first=True, padding_value=-1)

    def words(self, labels: Tensor) -> Tensor:
        """Which of the places of `classes` are words, bool (N, W)."""
        numbers = torch.tensor([len(row) for row in self.tags(labels)])
        return torch.arange(int(numbers.max())) < numbers[:, None]

    def constant(self, labels: Tensor) -> Tensor:
        """The share of words that have each class, float (1, C)."""
        classes = self.classes(labels)
        counts = torch.bincount(classes[classes >= 0], minlength=self.width).double()
        return (counts / counts.sum())[None]

    def counts(self, labels: Tensor) -> dict[str, int]:
        """Numbers of words and classes."""
        classes = self.classes(labels)
        classes = classes[classes >= 0]
        return {"words": len(classes), "classes": len(classes.unique())}

    def score(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """F1 averaged over classes, and the share of right words."""
        from sklearn.metrics import f1_score

        truth = self.classes(labels)
        known = truth >= 0
        found, truth = answers.expand(*truth.shape, self.width).argmax(2)[known], truth[known]
        f1 = float(f1_score(truth.numpy(), found.numpy(), average="macro", zero_division=0))
        return {MACRO_F1.name: f1, ACCURACY.name: (found == truth).double().mean().item()}


def _names(rows: Iterable[Sequence[Any]]) -> set[Any]:
    """The classes that words have."""
    return {tag for row in rows for tag in row if not is_missing(tag)} - NONE


def _listed(cell: Any) -> list[Any] | None:
    """A list, also where it is written as JSON; None for anything else."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            return None
    return list(cell) if isinstance(cell, list | tuple) else None
