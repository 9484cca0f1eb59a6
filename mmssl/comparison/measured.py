"""What the cells of a comparison say, as numbers: of each line, at each depth, and next to another line."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from mmssl.adaptation.features import POOLED
from mmssl.comparison.cells import cells_of, read_answers, read_cell
from mmssl.comparison.label_free import LABEL_FREE, RANKME, Agreement, LabelFree, agreement, rank_by
from mmssl.comparison.monitors import Answered
from mmssl.comparison.plan import Plan
from mmssl.ops.intervals import mean_interval, paired_interval
from mmssl.shots import shots_in_words, with_rows


class Difference(NamedTuple):
    """Of two lines: the mean over seeds, and its 95 % interval over seeds and groups of test rows."""

    mean: float
    low: float
    high: float

    @property
    def told(self) -> bool:
        """Whether the two can be told apart."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Measured:
    """The cells that are there, read as a table.

    Attributes:
        plan: what was compared.
        out: the folder.
        cells: line -> what was measured, a seed each.
        answers: likewise, what each test row was answered.
        audits: line -> `verdict`, `sentence` and `text` of its audit.
    """

    plan: Plan
    out: Path
    cells: dict[str, list[dict[str, Any]]]
    answers: dict[str, list[Answered]]
    audits: dict[str, dict[str, str]]
    _differences: dict[tuple[Any, ...], Difference] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def read(cls, out: str | Path) -> Self:
        """What a folder holds so far; raises RunError where it is none."""
        out = Path(out)
        plan = Plan.read(out)
        cells: dict[str, list[dict[str, Any]]] = {}
        answers: dict[str, list[Answered]] = {}
        audits: dict[str, dict[str, str]] = {}
        for cell in cells_of(plan):
            found = read_cell(out, cell) if cell.rate is None else None
            if found is not None and cell.audit:
                audits[cell.line] = found["audit"]
            elif found is not None and "failed" not in found:
                cells.setdefault(cell.line, []).append(found)
                answers.setdefault(cell.line, []).append(read_answers(out, cell))
        return cls(plan, out, cells, answers, audits)

    @property
    def measures(self) -> list[str]:
        """What was asked, in order; empty where there are no labels."""
        return list(next((cells[0]["scores"] for cells in self.cells.values() if "scores" in cells[0]), {}))

    @property
    def main(self) -> str:
        """The measure that tasks are ranked by, the probe of the fewest labels."""
        probed = [measure for measure in self.measures if measure.startswith(self.plan.probe)]
        return (probed or self.measures)[0]

    def named(self, measure: str) -> str:
        """As it is printed: of a share of the labels with the rows that it is."""
        cells = [cell for cells in self.cells.values() for cell in cells]
        return with_rows(measure, [rows for cell in cells for rows in cell.get("drawn", {}).get(measure, [])])

    @property
    def asked(self) -> str:
        """The main measure as it is printed."""
        return self.named(self.main)

    def judge(self, measure: str) -> str:
        """The measure whose validation rows decide for `measure`: of the same probe, that with the most labels.

        Ten labels a class leave two a class to choose a depth by, which is chance.
        """
        most = f"{self.plan.probe}, {shots_in_words(self.plan.shots[-1])}" if self.plan.shots else ""
        return most if measure.startswith(f"{self.plan.probe}, ") and most in self.measures else measure

    def depth(self, line: str, measure: str) -> str:
        """The depth that is best on validation rows, averaged over the seeds: of training rows, never of test rows."""
        judge = self.judge(measure)
        depths = self.cells[line][0]["validation"][judge]
        scores = {
            depth: statistics.fmean(cell["validation"][judge][depth] for cell in self.cells[line])
            for depth, score in depths.items()
            if score is not None
        }
        return max(scores, key=lambda depth: scores[depth]) if scores else POOLED

    def values(self, line: str, measure: str, depth: str | None = None) -> list[float]:
        """The main metric of the test rows, a seed each, at a depth, or else at the best one."""
        depth = self.depth(line, measure) if depth is None else depth
        return [cell["scores"][measure][depth] for cell in self.cells[line]]

    def difference(self, line: str, other: str, measure: str) -> Difference:
        """`line` minus `other`, seed by seed, each at its own best depth; a line of one seed is taken as often."""
        return self._difference((line, self.depth(line, measure)), (other, self.depth(other, measure)), measure)

    def _difference(self, first: tuple[str, str], second: tuple[str, str], measure: str) -> Difference:
        """As `difference`, of lines at depths; drawn once, for table, sentence and page ask for the same."""
        if (asked := (first, second, measure)) not in self._differences:
            self._differences[asked] = self._draw_difference(first, second, measure)
        return self._differences[asked]

    def _draw_difference(self, first: tuple[str, str], second: tuple[str, str], measure: str) -> Difference:
        values = [self.values(line, measure, depth) for line, depth in (first, second)]
        seeds = max(map(len, values))
        pairs = [np.array(own if len(own) > 1 else own * seeds)[:seeds] for own in values]
        shared = min(map(len, pairs))
        mean = float((pairs[0][:shared] - pairs[1][:shared]).mean())
        rows = [self._right(line, f"{measure}|{depth}") for line, depth in (first, second)]
        rows = [(own if len(own) > 1 else own * seeds)[:shared] for own in rows]
        if all(rows) and rows[0][0].shape == rows[1][0].shape:
            low, high = paired_interval(np.stack(rows[0]), np.stack(rows[1]), self.answers[first[0]][0].get("group"))
        else:
            low, high = mean_interval(pairs[0][:shared] - pairs[1][:shared])
        return Difference(mean, low, high)

    def _right(self, line: str, key: str) -> list[np.ndarray]:
        """Which test rows were answered right, bool (M,), a seed each; empty where that cannot be said."""
        answers = self.answers[line]
        return [one[key] == one["truth"] for one in answers] if all(key in one for one in answers) else []

    def confusion(self, line: str, measure: str) -> tuple[np.ndarray, list[str]] | None:
        """Share of each class (rows) that is taken for each (columns), (C, C), over all seeds; and their names."""
        key = f"{measure}|{self.depth(line, measure)}"
        answers = self.answers[line]
        if not answers or not all(key in one for one in answers):
            return None
        names = [str(name) for name in answers[0]["names"]]
        counts = np.zeros((len(names), len(names)))
        for one in answers:
            np.add.at(counts, (one["truth"], one[key]), 1)
        return counts / counts.sum(1, keepdims=True).clip(1), names

    @cached_property
    def ranked(self) -> list[str]:
        """Tasks or runs, the best first, on validation rows, or without labels by the effective rank (RankMe)."""
        lines = [line for line in (*self.plan.tasks, *self.plan.runs) if line in self.cells]
        if not self.measures:
            return rank_by(self.cells, lines, RANKME)
        return sorted(lines, key=lambda line: -self._validation(line))

    @cached_property
    def agreements(self) -> dict[LabelFree, Agreement]:
        """How well each ranking without labels agreed with the probes'; empty where that cannot be said."""
        if not self.measures:
            return {}
        scores = {line: statistics.fmean(self.values(line, self.main)) for line in self.ranked}
        found = {measure: agreement(self.cells, scores, measure) for measure in LABEL_FREE}
        return {measure: one for measure, one in found.items() if one is not None}

    def constant(self, measure: str) -> float:
        """The main metric of the best answer that looks at no row."""
        return float(next(iter(self.cells.values()))[0]["constant"][measure])

    def _validation(self, line: str) -> float:
        judge, depth = self.judge(self.main), self.depth(line, self.main)
        scores = [cell["validation"][judge][depth] for cell in self.cells[line]]
        if None in scores:
            return statistics.fmean(self.values(line, self.main))
        return statistics.fmean(scores)

    @property
    def percent(self) -> bool:
        """Whether the main metric is a share."""
        cells = next(iter(self.cells.values()))
        return bool(cells[0].get("metric", {}).get("percent", True))
