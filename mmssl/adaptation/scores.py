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


@dataclass(frozen=True)
class Row:
    """One line of the table; shares lie in [0, 1].

    Attributes:
        encoder: `pretrained`, `random` (the same network, random-initialised) or `constant` (the majority class).
        layer: `pooled`, or the depth that was probed.
        accuracy: mean over the seeds.
        spread: standard deviation over the seeds; None for one seed, or where seeds change nothing.
        balanced: recall averaged over the classes of the test rows; mean over the seeds.
        interval: 95 % Wilson interval of `accuracy` for this number of test rows.
        setting: hyper-parameters chosen on the validation rows.
        runs: accuracy of each seed.
    """

    encoder: str
    layer: str
    accuracy: float
    spread: float | None
    balanced: float
    interval: tuple[float, float]
    setting: dict[str, float]
    runs: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """What `adapt` returns.

    Attributes:
        rows: the pretrained encoder first, then its baselines, then single depths.
        probe, label: what was learned, and by what.
        train_rows, test_rows: numbers of rows.
        classes: number of classes of the training rows.
        shots: rows a class that were learned from; None for all.
        test: where the test rows come from.
        validation: where the hyper-parameters were chosen.
        seeds: of initialisation and of the probes.
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
        """The better of the random-initialised encoder and the constant answer, with the same probe and layer."""
        layer = self.rows[0].layer
        return max(row.accuracy for row in self.rows if row.encoder != PRETRAINED and row.layer == layer)

    @property
    def margin(self) -> float:
        """`accuracy` minus `baseline`."""
        return self.accuracy - self.baseline

    def table(self) -> str:
        """Plain text, in percent."""
        head = ("encoder", "layer", "accuracy", "95 % interval", "balanced", "chosen")
        lines = [head, *(_line(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        body = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        learned = f"{self.train_rows} training rows{f' ({self.shots} a class used)' if self.shots else ''}"
        notes = [
            f"{self.probe} probe of '{self.label}': {learned}, {self.test_rows} test rows, "
            f"{self.classes} classes, seeds {', '.join(map(str, self.seeds))}",
            f"test rows: {self.test}; chosen on: {self.validation}",
            f"margin over the better baseline: {100 * self.margin:+.1f} points",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join([notes[0], "", *body, "", *notes[1:]])

    def to_json(self) -> dict[str, Any]:
        """Everything, with `accuracy`, `baseline` and `margin`, in types that JSON has."""
        return {"accuracy": self.accuracy, "baseline": self.baseline, "margin": self.margin} | asdict(self)


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
    centre = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _line(row: Row) -> tuple[str, ...]:
    spread = f" ± {100 * row.spread:.1f}" if row.spread is not None else ""
    low, high = row.interval
    return (
        {PRETRAINED: "pretrained", RANDOM: "random-initialised", CONSTANT: "constant (majority class)"}[row.encoder],
        "" if row.encoder == CONSTANT else row.layer,
        f"{100 * row.accuracy:.1f}{spread}",
        f"{100 * low:.1f} – {100 * high:.1f}",
        f"{100 * row.balanced:.1f}",
        ", ".join(f"{key}={value:g}" for key, value in row.setting.items()),
    )
