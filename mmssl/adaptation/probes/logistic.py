"""Multinomial logistic regression on standardized features."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmssl.adaptation.probes.base import Probe, Setting


class Logistic(Probe[Tensor]):
    """scikit-learn's LogisticRegression (L-BFGS, L2 penalty) in float64.

    Args:
        c: candidates for C, the inverse of the penalty on the sum of the rows' losses.
        max_iter: of L-BFGS; a fit that needs more is counted under the scores.
    """

    def __init__(self, *, c: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1, 1.0), max_iter: int = 1000) -> None:
        super().__init__()
        self.c, self.max_iter = c, max_iter

    def settings(self) -> Sequence[Setting]:
        """Values of C, the strongest penalty first."""
        return [{"C": c} for c in sorted(self.c)]

    def predict(
        self, train: Tensor, labels: Tensor, test: Tensor, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Probe.predict`."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(train.double().numpy())
        # The problem is convex: starting from the previous candidate's weights changes the time, not the answer.
        model = LogisticRegression(max_iter=self.max_iter, warm_start=True)
        for setting in settings:
            model.set_params(C=setting["C"])
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.fit(scaler.transform(train.double().numpy()), labels.numpy())
            if any(issubclass(w.category, ConvergenceWarning) for w in caught):
                self.warnings.append(f"logistic regression with C={setting['C']:g} did not converge")
            yield torch.from_numpy(model.predict(scaler.transform(test.double().numpy())))
