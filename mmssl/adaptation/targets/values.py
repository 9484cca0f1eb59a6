"""Real values: one number a row, or as many for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.adaptation.metrics import MEAN_ABSOLUTE_ERROR, R2, mean_absolute_error, r2
from mmssl.adaptation.targets.base import Target
from mmssl.errors import DataError


class Values(Target):
    """Labels float64 (N, K); the answer is what is scored. Whole numbers are values only where asked for by name.

    Args:
        width: numbers a row, K.
    """

    metrics = (R2, MEAN_ABSOLUTE_ERROR)

    def __init__(self, width: int = 1) -> None:
        self.width = width

    @classmethod
    def recognizes(cls, cells: Sequence[Any]) -> bool:
        """Numbers of which one at least is a float, or lists of such."""
        return _are_numbers(cells) and any(isinstance(value, float) for cell in cells for value in _numbers(cell))

    @classmethod
    def of(cls, cells: Sequence[Any]) -> Self:
        """As many numbers as each cell has."""
        if not _are_numbers(cells):
            found = ", ".join(sorted({type(value).__name__ for cell in cells for value in _numbers(cell)}))
            raise DataError(f"values should be numbers, the column holds {found or 'nothing'}")
        lengths = {len(_numbers(cell)) for cell in cells}
        if len(lengths) > 1 or 0 in lengths:
            raise DataError(
                f"values should be as many numbers in each row, found {', '.join(map(str, sorted(lengths)))}"
            )
        if not all(math.isfinite(value) for cell in cells for value in _numbers(cell)):
            raise DataError("values should be finite, and some are not")
        return cls(lengths.pop())

    def encode(self, cells: Sequence[Any]) -> Tensor:
        """float64 (N, K)."""
        return torch.tensor([_numbers(cell) for cell in cells], dtype=torch.float64).view(len(cells), self.width)

    @property
    def arguments(self) -> dict[str, Any]:
        """The width."""
        return {"width": self.width}

    def decode(self, answers: Tensor) -> list[Any]:
        """Numbers, or lists of them where a row has several."""
        values: list[Any] = answers.squeeze(1).tolist() if self.width == 1 else answers.tolist()
        return values

    def matrix(self, labels: Tensor) -> Tensor:
        """The values."""
        return labels.float()

    def score(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """Coefficient of determination and mean absolute error, averaged over the K."""
        return {R2.name: r2(answers, labels), MEAN_ABSOLUTE_ERROR.name: mean_absolute_error(answers, labels)}

    def check(self, labels: Tensor, truth: Tensor, where: str) -> list[str]:
        """Values that vary, and two test rows."""
        if (labels == labels[:1]).all():
            raise DataError(f"{where}: the value is the same in all {len(labels)} training rows")
        if len(truth) < 2:
            raise DataError(f"{where}: {len(truth)} test rows; R^2 takes two")
        return []

    def counts(self, labels: Tensor) -> dict[str, int]:
        """Numbers a row, where they are several."""
        return {"values a row": self.width} if self.width > 1 else {}

    def units(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        mean, scale = labels.mean(0), labels.std(0, correction=0)
        return mean.float(), torch.where(scale > 0, scale, 1.0).float()

    def answer(self, outputs: Tensor) -> Tensor:
        """As they are."""
        return outputs

    def loss(self, outputs: Tensor, matrix: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(outputs, matrix)


def _numbers(cell: Any) -> list[Any]:
    return cell if isinstance(cell, list) else [cell]


def _are_numbers(cells: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for cell in cells for value in _numbers(cell))
