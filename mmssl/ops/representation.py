"""How much room features take, as labels are not needed to see: what a loss does not tell of a collapse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DEAD = 1e-6  # of the largest standard deviation among the dimensions


def effective_rank(x: Tensor) -> Tensor:
    """Exponential of the entropy of the normalized singular values, 0-dim: 1 to min(N, D).

    RankMe (Garrido, Balestriero, Najman & LeCun 2023, arXiv 2210.02885, equation 1): the rows as they are, their mean
    included. 1 where all rows are zero.

    Args:
        x: float (N, D).
    """
    values = torch.linalg.svdvals(x.double())
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp()


def spectrum_decay(x: Tensor) -> Tensor:
    """How fast the eigenvalues of the covariance fall: lambda_i ~ i^-alpha, 0-dim; NaN where there are too few.

    alpha-ReQ (Agrawal, Mondal, Ghosh & Richards 2022): the nearer to 1 the better, larger means fewer directions. The
    line is fitted to ranks 3 to 50 on logarithmic axes with weights 1 / i, as Stringer et al. 2019 do.

    Args:
        x: float (N, D).
    """
    centered = x.double() - x.double().mean(0)
    values = torch.linalg.svdvals(centered).square()
    values = values[values > values.max() * torch.finfo(torch.float32).eps ** 2]
    if len(values) < 5:
        return values.new_tensor(float("nan"))
    ranks = torch.arange(3, min(50, len(values)) + 1, dtype=torch.float64, device=values.device)
    log, height, weights = ranks.log(), values[2 : len(ranks) + 2].log(), 1 / ranks
    log = log - (weights * log).sum() / weights.sum()
    return -(weights * log * height).sum() / (weights * log.square()).sum()


def lidar(views: Tensor, delta: float = 1e-4) -> Tensor:
    """How many directions tell rows apart more than views of one row differ, 0-dim: 1 to min(N - 1, D).

    LiDAR (Thilak, Huang, Saremi, Dinh, Goh, Nakkiran, Susskind & Littwin 2024, arXiv 2312.04000): the
    exponential of the entropy of the normalized eigenvalues of W^-1/2 B W^-1/2, where B is the covariance of the rows'
    means, and W that of views around the mean of their row, plus `delta` on the diagonal. Unlike an effective rank it
    does not grow with what augmentation changes. 1 where all rows are one.

    Args:
        views: float (N, V, D), V random views of N rows.
        delta: that of the paper; in units of squared features, so that those of tiny features all look alike.
    """
    views = views.double()
    means = views.mean(1)
    within = (views - means[:, None]).flatten(0, 1)
    noise = within.T @ within / len(within) + delta * torch.eye(views.shape[2], dtype=views.dtype, device=views.device)
    between = (means - means.mean(0)).T / len(means) ** 0.5  # (D, N): B is this times its transpose
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(noise), between, upper=False)
    values = torch.linalg.svdvals(whitened).square()
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp()


def dead_share(x: Tensor) -> Tensor:
    """Share of the dimensions that say nothing of a row, 0-dim: all where rows are equal.

    A dimension is dead where its standard deviation over the rows is below a millionth of the largest one, or of the
    largest value: the rounding of float32.

    Args:
        x: float (N, D).
    """
    deviations = x.double().std(0, correction=0)
    scale = torch.maximum(deviations.max(), x.double().abs().max())
    return (deviations <= DEAD * scale).double().mean()


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance between the unit vectors of a pair, 0-dim: 0 where they are one, 2 at right angles.

    Wang & Isola 2020, arXiv 2005.10242, equation 8 with their alpha of 2.

    Args:
        a: float (N, D).
        b: (N, D), whose row i belongs to row i of `a`.
    """
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()


def uniformity(x: Tensor) -> Tensor:
    """Logarithm of the mean Gaussian potential of two different rows as unit vectors, 0-dim.

    0 where all are one point, about -4 where they are uniform on a sphere of many dimensions. Wang & Isola 2020,
    arXiv 2005.10242, equation 9 with their t of 2.

    Args:
        x: float (N, D) of two rows or more.
    """
    return F.pdist(F.normalize(x, dim=1)).square().mul(-2).exp().mean().log()
