"""Linear least squares on one-hot classes, labels or values: closed form, no iterations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmssl.adaptation.probes.base import Learner, Setting
from mmssl.adaptation.targets.base import Target


class Ridge(Learner[Tensor]):
    """Ridge regression on standardized features; of classes the one with the largest output wins.

    One eigendecomposition, in float64, serves every candidate.

    Args:
        alpha: candidates for the penalty, in units of the features' variance: the weights are
            (X'X / N + alpha)^-1 X'Y / N.
    """

    hold_outs = 10

    def __init__(self, *, alpha: tuple[float, ...] = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)) -> None:
        super().__init__()
        self.alpha = alpha

    def settings(self) -> Sequence[Setting]:
        """Penalties, the strongest first."""
        return [{"alpha": alpha} for alpha in sorted(self.alpha, reverse=True)]

    def predict(
        self, target: Target, train: Tensor, labels: Tensor, test: Tensor, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`."""
        train, test = standardize(train, test)
        matrix = target.matrix(labels).double()
        mean = matrix.mean(0)
        variance, axes = torch.linalg.eigh(train.T @ train / len(train))
        response = axes.T @ (train.T @ (matrix - mean)) / len(train)
        projected = test @ axes
        for setting in settings:
            yield projected / (variance + setting["alpha"]) @ response + mean


def standardize(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, shifted and scaled to mean 0 and variance 1 of `train`; constant features become 0."""
    train, test = train.double(), test.double()
    mean, scale = train.mean(0), train.std(0, correction=0)
    scale[scale < 1e-12] = 1.0
    return (train - mean) / scale, (test - mean) / scale
