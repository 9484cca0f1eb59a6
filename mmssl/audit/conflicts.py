"""Do the tasks of a combination pull the shared encoders the same way?

As in Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782: the cosine between two tasks'
gradients on the parameters that both train. Below 0 a step for the one undoes part of a step for the other. Gradients
of one batch are noisy, and the noise pulls every cosine toward 0; so a single measurement says little, and the closing
line gives a mean with its interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from mmssl.ops.conflicts import COSINE, SHARE

SURE = 0.95


def fiercest(history: Sequence[Mapping[str, Any]]) -> str | None:
    """The pair with the lowest mean cosine, in words; None where nothing was measured.

    The interval is Student's over all measurements of the run, 95 % for all pairs together (Bonferroni): the pair was
    chosen because it is the lowest.
    """
    from scipy import stats

    cosines: dict[str, list[float]] = {}
    for record in history:
        for key, value in record.items():
            if key.startswith(f"{COSINE}/") and math.isfinite(value):
                cosines.setdefault(key, []).append(value)
    if not cosines:
        return None
    key, values = min(cosines.items(), key=lambda item: fmean(item[1]))
    pair, mean, count = _pair(key, history), fmean(values), len(values)
    if count == 1:
        return f"{pair} are furthest apart: cosine of their gradients {mean:.3f} (1 measurement)"
    margin = stats.t.isf((1 - SURE) / 2 / len(cosines), count - 1) * stdev(values) / math.sqrt(count)
    low, high = max(-1.0, mean - margin), min(1.0, mean + margin)
    says = "pull against each other" if high < 0 else "agree least, and pull the same way" if low > 0 else "agree least"
    return (
        f"{pair} {says}: mean cosine of their gradients {mean:.3f} "
        f"({SURE:.0%} interval {low:.3f} to {high:.3f}, {count} measurements)"
    )


def _pair(key: str, history: Sequence[Mapping[str, Any]]) -> str:
    """`conflict/a_b` as `a and b`; names may hold underscores themselves."""
    tasks = {name.rpartition("/")[2] for record in history for name in record if name.startswith(f"{SHARE}/")}
    name = key.rpartition("/")[2]
    return next((f"{a} and {b}" for a in tasks for b in tasks if f"{a}_{b}" == name), name)
