"""How sure a share is that was counted."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson(share: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a binomial probability of which `share` was seen in `trials` (Wilson 1927).

    Unlike the normal approximation it stays inside [0, 1] and holds for a share of 0 or 1.
    """
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    square = quantile**2 / trials
    center = share + square / 2
    half = quantile * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, (center - half) / (1 + square)), min(1.0, (center + half) / (1 + square))
