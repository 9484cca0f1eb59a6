"""The result of every adaptation: a table in which no number is without its baselines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from pydantic import TypeAdapter, ValidationError

from mmssl.adaptation.depths import Depth, compare_depths, draw_depths, sentence_of, spread_of
from mmssl.adaptation.metrics import Metric
from mmssl.errors import RecipeError
from mmssl.ops.intervals import wilson
from mmssl.schema import first_of
from mmssl.shots import shots_in_words, with_rows

PRETRAINED, RANDOM, CONSTANT = "pretrained", "random", "constant"
RERANKED, RAW, CHANCE = "re-ranked", "raw", "chance"
CEILING, MISMATCHED = "ceiling", "mismatched"
BASELESS = (PRETRAINED, RERANKED, CEILING)
"""What is no baseline."""
NAMES = {
    PRETRAINED: "pretrained",
    RERANKED: "pretrained, re-ranked",
    RANDOM: "random-initialized",
    RAW: "linear maps of raw inputs",
    CONSTANT: "constant answer",
    CHANCE: "chance",
    CEILING: "ceiling",
    MISMATCHED: "pretrained, another row's sound",
}
SHOWN = 3  # hyper-parameters of a row that are spelled out


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        encoder: `pretrained`, `re-ranked` (the same, its best candidates ordered anew by the network that sees both
            sides), `random` (the same network, random-initialized), `raw` (linear maps of raw inputs), `constant` (the
            best answer that looks at no row), `chance` (an answer at random), `mismatched` (the pretrained network,
            given one side of another row) or `ceiling` (what no answer can exceed); others are called what they are.
        part: what of it: `pooled` or the depth that was probed; `image to text` of retrieval; else empty.
        metrics: name -> mean over the seeds.
        spread: name -> standard deviation over the seeds; empty for one seed, or where seeds change nothing.
        interval: name -> 95 % Wilson interval of a share, for as many rows as there are independent ones.
        runs: name -> value of each seed.
        setting: hyper-parameters chosen on the validation rows.
        validation: the main metric there, with the first seed; None where nothing was chosen.
    """

    encoder: str
    part: str
    metrics: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    runs: dict[str, tuple[float, ...]] = field(default_factory=dict)
    setting: dict[str, float] = field(default_factory=dict)
    validation: float | None = None

    @classmethod
    def of_seeds(
        cls,
        encoder: str,
        part: str,
        scores: Sequence[Mapping[str, float]],
        *,
        shares: Sequence[str] = (),
        trials: int = 0,
        setting: Mapping[str, float] | None = None,
        validation: float | None = None,
    ) -> Self:
        """From the scores of each seed.

        Args:
            encoder: see the class.
            part: see the class.
            scores: name -> value, a mapping for each seed.
            shares: names of those that have an interval.
            trials: number of independent rows.
            setting: see the class.
            validation: see the class.
        """
        runs = {name: tuple(float(score[name]) for score in scores) for name in scores[0]}
        mean = {name: statistics.fmean(values) for name, values in runs.items()}
        spread = {name: statistics.stdev(values) for name, values in runs.items()} if len(scores) > 1 else {}
        interval = {name: wilson(mean[name], trials) for name in shares}
        return cls(encoder, part, mean, spread, interval, runs, dict(setting or {}), validation)


@dataclass(frozen=True)
class Table:
    """What `mmssl.adapt` returns.

    Attributes:
        rows: the pretrained network first, then its baselines, then single depths.
        metrics: columns; the first is the main one.
        probe, target, label: what was asked, what the rows are labeled with, and the column that says it; the last two
            are empty where no label is read.
        encoder: its name in the run, or both names of a pair; empty for an encoder without a run.
        train_rows, test_rows: numbers of rows; the first is 0 where nothing is learned.
        counts: what else there is, and how many: classes, items ...
        shots: how few rows a class, or which share of all, were learned from; None for all.
        drawn: rows that these were, a seed each.
        test: where the test rows come from.
        validation: where the hyper-parameters were chosen; empty where there are none.
        seeds: of initialization and of the probes.
        notes: how to read the numbers.
        warnings: what the reader of the table should know.
    """

    rows: tuple[Row, ...]
    metrics: tuple[Metric, ...]
    probe: str
    target: str
    label: str
    encoder: str
    train_rows: int
    test_rows: int
    counts: dict[str, int]
    shots: int | str | None
    test: str
    validation: str
    seeds: tuple[int, ...]
    drawn: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def row(self, encoder: str, part: str | None = None) -> Row:
        """The first line of `encoder`, of that part where one is named; raises KeyError where there is none."""
        for row in self.rows:
            if row.encoder == encoder and part in (None, row.part):
                return row
        raise KeyError((encoder, part))

    @property
    def main(self) -> Metric:
        """The metric that choices are made by."""
        return self.metrics[0]

    @property
    def score(self) -> float:
        """The main metric of the first row, of the pretrained network, pooled or in the first direction."""
        return self.rows[0].metrics[self.main.name]

    @property
    def baseline(self) -> float:
        """The best of the baselines, for the same part as `score`; a constant or a chance answer has every part."""
        same = ("", self.rows[0].part)
        return max(r.metrics[self.main.name] for r in self.rows if r.encoder not in BASELESS and r.part in same)

    @property
    def margin(self) -> float:
        """`score` minus `baseline`."""
        return self.score - self.baseline

    @property
    def question(self) -> str:
        """What was asked, for a heading, such as `knn probe of 'shape'`."""
        return f"{self.probe} probe" + (f" of '{self.label}'" if self.label else "")

    @property
    def extent(self) -> str:
        """Numbers of rows, classes ..., for a heading."""
        learned = f"{self.train_rows} training rows" if self.train_rows else "nothing learned"
        if self.shots:
            few = with_rows(shots_in_words(self.shots, "shots"), self.drawn)
            learned += f" ({few})" if isinstance(self.shots, int) else f", {few}"
        counts = [f"{number} {name}" for name, number in self.counts.items()]
        return ", ".join([learned, f"{self.test_rows} test rows", *counts])

    @property
    def gain(self) -> str:
        """`margin` with its unit."""
        unit = "points" if self.main.percent else f"of {self.main.title}"
        return f"{100 * self.margin:+.1f} {unit}" if self.main.percent else f"{self.margin:+.3f} {unit}"

    def depths(self, encoder: str = PRETRAINED) -> list[Depth]:
        """The main metric of each of an encoder's parts, in the order of the rows."""
        name = self.main.name
        return [
            Depth(row.part, row.runs.get(name, (row.metrics[name],)), row.interval.get(name), row.validation)
            for row in self.rows
            if row.encoder == encoder
        ]

    @property
    def depth_sentence(self) -> str:
        """Whether the last layer is the best, and by how much beyond the spread; empty where depths were not probed."""
        pair = compare_depths(self.depths())
        if pair is None:
            return ""
        best, other = pair
        difference = best.mean - other.mean
        return sentence_of(best.name, other.name, difference, spread_of(best, other), percent=self.main.percent)

    def figure(self, path: Path | str | IO[bytes]) -> None:
        """Draw the main metric by depth, with the same network random-initialized and the constant answer.

        Args:
            path: PNG to write, or a file that takes its bytes.

        Raises:
            RecipeError: where depths were not probed.
        """
        curves = {NAMES[name]: self.depths(name) for name in (PRETRAINED, RANDOM) if self.depths(name)}
        if len(self.depths()) < 2:
            raise RecipeError("the figure is of depths, which were not probed; ask for layers (--layers)")
        constants = [row.metrics[self.main.name] for row in self.rows if row.encoder == CONSTANT]
        title = f"{self.question}, {self.main.title}" + (" in %" if self.main.percent else "")
        draw_depths(curves, next(iter(constants), None), path, title=title, percent=self.main.percent)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines as text: encoder, part (where there are any), a column a metric, settings (likewise)."""
        parts, settings = any(row.part for row in self.rows), any(row.setting for row in self.rows)
        head = ["encoder", *(["of"] if parts else []), *(metric.title for metric in self.metrics)]
        lines = []
        for row in self.rows:
            line = [NAMES.get(row.encoder, row.encoder), *([row.part] if parts else [])]
            line += [_cell(metric, row) for metric in self.metrics]
            if settings:
                line.append(_chosen(row.setting))
            lines.append(line)
        return head + (["chosen"] if settings else []), lines

    def summary(self) -> str:
        """One line: the pretrained network and its baselines, in the main metric."""
        name, part = self.main.name, self.rows[0].part
        rows = [row for row in self.rows if row.part in ("", part)]
        unit = " %" if self.main.percent else ""
        parts = [f"{NAMES.get(row.encoder, row.encoder)} {_number(self.main, row.metrics[name])}{unit}" for row in rows]
        return f"{self.question}, {self.main.title}: {', '.join(parts)} ({self.test_rows} test rows)"

    def __str__(self) -> str:
        """Plain text; shares in percent."""
        seeds = ", ".join(map(str, self.seeds))
        spread = f"after ± one standard deviation over seeds {seeds}" if len(self.seeds) > 1 else f"seed {seeds}"
        if any(row.interval for row in self.rows):  # SI-SDR has none
            spread = f"in brackets 95 % intervals, {spread}"
        head, lines = self.cells()
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        printed = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [head, *lines]
        ]
        where = f"test rows: {self.test}" + (f"; chosen on: {self.validation}" if self.validation else "")
        notes = [
            where,
            spread,
            *self.notes,
            *([f"margin over the best baseline: {self.gain}"] if len(self.rows) > 1 else []),
            *(f"warning: {warning}" for warning in self.warnings),
            *([self.depth_sentence] if self.depth_sentence else []),
        ]
        return "\n".join([f"{self.question}: {self.extent}", "", *printed, "", *notes])

    def to_json(self) -> dict[str, Any]:
        """Everything, with `score` and, where there are baselines, `baseline` and `margin`, in types that JSON has."""
        found = {"score": self.score}
        if any(row.encoder not in BASELESS for row in self.rows):
            found |= {"baseline": self.baseline, "margin": self.margin}
        return found | asdict(self) | {"metrics": [metric._asdict() for metric in self.metrics]}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The table that `to_json` wrote.

        Raises:
            ValueError: where it is none.
        """
        try:
            table = TypeAdapter(cls).validate_python(tree)
        except ValidationError as error:
            raise ValueError(first_of(error)) from None
        if not table.rows or not table.metrics:
            raise ValueError("the table has no rows")
        for metric in table.metrics:
            if not all(metric.name in row.metrics for row in table.rows):
                raise ValueError(f"a row has no {metric.name}")
        return table


def _number(metric: Metric, value: float) -> str:
    return f"{100 * value:.1f}" if metric.percent else f"{value:.4g}"


def _chosen(setting: Mapping[str, float]) -> str:
    """Hyper-parameters; of one for each class only between what they lie."""
    if len(setting) <= SHOWN:
        return ", ".join(f"{key}={value:g}" for key, value in setting.items())
    return f"{min(setting.values()):g} to {max(setting.values()):g}, one a class"


def _cell(metric: Metric, row: Row) -> str:
    """The mean, with its deviation over seeds, or else with its interval."""
    text = _number(metric, row.metrics[metric.name])
    if metric.name in row.spread:
        return f"{text} ± {_number(metric, row.spread[metric.name])}"
    if metric.name in row.interval:
        low, high = row.interval[metric.name]
        return f"{text} ({_number(metric, low)} – {_number(metric, high)})"
    return text
