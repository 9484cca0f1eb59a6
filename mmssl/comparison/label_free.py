"""Rankings of tasks that need no labels, and how well each agreed with probes where there are some."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
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

    def __str__(self) -> str:
        """The three numbers."""
        return f"{self.tau:+.2f} (Spearman {self.rho:+.2f}, p = {self.p:.2f}, {self.tasks} tasks)"


class Elsewhere(NamedTuple):
    """What `mmssl compare` found on rows with labels, as docs/results.md has it.

    Attributes:
        data: that was compared on.
        network: of all tasks.
        probe: that ranked the tasks.
        by: title of a ranking without labels -> how well it agreed with that of the probe.
    """

    data: str
    network: str
    probe: str
    by: dict[str, Agreement]

    def __str__(self) -> str:
        """A line of notes, Kendall's and Spearman's numbers each."""
        told = ", ".join(f"{title} {one.tau:+.2f} / {one.rho:+.2f}" for title, one in self.by.items())
        tasks = max(one.tasks for one in self.by.values())
        return f"{self.data}, {self.network}, {tasks} tasks by {self.probe}: {told}"


@cache
def measured_elsewhere() -> tuple[Elsewhere, ...]:
    """The comparisons that there are, of agreements.json, which scripts/compared.py writes with its tables."""
    stored = json.loads((Path(__file__).parent / "agreements.json").read_text(encoding="utf-8"))
    return tuple(
        Elsewhere(**{**one, "by": {key: Agreement(**own) for key, own in one["by"].items()}}) for one in stored
    )


def trust_in_words() -> str:
    """How far rankings without labels are to be trusted, by what was measured elsewhere."""
    found = measured_elsewhere()
    taus = {measure.title: [one.by[measure.title].tau for one in found] for measure in LABEL_FREE}
    told = ", ".join(f"{min(own):+.2f} to {max(own):+.2f} for {title}" for title, own in taus.items())
    data = " and ".join(dict.fromkeys(one.data for one in found))
    return (
        f"in {len(found)} comparisons with labels, on {data}, Kendall's tau between such an order and that of probes "
        f"was {told} (+1 is the same order, 0 none), and it does not carry over for sure"
    )


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
