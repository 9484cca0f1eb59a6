"""Logistic regression on standardized features: multinomial for classes, one against the rest for labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl.adaptation.probes.base import Learner, Setting
from mmssl.adaptation.targets.base import Target


class Logistic(Learner[Tensor]):
    """scikit-learn's LogisticRegression (L-BFGS, L2 penalty) in float64.

    Args:
        c: candidates for C, the inverse of the penalty on the sum of the rows' losses.
        max_iter: of L-BFGS; a fit that needs more is counted under the table.
    """

    learns = ("classes", "labels")

    def __init__(self, *, c: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1, 1.0), max_iter: int = 1000) -> None:
        super().__init__()
        self.c, self.max_iter = c, max_iter

    def settings(self) -> Sequence[Setting]:
        """Values of C, the strongest penalty first."""
        return [{"C": c} for c in sorted(self.c)]

    def predict(
        self, target: Target, train: Tensor, labels: Tensor, test: Tensor, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(train.double().numpy())
        x, y = scaler.transform(train.double().numpy()), scaler.transform(test.double().numpy())
        matrix = target.matrix(labels) > 0.5
        several = labels.ndim > 1
        # One problem for all classes, or one for each label.
        problems = [own.numpy() for own in matrix.T] if several else [labels.numpy()]
        # Each is convex: starting from the previous candidate's weights changes the time, not the answer.
        models = [LogisticRegression(max_iter=self.max_iter, warm_start=True) for _ in problems]
        for setting in settings:
            answers = torch.zeros(len(test), target.width, dtype=torch.float64)
            for place, (model, problem) in enumerate(zip(models, problems, strict=True)):
                if problem.min() == problem.max():  # there is one answer
                    answers[:, place if several else int(problem[0])] = float(problem[0]) if several else 1.0
                    continue
                self._fit(model.set_params(C=setting["C"]), x, problem)
                chances = torch.from_numpy(model.predict_proba(y))
                if several:
                    answers[:, place] = chances[:, 1]
                else:
                    answers[:, torch.from_numpy(model.classes_)] = chances
            yield answers

    def _fit(self, model: Any, x: Any, problem: Any) -> None:
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(x, problem)
        if any(issubclass(w.category, ConvergenceWarning) for w in caught):
            self.warnings.append(f"logistic regression with C={model.C:g} did not converge")
