"""Logistic regression as scikit-learn solves it, on whatever device the features are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

TOLERANCE = 1e-4  # of the largest entry of the gradient, as in scikit-learn


class Fit(NamedTuple):
    """A logistic model.

    Attributes:
        weights: float64 (K, D + 1), the last column the intercepts; of two classes one line.
        converged: whether the gradient came below the tolerance in time.
    """

    weights: Tensor
    converged: bool

    def chances(self, x: Tensor) -> Tensor:
        """Of each class, float64 (N, K).

        Args:
            x: float64 (N, D).
        """
        logits = F.linear(x, self.weights[:, :-1], self.weights[:, -1])
        if logits.shape[1] > 1:
            return logits.softmax(1)
        return torch.cat([(-logits).sigmoid(), logits.sigmoid()], 1)


def fit_logistic(x: Tensor, y: Tensor, c: float, *, start: Tensor | None = None, max_iter: int = 1000) -> Fit:
    """The minimum of c times the sum of the rows' cross-entropies and half of the squared weights.

    The function, the solver (SciPy's L-BFGS-B) and when it stops are those of scikit-learn's LogisticRegression;
    cross-entropy and gradient are computed on the device of `x`. Intercepts are not penalized.

    Args:
        x: float64 (N, D).
        y: int64 (N,), classes from 0 to K - 1 that all occur, two or more.
        c: inverse of the penalty.
        start: weights from which the solver starts; zeros where left out.
        max_iter: steps of the solver.
    """
    classes = int(y.max()) + 1
    shape = (classes if classes > 2 else 1, x.shape[1] + 1)
    penalty = 1 / (c * len(x))
    rows = torch.cat([x, x.new_ones(len(x), 1)], 1)
    truth = y[:, None]

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        # By hand: of thousands of small problems autograd takes half of the time.
        weights = torch.from_numpy(flat.reshape(shape)).to(x.device)
        logits = rows @ weights.T
        if classes > 2:
            levels = logits.log_softmax(1)
            loss = -levels.gather(1, truth).mean()
            wrong = levels.exp().scatter_add_(1, truth, -torch.ones_like(levels[:, :1]))
        else:
            loss = F.binary_cross_entropy_with_logits(logits, truth.to(x.dtype))
            wrong = logits.sigmoid() - truth
        slopes = F.pad(weights[:, :-1], (0, 1))  # intercepts are not penalized
        gradient = wrong.T @ rows / len(x) + penalty * slopes
        return (loss + penalty / 2 * slopes.square().sum()).item(), gradient.cpu().numpy().ravel()

    first = np.zeros(shape) if start is None else start.cpu().numpy()
    options = {"maxiter": max_iter, "maxls": 50, "gtol": TOLERANCE, "ftol": 64 * np.finfo(float).eps}
    found = minimize(loss_and_gradient, first.ravel(), jac=True, method="L-BFGS-B", options=options)
    return Fit(torch.from_numpy(found.x.reshape(shape)).to(x.device), bool(found.success))
