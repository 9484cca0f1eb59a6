"""The contract of a probe, and how its hyper-parameter is chosen: on held-out training rows, never on test rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmssl.batch import Batch, count_rows
from mmssl.encoders.base import Encoder
from mmssl.errors import DataError

Setting = Mapping[str, float]
HELD_OUT = 0.2


@dataclass(frozen=True)
class RawRows:
    """Raw rows with the encoder that reads them: what fine-tuning takes in place of features."""

    encoder: Encoder
    batch: Batch

    def __len__(self) -> int:
        return count_rows(self.batch)

    def __getitem__(self, index: Tensor) -> RawRows:
        return RawRows(self.encoder, {key: value[index] for key, value in self.batch.items()})


X = TypeVar("X", Tensor, RawRows)


class Probe(Generic[X]):
    """Learns classes from rows `X`: features float32 (N, D), or `RawRows` where `frozen` is False.

    Subclasses take keyword-only hyper-parameters, of which one or more are lists of candidates.

    Attributes:
        frozen: whether it works on features and leaves the encoder as it is.
        warnings: sentences about fits that did not go as they should; printed under the scores.
    """

    frozen: ClassVar[bool] = True

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def settings(self) -> Sequence[Setting]:
        """Candidate hyper-parameters, the smoothest model first: of equals on the validation rows it is taken."""
        raise TypeError(f"{type(self).__name__} has no settings")

    def predict(self, train: X, labels: Tensor, test: X, settings: Sequence[Setting], seed: int) -> Iterator[Tensor]:
        """Learn from `train` with each of `settings`; yields the classes of `test`, int64 (M,), one for each.

        Args:
            train: N rows.
            labels: int64 (N,), classes of `train`.
            test: M rows.
            settings: from `settings()`.
            seed: of whatever is random.
        """
        raise TypeError(f"{type(self).__name__} cannot predict")

    def choose(self, train: X, labels: Tensor, seed: int, groups: Tensor | None = None) -> Setting:
        """The setting with the best accuracy on a held-out fifth of the training rows.

        Raises:
            DataError: where there is more than one setting and no row to spare.
        """
        settings = list(self.settings())
        if len(settings) == 1:
            return settings[0]
        held = hold_out(labels, HELD_OUT, seed, groups)
        if not held.any():
            raise DataError(
                f"no class has two training rows{' of different groups' if groups is not None else ''}, so "
                f"{', '.join(settings[0])} cannot be chosen on a validation split; give it one value"
            )
        fitted = self.predict(train[~held], labels[~held], train[held], settings, seed)
        scores = [(guess == labels[held]).float().mean().item() for guess in fitted]
        return settings[int(np.argmax(scores))]


def hold_out(labels: Tensor, share: float, seed: int, groups: Tensor | None = None) -> Tensor:
    """Mask of a stratified hold-out, bool (N,), True for rows that are held out.

    Of each class `share` of the groups is held out, at least one and never all; a group, whose class is that of its
    first row, is never divided. Without groups each row is one.

    Args:
        labels: int64 (N,).
        share: in (0, 1).
        seed: of the draw.
        groups: int64 (N,), rows that belong together, such as drawings of one thing.
    """
    rows = np.arange(len(labels)) if groups is None else groups.numpy()
    _, first, member = np.unique(rows, return_index=True, return_inverse=True)
    classes = labels.numpy()[first]
    random = np.random.default_rng(seed)
    held = np.zeros(len(first), dtype=bool)
    for name in np.unique(classes):
        units = random.permutation(np.flatnonzero(classes == name))
        held[units[: min(len(units) - 1, max(1, round(share * len(units))))]] = True
    return torch.from_numpy(held[member])


def draw_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Indices, int64 sorted, of `shots` rows of each class (all of them where it has fewer)."""
    random = np.random.default_rng(seed)
    classes = labels.numpy()
    picked = [random.permutation(np.flatnonzero(classes == name))[:shots] for name in np.unique(classes)]
    return torch.from_numpy(np.sort(np.concatenate(picked)))
