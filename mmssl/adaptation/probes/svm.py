"""Linear SVMs, each class against the rest with a cost of its own: how features are compared on VOC07.

Goyal, Mahajan, Gupta & Misra 2019, "Scaling and Benchmarking Self-Supervised Visual Representation Learning", arXiv
1905.01235, and its code, fair_self_supervision_benchmark: vectors of unit length, squared hinge loss, errors on a class
count twice those on the rest, and the cost is the best of three folds of the training rows by average precision.
Compare their mAP with `mAP, interpolated`.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mmssl.adaptation.probes.base import Learner, Setting
from mmssl.adaptation.targets.base import Target
from mmssl.errors import DataError
from mmssl.ranges import AboveZero, Positive

FOLDS = 3
SMALLEST_NORM = 1e-5  # is added to the length of a vector before it is divided by it, as the paper's code does
COSTS = tuple(sorted([2.0**k for k in range(-19, -3)] + [10.0**k for k in range(-7, 3)]))


class Svm(Learner[Tensor]):
    """scikit-learn's LinearSVC on vectors of unit length; of classes the one with the largest decision value wins.

    Answers are the sigmoid of decision values: their order and their side of one half say something, their size does
    not.

    Args:
        c: candidates for the cost, the factor of the hinge losses; the default is the paper's.
        positive_weight: of errors on rows of the class, where that of the rest is 1.
        max_iter: of liblinear; that some fits need more is said under the table.
    """

    learns = ("classes", "labels")
    chosen_on = f"{FOLDS} folds of the training rows, a cost for each class"

    def __init__(
        self, *, c: tuple[float, ...] = COSTS, positive_weight: AboveZero = 2.0, max_iter: Positive = 2000
    ) -> None:
        super().__init__()
        self.c, self.positive_weight, self.max_iter = c, positive_weight, max_iter

    def settings(self) -> Sequence[Setting]:
        """One cost for all classes, the smallest first."""
        return [{"C": c} for c in sorted(self.c)]

    def choose(
        self,
        target: Target,
        train: Tensor,
        labels: Tensor,
        seed: int,
        groups: Tensor | None = None,
        *,
        always: bool = False,
    ) -> tuple[Setting, float | None]:
        """For each class the cost of the best average precision, averaged over the folds; of equals the smallest.

        A class with too few rows for two folds takes the median of the others' costs. The score is the mean over the
        other classes. See `Learner.choose`.
        """
        costs = sorted(self.c)
        if len(costs) == 1 and not always:
            return {"C": costs[0]}, None
        x, matrix = normalize(train), target.matrix(labels).numpy() > 0.5
        places = None if groups is None else groups.numpy()
        scores = [self._cross_validate(x, truth, costs, places, seed) for truth in matrix.T]
        known = {place: costs[int(np.argmax(score))] for place, score in enumerate(scores) if score is not None}
        if not known:
            if len(costs) == 1:
                return {"C": costs[0]}, None
            raise DataError("no class has rows for two folds, so C cannot be chosen; give it one value")
        other = statistics.median_low(known.values())
        setting = {f"C of {name}": known.get(place, other) for place, name in enumerate(target.names)}
        return setting, statistics.fmean(score.max() for score in scores if score is not None)

    def predict(
        self, target: Target, train: Tensor, labels: Tensor, test: Tensor, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`; a setting is one cost for all classes or one for each, in their order."""
        x, y, matrix = normalize(train), normalize(test), target.matrix(labels).numpy() > 0.5
        for setting in settings:
            costs = list(setting.values()) * (target.width if len(setting) == 1 else 1)
            answers = torch.empty(len(y), target.width, dtype=torch.float64)
            for place, (truth, cost) in enumerate(zip(matrix.T, costs, strict=True)):
                if truth.all() or not truth.any():  # there is one answer
                    answers[:, place] = float(truth[0])
                    continue
                decision, converged = self._decide(x, truth, y, cost, seed)
                answers[:, place] = torch.from_numpy(decision).sigmoid()
                if not converged:
                    self.warnings.append(f"some SVMs did not converge in {self.max_iter} iterations")
            yield answers

    def _cross_validate(
        self, x: np.ndarray, truth: np.ndarray, costs: Sequence[float], groups: np.ndarray | None, seed: int
    ) -> np.ndarray | None:
        """Mean average precision over the folds, a value a cost; None where no fold can be learned and scored."""
        from sklearn.metrics import average_precision_score
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

        folds = min(FOLDS, int(truth.sum()), int((~truth).sum()))
        if folds < 2:
            return None
        kind = StratifiedKFold if groups is None else StratifiedGroupKFold
        parts = [
            (fit, held)
            for fit, held in kind(folds).split(x, truth, groups)
            if truth[held].any() and truth[fit].any() and not truth[fit].all()
        ]
        scores = [
            [average_precision_score(truth[held], self._decide(x[fit], truth[fit], x[held], c, seed)[0]) for c in costs]
            for fit, held in parts
        ]
        return np.mean(scores, axis=0) if scores else None

    def _decide(
        self, x: np.ndarray, truth: np.ndarray, y: np.ndarray, cost: float, seed: int
    ) -> tuple[np.ndarray, bool]:
        """Decision values of `y`, learned from `x`, float64; and whether the fit converged."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.svm import LinearSVC

        model = LinearSVC(
            C=cost,
            class_weight={True: self.positive_weight, False: 1.0},
            dual=True,
            max_iter=self.max_iter,
            random_state=seed,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(x, truth)
        return model.decision_function(y), not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def normalize(x: Tensor) -> np.ndarray:
    """Vectors (N, D) of unit length, float64; see `SMALLEST_NORM`."""
    x = x.double()
    return (x / (x.norm(dim=1, keepdim=True) + SMALLEST_NORM)).numpy()
