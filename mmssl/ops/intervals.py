"""How sure a share is that was counted."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from scipy import stats


def wilson(share: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a binomial probability of which `share` was seen in `trials` (Wilson 1927).

    Unlike the normal approximation it stays inside [0, 1] and holds for a share of 0 or 1.
    """
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    square = quantile**2 / trials
    center = share + square / 2
    half = quantile * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, (center - half) / (1 + square)), min(1.0, (center + half) / (1 + square))


def paired_interval(
    a: np.ndarray, b: np.ndarray, groups: np.ndarray | None = None, *, confidence: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """The percentile interval of mean(a) - mean(b) over seeds and rows, both drawn anew with replacement.

    A bootstrap at two levels (Davison & Hinkley 1997, section 3.8): seeds are drawn, and groups of test rows, the same
    for both sides and for all seeds. With one seed only groups are drawn. The draws are those of a fixed seed.

    Args:
        a: of each seed and row, (S, M), such as whether it was answered right.
        b: likewise; seed s belongs to seed s.
        groups: int64 (M,), rows that are drawn together; each row alone where None.
        confidence: share of intervals that hold the true difference.
        draws: number of them.
    """
    differences = a.astype(float) - b.astype(float)
    _, members = np.unique(np.arange(differences.shape[1]) if groups is None else groups, return_inverse=True)
    sizes = np.bincount(members).astype(float)
    sums = np.stack([np.bincount(members, row) for row in differences])  # (S, G)
    random = np.random.default_rng(0)
    found = np.empty(draws)
    for i in range(draws):
        seeds = random.integers(len(sums), size=len(sums)) if len(sums) > 1 else [0]
        times = np.bincount(random.integers(len(sizes), size=len(sizes)), minlength=len(sizes))
        found[i] = (sums[seeds].mean(0) @ times) / (sizes @ times)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_interval(differences: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of a mean over seeds, (S,); infinite for one seed, which tells no spread."""
    if len(differences) < 2:
        return -math.inf, math.inf
    half = stats.t.ppf((1 + confidence) / 2, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return float(differences.mean() - half), float(differences.mean() + half)
