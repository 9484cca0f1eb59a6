"""Several labels a row, or none: lists of names or whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.adaptation.metrics import (
    INTERPOLATED_PRECISION,
    MEAN_AVERAGE_PRECISION,
    SUBSET_ACCURACY,
    interpolated_average_precision,
    mean_average_precision,
    subset_accuracy,
)
from mmssl.adaptation.targets.base import Target
from mmssl.data.columns import find_classes, is_missing
from mmssl.errors import DataError
from mmssl.shots import quotas

FEWEST = 5
"""Sets of labels on fewer rows than this are held out together: one by one none of them would be."""


class Labels(Target):
    """Labels bool (N, C), a column for each of `names`; a label with a chance above one half is given.

    Args:
        names: of the labels, all names or all whole numbers.
    """

    metrics = (MEAN_AVERAGE_PRECISION, INTERPOLATED_PRECISION, SUBSET_ACCURACY)
    shares = (SUBSET_ACCURACY,)

    def __init__(self, names: Sequence[Any]) -> None:
        self.names, self.width = tuple(names), len(names)
        self._number = {name: number for number, name in enumerate(self.names)}

    @classmethod
    def recognizes(cls, cells: Sequence[Any]) -> bool:
        """Lists of names or whole numbers; empty ones too."""
        return all(isinstance(cell, list) for cell in cells) and all(
            isinstance(label, str | int) for cell in cells for label in cell
        )

    @classmethod
    def of(cls, cells: Sequence[Any]) -> Self:
        """The labels that there are, sorted; lists of true and false, equally long, mark what is there by its place."""
        if not any(_given(cell) for cell in cells):
            raise DataError("labels are lists of names or whole numbers, and all of them are empty")
        names = find_classes(label for cell in cells for label in _given(cell))
        if names is None:
            raise DataError("labels are lists of names or whole numbers, and the column holds lists of lists")
        return cls(names)

    def encode(self, cells: Sequence[Any]) -> Tensor:
        """Bool (N, C)."""
        labels = torch.zeros(len(cells), self.width, dtype=torch.bool)
        for row, cell in enumerate(cells):
            labels[row, [self._number[label] for label in _given(cell)]] = True
        return labels

    @property
    def arguments(self) -> dict[str, Any]:
        """The names."""
        return {"names": list(self.names)}

    def decode(self, answers: Tensor) -> list[Any]:
        """The labels with a chance above one half."""
        return [
            [name for name, given in zip(self.names, row, strict=True) if given] for row in (answers > 0.5).tolist()
        ]

    def matrix(self, labels: Tensor) -> Tensor:
        """Zeros and ones."""
        return labels.float()

    def score(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """Mean over the labels of the average precision, as it is and interpolated; share of rows all right."""
        return {
            MEAN_AVERAGE_PRECISION.name: mean_average_precision(answers, labels),
            INTERPOLATED_PRECISION.name: interpolated_average_precision(answers, labels),
            SUBSET_ACCURACY.name: subset_accuracy(answers > 0.5, labels),
        }

    def check(self, labels: Tensor, truth: Tensor, where: str) -> list[str]:
        """A label that some rows have and others have not."""
        have = labels.any(0)
        if not (have & ~labels.all(0)).any():
            raise DataError(f"{where}: all {len(labels)} training rows have the same labels")
        if not truth.any():
            raise DataError(f"{where}: no test row has a label")
        unknown = [name for name, new in zip(self.names, truth.any(0) & ~have, strict=True) if new]
        if not unknown:
            return []
        shown = ", ".join(map(repr, unknown[:5])) + ", ..." * (len(unknown) > 5)
        return [f"{len(unknown)} labels of test rows are on no training row: {shown}"]

    def counts(self, labels: Tensor) -> dict[str, int]:
        """Number of labels."""
        return {"labels": int(labels.any(0).sum())}

    def strata(self, labels: Tensor) -> Tensor:
        """The sets of labels, the rare ones as one."""
        _, number, count = np.unique(labels.numpy(), axis=0, return_inverse=True, return_counts=True)
        number = number.reshape(-1)
        return torch.from_numpy(np.where(count[number] < FEWEST, len(count), number))

    def draw_shots(self, labels: Tensor, shots: int | str, seed: int) -> Tensor:
        """Indices, int64 sorted, such that each label is on so many rows, or on its share of rows, or on more.

        The rarest labels come first, for their rows may have the others too.
        """
        random = np.random.default_rng(seed)
        given = labels.numpy()
        picked = np.zeros(len(given), dtype=bool)
        wanted = quotas(shots, given.sum(0).tolist())
        for label in np.argsort(given.sum(0), kind="stable"):
            missing = max(0, wanted[label] - int(given[picked, label].sum()))
            picked[random.permutation(np.flatnonzero(given[:, label] & ~picked))[:missing]] = True
        return torch.from_numpy(np.flatnonzero(picked))

    def answer(self, outputs: Tensor) -> Tensor:
        """Sigmoid."""
        return outputs.sigmoid()

    def loss(self, outputs: Tensor, matrix: Tensor) -> Tensor:
        """Binary cross-entropy, averaged over rows and labels."""
        return F.binary_cross_entropy_with_logits(outputs, matrix)


def _given(cell: Any) -> list[Any]:
    """The labels of a row: its list without gaps, the places of what is true in one of booleans, or its one label."""
    if not isinstance(cell, list):
        return [cell]
    if cell and all(isinstance(label, bool) for label in cell):
        return [place for place, there in enumerate(cell) if there]
    return [label for label in cell if not is_missing(label)]
