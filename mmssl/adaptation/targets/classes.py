"""One class a row: names or whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.adaptation.metrics import ACCURACY, BALANCED_ACCURACY, balanced_accuracy
from mmssl.adaptation.targets.base import Target
from mmssl.data.columns import find_classes
from mmssl.errors import DataError

FEW = 10
"""Whole numbers that are taken for classes without a word."""


class Classes(Target):
    """Labels int64 (N,), numbers in `names`; the class with the largest chance is the answer, the first one of equals.

    Args:
        names: of the classes, all names or all whole numbers, in the order of their numbers.
    """

    metrics = (ACCURACY, BALANCED_ACCURACY)
    shares = (ACCURACY,)

    def __init__(self, names: Sequence[Any]) -> None:
        self.names, self.width = tuple(names), len(names)
        self._number = {name: number for number, name in enumerate(self.names)}

    @classmethod
    def recognizes(cls, cells: Sequence[Any]) -> bool:
        """All names, or all whole numbers."""
        return all(isinstance(cell, str) for cell in cells) or all(isinstance(cell, int) for cell in cells)

    @classmethod
    def of(cls, cells: Sequence[Any]) -> Self:
        """The classes that there are, sorted; whole numbers may be floats, as those of a csv with empty cells are."""
        names = find_classes(map(_whole, cells))
        if names is None:
            raise DataError("classes are one name or whole number a row, and the column holds lists")
        return cls(names)

    def encode(self, cells: Sequence[Any]) -> Tensor:
        """Class numbers, int64 (N,); raises DataError for one that is not known."""
        for cell in cells:
            if cell not in self._number:
                known = ", ".join(map(str, self.names[:20]))
                raise DataError(f"label {cell!r} is none of the classes: {known}")
        return torch.tensor([self._number[cell] for cell in cells], dtype=torch.int64)

    @property
    def arguments(self) -> dict[str, Any]:
        """The names."""
        return {"names": list(self.names)}

    def decode(self, answers: Tensor) -> list[Any]:
        """The class with the largest chance."""
        return [self.names[number] for number in answers.argmax(1).tolist()]

    def matrix(self, labels: Tensor) -> Tensor:
        """One-hot."""
        return F.one_hot(labels, self.width).float()

    def score(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy, and recall averaged over the classes that `labels` has."""
        right = answers.argmax(1) == labels
        return {
            ACCURACY.name: right.double().mean().item(),
            BALANCED_ACCURACY.name: balanced_accuracy(right, labels),
        }

    def constant(self, labels: Tensor) -> Tensor:
        """All on the largest class."""
        return F.one_hot(labels.bincount(minlength=self.width).argmax(), self.width).double()

    def check(self, labels: Tensor, truth: Tensor, where: str) -> list[str]:
        """Two classes at least, and fewer than every second row has one of its own."""
        classes = labels.unique()
        if len(classes) < 2:
            raise DataError(f"{where}: all {len(labels)} training rows are of one class, {self._named(classes)}")
        if len(classes) > len(labels) / 2:
            raise DataError(
                f"{where}: {len(classes)} classes in {len(labels)} training rows; is this column really a label? "
                "Numbers that measure something are target: values"
            )
        if not len(truth):
            raise DataError(f"{where}: no class has a row to spare for the test; give test rows")
        warnings = self._measured()
        unknown = truth[~torch.isin(truth, classes)]
        if len(unknown):
            names = self._named(unknown.unique())
            warnings.append(
                f"{len(unknown)} test rows are of classes that no training row has; they count as wrong: {names}"
            )
        return warnings

    def _measured(self) -> list[str]:
        """Whether the classes may be numbers that measure something: many, with a quarter of those between left out."""
        if len(self.names) <= FEW or not all(type(name) is int for name in self.names):
            return []
        low, high = min(self.names), max(self.names)
        if 4 * len(self.names) > 3 * (high - low + 1):
            return []
        return [
            f"{len(self.names)} whole numbers from {low} to {high} are read as classes; where they measure something, "
            "take target: values (--target values)"
        ]

    def _named(self, classes: Tensor) -> str:
        """The first of some classes, for a sentence."""
        return ", ".join(repr(self.names[number]) for number in classes[:5].tolist()) + ", ..." * (len(classes) > 5)

    def counts(self, labels: Tensor) -> dict[str, int]:
        """Number of classes."""
        return {"classes": len(labels.unique())}

    def strata(self, labels: Tensor) -> Tensor:
        """The classes."""
        return labels

    def answer(self, outputs: Tensor) -> Tensor:
        """Softmax."""
        return outputs.softmax(1)

    def loss(self, outputs: Tensor, matrix: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(outputs, matrix)


def _whole(cell: Any) -> Any:
    return int(cell) if isinstance(cell, float) and cell.is_integer() else cell
