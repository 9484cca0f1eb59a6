"""What came out of a comparison: a table in which every line is next to the untrained network, and one sentence."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmssl.adaptation.depths import Depth, compare_depths, sentence_of
from mmssl.adaptation.features import POOLED
from mmssl.audit.own_files import GRADIENTS
from mmssl.comparison.cells import cells_of, read_answers, read_cell
from mmssl.comparison.label_free import LABEL_FREE, LIDAR, RANKME, Agreement, LabelFree, agreement, rank_by, value_of
from mmssl.comparison.measure import Cell
from mmssl.comparison.monitors import Answered
from mmssl.comparison.plan import NAMED, RAW, SUPERVISED, UNTRAINED, Plan
from mmssl.ops.intervals import mean_interval, paired_interval

AGREEMENT = "agreement with probes"
TITLES = {NAMED: "pretrained elsewhere", SUPERVISED: "supervised, same budget"}


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
class Comparison:
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
    def read(cls, out: str | Path) -> Comparison:
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

    def judge(self, measure: str) -> str:
        """The measure whose validation rows decide for `measure`: of the same probe, that with the most labels.

        Ten labels a class leave two a class to choose a depth by, which is chance.
        """
        most = f"{self.plan.probe}, {max(self.plan.shots, default=0)} a class"
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

    def depth_sentence(self, line: str, measure: str) -> str:
        """Whether the last layer is a line's best, and by how much beyond the spread; empty for a line of one depth."""
        cells, depths = self.cells[line], list[Depth]()
        for name in cells[0]["scores"][measure]:
            known = [cell["validation"][self.judge(measure)][name] for cell in cells]
            validation = None if None in known else statistics.fmean(known)
            depths.append(Depth(name, tuple(self.values(line, measure, name)), None, validation))
        pair = compare_depths(depths)
        if pair is None:
            return ""
        best, other = (depth.name for depth in pair)
        found = self._difference((line, best), (line, other), measure)
        half = (found.high - found.low) / 2
        return f"{title_of(line)}: {sentence_of(best, other, found.mean, half, percent=self.percent)}"

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

    @cached_property
    def sentence(self) -> str:
        """The answer, which task, at which depth, by how much, how sure, and the next command."""
        if not self.ranked:
            return "nothing was measured yet"
        best = self.ranked[0]
        if not self.measures:
            return (
                f"Without labels {self._firsts()}. That tells collapse, and often not which encoder transfers best; "
                f"labels of a hundred rows would. Next: mmssl show {self._run(best)}"
            )
        depth, values = self.depth(best, self.main), self.values(best, self.main)
        seeds = f"{len(values)} seed{'s' * (len(values) > 1)}"
        text = f"{title_of(best)}, {_place(depth)}: {self._spread(values)} by {self.main} ({seeds}), "
        if UNTRAINED not in self.cells:
            return text + "the untrained network was not measured."
        gain = self.difference(best, UNTRAINED, self.main)
        interval = "one seed tells no spread"
        if math.isfinite(gain.low):
            interval = f"95 % interval {self._number(gain.low)} to {self._number(gain.high)}"
        if not gain.told:
            text += f"which cannot be told from the untrained network ({self._number(gain.mean)}, {interval})."
        else:
            word = "above" if gain.mean > 0 else "below"
            text += f"{self._number(abs(gain.mean), sign=False)} {word} the untrained network ({interval})."
        equal = [other for other in self.ranked[1:] if not self.difference(best, other, self.main).told]
        if equal:
            text += f" Not to be told from it: {', '.join(map(title_of, equal))}."
        if RAW in self.cells and not (raw := self.difference(best, RAW, self.main)).low > 0:
            word = "is below" if raw.high < 0 else "cannot be told from"
            text += f" It {word} the raw input."
        if gain.told and gain.mean > 0:
            return f"{text} Next: {self._tuning(best)}, or mmssl export {self._run(best)} --to exported"
        return f"{text} Next: the same with a larger --budget or more --seeds, and another --out"

    def _firsts(self) -> str:
        """Who comes first by which measure."""
        firsts: dict[str, list[str]] = {}
        for measure in LABEL_FREE:
            if order := rank_by(self.cells, self.ranked, measure):
                told = f"{measure.title} ({value_of(self.cells, order[0], measure):.{measure.digits}f})"
                firsts.setdefault(order[0], []).append(told)
        return "; ".join(f"{title_of(line)} comes first by {', '.join(by)}" for line, by in firsts.items())

    def _run(self, line: str) -> str:
        return str(self.cells[line][0].get("run", self.out / "runs" / Cell(line, self.plan.seeds[0]).name))

    def _tuning(self, line: str) -> str:
        """The command that tunes the encoder of a line on the labels, and keeps what answers."""
        words = ["mmssl", "adapt", self._run(line), "--data", self.plan.rows.source, "--label", str(self.plan.label)]
        words += ["--target", self.plan.target] if self.plan.target else []
        return shlex.join([*words, "--probe", "finetune", "--save", "tuned"])

    def _number(self, value: float, *, sign: bool = True) -> str:
        text = f"{100 * value:+.1f} points" if self.percent else f"{value:+.3f}"
        return text if sign else text.lstrip("+")

    def _spread(self, values: Sequence[float]) -> str:
        scale, digits, unit = (100, 1, " %") if self.percent else (1, 3, "")
        mean = f"{scale * statistics.fmean(values):.{digits}f}"
        return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}{unit}" if len(values) > 1 else f"{mean}{unit}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines, as text."""
        head = ["", *(title for measure in self.measures for title in (measure, f"{measure}, best depth"))]
        labeled = bool(self.measures)
        titles = [measure.title for measure in LABEL_FREE]
        head += ["over untrained"] * labeled + [*titles, "samples", "minutes", "GiB", "learning rate"]
        head += ["pretext task", "audit"]
        baselines = [line for line in self.plan.lines if line in self.cells and line not in self.ranked]
        lines = []
        for line in (*self.ranked, *baselines):
            cells = self.cells[line]
            row = [title_of(line)]
            for measure in self.measures:
                if measure not in cells[0].get("scores", {}):
                    row += ["", ""]
                    continue
                depth = self.depth(line, measure)
                row += [self._spread(self.values(line, measure, POOLED))]
                row += [f"{self._spread(self.values(line, measure, depth))} ({_place(depth)})"]
            if labeled:
                row.append(self._gain(line))
            costs = [cell.get("cost", {}) for cell in cells]
            row += [self._label_free(line, measure) for measure in LABEL_FREE]
            row.append(_mean([cost.get("samples") for cost in costs], "{:,.0f}"))
            row.append(_mean([cost["seconds"] / 60 if "seconds" in cost else None for cost in costs], "{:.1f}"))
            row.append(_mean([cost.get("memory_gib") for cost in costs], "{:.2f}"))
            row.append(_mean([cells[0].get("lr")], "{:.2g}"))
            words = [verdict["outcome"] for cell in cells for verdict in cell.get("verdict", [])]
            row.append(" / ".join(dict.fromkeys(words)))
            row.append(self.audits.get(line, {}).get("verdict", ""))
            lines.append(row)
        if labeled:
            constants = next(iter(self.cells.values()))[0]["constant"]
            lines.append(
                ["constant answer"]
                + [text for measure in self.measures for text in (self._spread([constants[measure]]), "")]
                + [""] * (len(head) - 1 - 2 * len(self.measures))
            )
        if self.agreements:
            found = [self.agreements.get(measure) for measure in LABEL_FREE]
            told = [f"{one.tau:+.2f}" if one else "" for one in found]
            lines.append([AGREEMENT, *[""] * (head.index(titles[0]) - 1), *told])
            lines[-1] += [""] * (len(head) - len(lines[-1]))
        return head, lines

    def _label_free(self, line: str, measure: LabelFree) -> str:
        """The number, and of tasks their place by it."""
        value = value_of(self.cells, line, measure)
        if value is None:
            return ""
        order = rank_by(self.cells, self.ranked, measure)
        return f"{value:.{measure.digits}f}" + (f" ({order.index(line) + 1})" if line in order else "")

    def _gain(self, line: str) -> str:
        if line == UNTRAINED or UNTRAINED not in self.cells:
            return ""
        gain = self.difference(line, UNTRAINED, self.main)
        scale, digits = (100, 1) if self.percent else (1, 3)
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in gain)
        return f"{mean} ({low} to {high})" if math.isfinite(gain.low) else mean

    def notes(self) -> list[str]:
        """How to read the table."""
        plan = self.plan
        cells = [cell for cells in self.cells.values() for cell in cells]
        whole = [cell for cell in cells_of(plan) if cell.whole]
        notes = [f"{len(cells)} of {len(whole)} cells are there"] if len(cells) < len(whole) else []
        if self.measures:
            train, test = cells[0]["rows"][self.measures[0]]
            if plan.test is None and cells[0]["test"].startswith("a fifth of "):
                notes.append("the tasks saw the test rows, without labels: name other rows with test (--test)")
            judge = self.judge(self.main)
            rows = "groups of test rows" if plan.groups else "test rows"
            spread, paired, over = "", "", f"{rows}, for one seed tells no spread"
            if len(plan.seeds) > 1:
                spread = f"± one standard deviation over seeds {', '.join(map(str, plan.seeds))}; "
                paired, over = ", paired by seed", f"seeds and {rows}"
            notes += [
                f"test rows: {cells[0]['test']} ({test}); probes learn from at most {train} training rows",
                f"{spread}best depths, and the order of the tasks, are chosen on validation rows"
                f"{f' of {judge}' * (judge != self.main)}, which are training rows",
                f"over untrained: {self.main}, each at its best depth{paired}; in brackets 95 % intervals over {over}",
            ]
            if plan.tuned:
                factors = ", ".join(f"{rate:g}" for rate in plan.rates)
                notes.append(
                    f"learning rates: the recipe's times {factors}, by kNN on held-out training rows after a quarter "
                    "of the budget"
                )
            notes += sorted({warning for cell in cells for warning in cell.get("warnings", [])})
        notes += self._notes_without_labels()
        notes += [f"audit: {audit['sentence']}" for audit in self.audits.values() if audit["verdict"] != GRADIENTS]
        if plan.tasks:
            notes.append(
                f"{plan.batch} encoder samples a step: rows through the trained encoder, by floating-point operations"
            )
        return [*notes, *plan.notes]

    def _notes_without_labels(self) -> list[str]:
        notes = [
            "RankMe and LiDAR: the more the better; alpha-ReQ: the nearer to 1; in brackets the place among the tasks"
        ]
        if not any(value_of(self.cells, line, LIDAR) is not None for line in self.cells):
            notes.append(f"LiDAR compares random views of a row, and none were taken of {self.plan.modality}")
        if self.agreements:
            told = [
                f"{measure.title} {one.tau:+.2f} (Spearman {one.rho:+.2f}, p = {one.p:.2f}, {one.tasks} tasks)"
                for measure, one in self.agreements.items()
            ]
            notes.append(f"{AGREEMENT}, Kendall's tau with the order by {self.main}, here: {', '.join(told)}")
        elif self.measures:
            notes.append(f"{AGREEMENT} of rankings without labels takes three tasks that differ")
        return notes

    def __str__(self) -> str:
        """Plain text."""
        head, lines = self.table()
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [head, *lines]]
        return "\n".join([*text, "", *self.notes(), "", self.sentence])

    def markdown(self) -> str:
        """The table for a page of docs."""
        head, lines = self.table()
        rows = [head, ["---"] * len(head), *lines]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def title_of(line: str) -> str:
    """How a line is called in tables."""
    return TITLES.get(line, line.replace("_", " "))


def _place(depth: str) -> str:
    return "last" if depth == POOLED else f"at {depth}"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(statistics.fmean(known)) if known else ""
