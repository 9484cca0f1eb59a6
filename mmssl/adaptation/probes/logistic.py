"""Logistic regression on standardized features: multinomial for classes, one against the rest for labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mmssl.adaptation.probes.base import Learner, Setting
from mmssl.adaptation.probes.ridge import standardize
from mmssl.adaptation.targets.base import Target
from mmssl.ops.logistic import Fit, fit_logistic


class Logistic(Learner[Tensor]):
    """scikit-learn's LogisticRegression (L-BFGS, L2 penalty) in float64, on the accelerator where there is one.

    Args:
        c: candidates for C, the inverse of the penalty on the sum of the rows' losses.
        max_iter: of L-BFGS; a fit that needs more is counted under the table.
    """

    learns: ClassVar[tuple[str, ...]] = ("classes", "labels")
    hold_outs = 10

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
        device = _device()
        x, y = (rows.to(device) for rows in standardize(train, test))
        several = labels.ndim > 1
        # One problem for all classes, or one for each label.
        problems = list((target.matrix(labels) > 0.5).long().T) if several else [labels]
        # Each is convex: starting from the previous candidate's weights changes the time, not the answer.
        fits: list[Fit | None] = [None] * len(problems)
        for setting in settings:
            answers = torch.zeros(len(test), target.width, dtype=torch.float64)
            for place, problem in enumerate(problems):
                kinds, numbers = problem.unique(return_inverse=True)
                if len(kinds) == 1:  # there is one answer
                    answers[:, place if several else int(kinds)] = float(kinds) if several else 1.0
                    continue
                before = fits[place]
                start = None if before is None else before.weights
                fit = fit_logistic(x, numbers.to(device), setting["C"], start=start, max_iter=self.max_iter)
                if not fit.converged:
                    self.warnings.append(f"logistic regression with C={setting['C']:g} did not converge")
                fits[place], chances = fit, fit.chances(y).cpu()
                if several:
                    answers[:, place] = chances[:, 1]
                else:
                    answers[:, kinds] = chances
            yield answers


def _device() -> torch.device:
    """The accelerator, unless it has no float64."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None or found.type == "mps" else found
