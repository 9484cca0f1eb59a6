"""Scores by depth: one chart, and one sentence on whether the last layer is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from mmssl.adaptation.features import POOLED
from mmssl.ops.intervals import mean_interval

DPI = 150
OWN, OTHER = ("#1b6ca8", "-"), ("#8a8f98", "--")  # color and style of the network's line, and of those to compare


class Depth(NamedTuple):
    """What a probe scores at one depth.

    Attributes:
        name: `pooled` or the depth.
        scores: on test rows, a seed each.
        interval: 95 % of a score of one seed, where it has one.
        validation: score on held-out training rows, by which depths are chosen; None where there was none.
    """

    name: str
    scores: tuple[float, ...]
    interval: tuple[float, float] | None = None
    validation: float | None = None

    @property
    def mean(self) -> float:
        """Of the scores."""
        return sum(self.scores) / len(self.scores)

    @property
    def reach(self) -> tuple[float, float]:
        """How far its spread reaches below and above the mean: a standard deviation over seeds, or one's interval."""
        if len(self.scores) > 1:
            deviation = float(np.std(self.scores, ddof=1))
            return deviation, deviation
        low, high = self.interval or (self.mean, self.mean)
        return max(0.0, self.mean - low), max(0.0, high - self.mean)


def compare_depths(depths: Sequence[Depth]) -> tuple[Depth, Depth] | None:
    """The best depth on validation rows, and the last layer, or the next best where that is the best.

    Depths that score as the last layer with every seed are that layer. None where there is nothing to compare.
    """
    known = {depth.name: depth for depth in depths if depth.validation is not None}
    last = known.get(POOLED)
    if last is None:
        return None
    others = [depth for depth in known.values() if depth[1:] != last[1:]]
    if not others:
        return None
    best = max(others, key=lambda depth: depth.validation or 0.0)
    return (last, best) if (last.validation or 0.0) >= (best.validation or 0.0) else (best, last)


def spread_of(first: Depth, second: Depth) -> float:
    """Half of the 95 % interval of the difference of their means, infinite where one seed tells none.

    Over seeds it is paired; of one seed it is that of two independent shares, which is wider than that of equal rows.
    """
    if len(first.scores) > 1:
        low, high = mean_interval(np.array(first.scores) - np.array(second.scores))
        return (high - low) / 2
    if first.interval and second.interval:
        return math.hypot(sum(first.reach), sum(second.reach)) / 2
    return math.inf


def sentence_of(best: str, other: str, difference: float, half: float, *, percent: bool) -> str:
    """Whether the last layer is the best, and by how much beyond the spread.

    Args:
        best: depth on validation rows.
        other: the last layer, or the next best where that is `best`.
        difference: of their scores on test rows.
        half: of its 95 % interval; infinite where it is not known.
        percent: whether scores are shares.
    """

    def number(value: float, unit: str = "") -> str:
        return f"{100 * value:.1f}{unit}" if percent else f"{value:.3f}"

    names = ["the last layer" if name == POOLED else name for name in (best, other)]
    side = "above" if difference >= 0 else "below"
    text = f"{names[0]} is the best depth on validation rows; on test rows it is {number(abs(difference), ' points')} "
    text += f"{side} {names[1]}"
    if not math.isfinite(half):
        return f"{text}, and one seed tells no spread"
    if abs(difference) > half:
        return f"{text}, {number(abs(difference) - half)} beyond the spread (± {number(half)})"
    return f"{text}, within the spread (± {number(half)})"


def draw_depths(
    curves: Mapping[str, Sequence[Depth]],
    level: float | None,
    path: Path | str | IO[bytes],
    *,
    title: str,
    percent: bool,
) -> None:
    """Draw score by depth, shallow on the left and the pooled features last, with the spread of each.

    Args:
        curves: name -> depths; the network's own first.
        level: of the constant answer; None where there is none.
        path: PNG to write.
        title: of the scores.
        percent: whether they are shares.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    scale = 100 if percent else 1
    for place, (name, depths) in enumerate(curves.items()):
        ordered = sorted(depths, key=lambda depth: depth.name == POOLED)
        color, line = OTHER if place else OWN
        names = [depth.name for depth in ordered]
        means, reach = [scale * depth.mean for depth in ordered], scale * np.array([depth.reach for depth in ordered]).T
        axes.errorbar(names, means, reach, label=name, color=color, linestyle=line, marker=".", capsize=2)
    if level is not None:
        axes.axhline(scale * level, color="#b03a2e", linestyle=(0, (5, 3)), linewidth=1, label="constant answer")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="x", rotation=30)
    axes.set_ylabel(title, fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=DPI, facecolor="white")
