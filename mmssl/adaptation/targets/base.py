"""The contract of a target: what a column's cells mean, how rows are divided, and how right an answer is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from mmssl.adaptation.metrics import Metric
from mmssl.shots import quotas

HELD_OUT = 0.2
"""Share of rows that is held out: for the test where there are no test rows, and for the choice of a setting."""


class Target:
    """What rows are labeled with.

    It is made by `of` from the cells of training and test rows together, so that both are read alike. Labels are one
    tensor whose first dimension is the row; `encode` makes them from cells.

    Probes estimate, for each row, the conditional mean of `matrix(labels)`, float (N, width): the chances of classes
    or labels, or the values themselves. Such an estimate is called an answer.

    Attributes:
        metrics: what `score` computes; settings are chosen by the first one.
        shares: metrics that are shares of right rows, which have an interval.
        placed: whether cells are about places of a picture, and read when they are needed; see `adaptation.placed`.
        width: of `matrix` and of answers.
        names: of the classes or labels that the columns of `matrix` stand for; empty where they are no chances.
    """

    metrics: tuple[Metric, ...]
    shares: ClassVar[tuple[Metric, ...]] = ()
    placed: ClassVar[bool] = False
    width: int
    names: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """That of its module."""
        return type(self).__module__.rpartition(".")[2]

    @classmethod
    def recognizes(cls, cells: Sequence[Any]) -> bool:
        """Whether this is what such cells are taken for where nobody says so; none of them is missing."""
        raise TypeError(f"{cls.__name__} recognizes nothing")

    @classmethod
    def of(cls, cells: Sequence[Any]) -> Self:
        """The target of a column.

        Args:
            cells: those of training and test rows that are not missing.

        Raises:
            DataError: where they are something else.
        """
        raise TypeError(f"{cls.__name__} reads nothing")

    def encode(self, cells: Sequence[Any]) -> Tensor:
        """Labels of cells that are not missing, (N, ...)."""
        raise TypeError(f"{type(self).__name__} encodes nothing")

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the constructor that make an equal one, as JSON holds them."""
        raise TypeError(f"{type(self).__name__} cannot be saved")

    def decode(self, answers: Tensor) -> list[Any]:
        """The cell that each of the answers (N, width) says, as `encode` takes it."""
        raise TypeError(f"{type(self).__name__} decodes nothing")

    def matrix(self, labels: Tensor) -> Tensor:
        """What probes learn to estimate, float32 (N, width)."""
        raise TypeError(f"{type(self).__name__} has no matrix")

    def score(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """Name -> value of every metric of `metrics`.

        Args:
            answers: float (M, width).
            labels: true ones, (M, ...).
        """
        raise TypeError(f"{type(self).__name__} scores nothing")

    def constant(self, labels: Tensor) -> Tensor:
        """The best answer that looks at no row, given the training labels; float (width,)."""
        return self.matrix(labels).double().mean(0)

    def check(self, labels: Tensor, truth: Tensor, where: str) -> list[str]:
        """Warnings for the reader of the table.

        Args:
            labels: of the training rows.
            truth: of the test rows.
            where: the training rows are from.

        Raises:
            DataError: where there is nothing to learn or to score.
        """
        raise TypeError(f"{type(self).__name__} checks nothing")

    def look(self, labels: Tensor, truth: Tensor) -> list[str]:
        """Read what is about to be learned and scored, where that is kept undecoded; warnings for the table's reader.

        Args:
            labels: of the training rows that are learned from.
            truth: of the test rows.

        Raises:
            DataError: for the first that cannot be read.
        """
        return []

    def counts(self, labels: Tensor) -> dict[str, int]:
        """What the head of the table says of the training labels besides their number."""
        return {}

    def strata(self, labels: Tensor) -> Tensor:
        """int64 (N,): of each stratum its share is held out."""
        return torch.zeros(len(labels), dtype=torch.int64)

    def hold_out(self, labels: Tensor, share: float, seed: int, groups: Tensor | None = None) -> Tensor:
        """Rows of a stratified hold-out, bool (N,).

        Of each stratum `share` of the groups is held out, at least one and never all; a group, whose stratum is that
        of its first row, is never divided. Without groups each row is one.

        Args:
            labels: (N, ...).
            share: in (0, 1).
            seed: of the draw.
            groups: int64 (N,), rows that belong together, such as drawings of one thing.
        """
        return hold_out(self.strata(labels), share, seed, groups)

    def draw_shots(self, labels: Tensor, shots: int | str, seed: int) -> Tensor:
        """Indices, int64 sorted, of so many rows of each stratum, or a share of each; see `mmssl.shots.quotas`.

        What a seed draws of few rows is among what it draws of more.
        """
        random = np.random.default_rng(seed)
        strata = self.strata(labels).numpy()
        names, sizes = np.unique(strata, return_counts=True)
        picked = [
            random.permutation(np.flatnonzero(strata == name))[:quota]
            for name, quota in zip(names, quotas(shots, sizes.tolist()), strict=True)
        ]
        return torch.from_numpy(np.sort(np.concatenate(picked)))

    # What a network with a linear head needs: the link between its outputs and the answers.

    def units(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale, float32 (width,) each: a head learns (matrix - shift) / scale."""
        return torch.zeros(self.width), torch.ones(self.width)

    def answer(self, outputs: Tensor) -> Tensor:
        """The mean that a head's outputs (B, width) stand for, in its units."""
        raise TypeError(f"{type(self).__name__} has no answer")

    def loss(self, outputs: Tensor, matrix: Tensor) -> Tensor:
        """Mean over rows, a scalar; `outputs` and `matrix` (B, width) in the head's units."""
        raise TypeError(f"{type(self).__name__} has no loss")


def hold_out(strata: Tensor, share: float, seed: int, groups: Tensor | None = None) -> Tensor:
    """See `Target.hold_out`; strata int64 (N,)."""
    rows = np.arange(len(strata)) if groups is None else groups.numpy()
    _, first, member = np.unique(rows, return_index=True, return_inverse=True)
    classes = strata.numpy()[first]
    random = np.random.default_rng(seed)
    held = np.zeros(len(first), dtype=bool)
    for name in np.unique(classes):
        units = random.permutation(np.flatnonzero(classes == name))
        held[units[: min(len(units) - 1, max(1, round(share * len(units))))]] = True
    return torch.from_numpy(held[member])
