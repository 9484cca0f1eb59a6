"""The result of an adaptation: a table in which no number stands without its baselines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

PRETRAINED, RANDOM, CONSTANT = "pretrained", "random", "constant"
RERANKED, RAW, CHANCE = "re-ranked", "raw", "chance"
NAMES = {
    PRETRAINED: "pretrained",
    RERANKED: "pretrained, re-ranked",
    RANDOM: "random-initialized",
    RAW: "linear maps of raw inputs",
    CONSTANT: "constant (majority class)",
    CHANCE: "chance",
}


@dataclass(frozen=True)
class Row:
    """One line of the table; shares lie in [0, 1].

    Attributes:
        encoder: `pretrained`, `random` (the same network, random-initialized), `constant` (the majority class) or
            `chance` (a class at random).
        layer: `pooled`, or the depth that was probed.
        accuracy: mean over the seeds.
        spread: standard deviation over the seeds; None for one seed, or where seeds change nothing.
        balanced: recall averaged over the classes of the test rows; mean over the seeds.
        interval: 95 % Wilson interval of `accuracy` for this number of test rows.
        setting: hyper-parameters chosen on the validation rows.
        runs: accuracy of each seed.
        top5: the same as `accuracy` for the five best classes; None for a probe that names one.
    """

    encoder: str
    layer: str
    accuracy: float
    spread: float | None
    balanced: float
    interval: tuple[float, float]
    setting: dict[str, float]
    runs: tuple[float, ...]
    top5: float | None = None


@dataclass(frozen=True)
class Scores:
    """What `adapt` returns of classes.

    Attributes:
        rows: the pretrained encoder first, then its baselines, then single depths.
        probe, label: what was learned, and by what.
        train_rows, test_rows: numbers of rows.
        classes: number of classes of the training rows.
        shots: rows a class that were learned from; None for all.
        test: where the test rows come from.
        validation: where the hyper-parameters were chosen.
        seeds: of initialization and of the probes.
        warnings: what the reader of the table should know.
    """

    rows: tuple[Row, ...]
    probe: str
    label: str
    train_rows: int
    test_rows: int
    classes: int
    shots: int | None
    test: str
    validation: str
    seeds: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """Of the pretrained encoder's pooled features."""
        return self.rows[0].accuracy

    @property
    def baseline(self) -> float:
        """The better of the random-initialized encoder and the constant answer, with the same probe and layer."""
        layer = self.rows[0].layer
        return max(row.accuracy for row in self.rows if row.encoder != PRETRAINED and row.layer == layer)

    @property
    def margin(self) -> float:
        """`accuracy` minus `baseline`."""
        return self.accuracy - self.baseline

    def table(self) -> str:
        """Plain text, in percent."""
        head = ("encoder", "layer", "accuracy", "95 % interval", "balanced", "chosen")
        if not self.train_rows:
            head = ("encoder", "", "top-1", "95 % interval", "balanced", "top-5")
        learned = f"{self.train_rows} training rows{f' ({self.shots} a class used)' if self.shots else ''}"
        learned = learned if self.train_rows else "nothing learned"
        notes = [
            f"{self.probe} probe of '{self.label}': {learned}, {self.test_rows} test rows, "
            f"{self.classes} classes, seeds {', '.join(map(str, self.seeds))}",
            f"test rows: {self.test}; chosen on: {self.validation}",
            f"margin over the better baseline: {100 * self.margin:+.1f} points",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join([notes[0], "", *_columns([head, *map(_line, self.rows)]), "", *notes[1:]])

    def to_json(self) -> dict[str, Any]:
        """Everything, with `accuracy`, `baseline` and `margin`, in types that JSON has."""
        return {"accuracy": self.accuracy, "baseline": self.baseline, "margin": self.margin} | asdict(self)


@dataclass(frozen=True)
class RetrievalRow:
    """One line of the table: one direction; shares lie in [0, 1].

    Attributes:
        encoder: `pretrained`, `re-ranked` (its best, ordered anew by the network that sees both sides), `random` (the
            same networks, random-initialized), `raw` (linear maps of raw inputs, learned from training pairs) or
            `chance` (a random order).
        query: name of the encoder whose items ask.
        gallery: name of the one whose items are ranked.
        recall: k -> share of queries with a right item among the k best; mean over the seeds.
        spread: k -> standard deviation over the seeds; None for one.
        interval: k -> 95 % Wilson interval for as many trials as there are independent parts; None for chance.
        median_rank: of the best right item, from 1; mean over the seeds.
    """

    encoder: str
    query: str
    gallery: str
    recall: dict[int, float]
    spread: dict[int, float] | None
    interval: dict[int, tuple[float, float]] | None
    median_rank: float


@dataclass(frozen=True)
class RetrievalScores:
    """What `adapt` returns of retrieval.

    Attributes:
        rows: both directions of the pretrained networks first, then their baselines, then chance.
        pairs: number of test rows.
        items: name of encoder -> number of distinct items, queries and gallery.
        parts: of the test rows that share no item and no group: independent trials.
        test: where the test rows come from.
        seeds: of the random-initialized networks.
        warnings: what the reader of the table should know.
    """

    rows: tuple[RetrievalRow, ...]
    pairs: int
    items: dict[str, int]
    parts: int
    test: str
    seeds: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    def row(self, encoder: str, query: str) -> RetrievalRow:
        """The line of `encoder` in which the items of `query` ask; raises KeyError where there is none."""
        for row in self.rows:
            if (row.encoder, row.query) == (encoder, query):
                return row
        raise KeyError((encoder, query))

    def table(self) -> str:
        """Plain text, in percent."""
        ks = list(self.rows[0].recall)
        head = ("encoder", "query", "gallery", *(f"R@{k}" for k in ks), "median rank")
        lines = []
        for row in self.rows:
            cells = []
            for k in ks:
                cell = f"{100 * row.recall[k]:.1f}"
                if row.spread is not None:
                    cell += f" ± {100 * row.spread[k]:.1f}"
                elif row.interval is not None:
                    cell += f" ({100 * row.interval[k][0]:.1f} – {100 * row.interval[k][1]:.1f})"
                cells.append(cell)
            lines.append((NAMES[row.encoder], row.query, row.gallery, *cells, f"{row.median_rank:g}"))
        sides = " and ".join(f"{number} {name}" for name, number in self.items.items())
        notes = [
            f"retrieval: {self.pairs} pairs of {sides} items, in {self.parts} parts that share nothing",
            f"test rows: {self.test}",
            "of several right items the best counts, a tie counts as wrong; in brackets 95 % intervals, after ± one "
            f"standard deviation over seeds {', '.join(map(str, self.seeds))}",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join([notes[0], "", *_columns([head, *lines]), "", *notes[1:]])

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return asdict(self)


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def score(
    encoder: str, layer: str, guesses: Sequence[Tensor], labels: Tensor, setting: dict[str, float] | None = None
) -> Row:
    """A row from the guesses (M,) of each seed and the true classes (M,)."""
    right = [(guess == labels) for guess in guesses]
    runs = tuple(hits.double().mean().item() for hits in right)
    accuracy = statistics.fmean(runs)
    return Row(
        encoder=encoder,
        layer=layer,
        accuracy=accuracy,
        spread=statistics.stdev(runs) if len(runs) > 1 else None,
        balanced=statistics.fmean(balanced_accuracy(hits, labels) for hits in right),
        interval=wilson(accuracy, len(labels)),
        setting=setting or {},
        runs=runs,
    )


def balanced_accuracy(right: Tensor, labels: Tensor) -> float:
    """Recall of each class that `labels` (M,) has, averaged; `right` is bool (M,)."""
    _, classes, count = labels.unique(return_inverse=True, return_counts=True)
    return (torch.bincount(classes, weights=right.double()) / count).mean().item()


def wilson(share: float, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a share observed on `rows` independent rows (Wilson 1927); 95 % by default."""
    center = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return max(0.0, center - half), min(1.0, center + half)


def _line(row: Row) -> tuple[str, ...]:
    spread = f" ± {100 * row.spread:.1f}" if row.spread is not None else ""
    low, high = row.interval
    return (
        NAMES[row.encoder],
        "" if row.encoder in (CONSTANT, CHANCE) else row.layer,
        f"{100 * row.accuracy:.1f}{spread}",
        f"{100 * low:.1f} – {100 * high:.1f}",
        f"{100 * row.balanced:.1f}",
        ", ".join(f"{key}={value:g}" for key, value in row.setting.items())
        if row.top5 is None
        else f"{100 * row.top5:.1f}",
    )
