"""Rankings of tasks that need no labels, and how well each agreed with probes where there are some."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Cells = Mapping[str, Sequence[Mapping[str, Any]]]
"""Line -> what was measured, a seed each."""
AGREEMENT = "agreement with probes"
FEWEST = 3
"""Tasks below which a rank correlation says nothing."""


class LabelFree(NamedTuple):
    """A number that is said to foretell transfer.

    Attributes:
        key: under `monitors` of a cell.
        title: of its column.
        digits: after the point.
        merit: of a value; more is better.
    """

    key: str
    title: str
    digits: int
    merit: Callable[[float], float]


RANKME = LabelFree("effective_rank", "RankMe", 1, lambda value: value)
LIDAR = LabelFree("lidar", "LiDAR", 1, lambda value: value)
ALPHA_REQ = LabelFree("spectrum_decay", "alpha-ReQ", 2, lambda value: -abs(value - 1))
LABEL_FREE = (RANKME, LIDAR, ALPHA_REQ)
"""See `mmssl.ops.representation`, which names the papers."""


class Agreement(NamedTuple):
    """Of a ranking with that of the probes.

    Attributes:
        tau: Kendall's.
        rho: Spearman's.
        p: probability of a tau as far from 0 by chance.
        tasks: that were ranked.
    """

    tau: float
    rho: float
    p: float
    tasks: int


def value_of(cells: Cells, line: str, measure: LabelFree) -> float | None:
    """Mean over the seeds; None where it was not measured, or there is none."""
    values = [cell["monitors"].get(measure.key) for cell in cells[line]]
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.fmean(known) if known else None


def rank_by(cells: Cells, lines: Sequence[str], measure: LabelFree) -> list[str]:
    """Those of the lines that have it, the best first; of equals the first."""
    values = {line: value_of(cells, line, measure) for line in lines}
    merits = {line: measure.merit(value) for line, value in values.items() if value is not None}
    return sorted(merits, key=lambda line: -merits[line])


def agreement(cells: Cells, scores: Mapping[str, float], measure: LabelFree) -> Agreement | None:
    """Of a measure with the probes' scores of the tasks; None for fewer than three, or where all are equal.

    Args:
        cells: that hold the measure.
        scores: task -> score; more is better.
        measure: to be judged.
    """
    from scipy.stats import kendalltau, spearmanr

    lines = rank_by(cells, list(scores), measure)
    merits = [measure.merit(value) for line in lines if (value := value_of(cells, line, measure)) is not None]
    own = [scores[line] for line in lines]
    if len(lines) < FEWEST or len(set(merits)) == 1 or len(set(own)) == 1:
        return None
    tau = kendalltau(merits, own)
    return Agreement(float(tau.statistic), float(spearmanr(merits, own).statistic), float(tau.pvalue), len(lines))
