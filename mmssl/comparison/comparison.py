"""What came out of a comparison: a table in which every line is next to the untrained network, and one sentence."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mmssl.adaptation.depths import Depth, compare_depths, sentence_of
from mmssl.adaptation.features import POOLED
from mmssl.comparison.label_free import AGREEMENT, LABEL_FREE, LabelFree, rank_by, trust_in_words, value_of
from mmssl.comparison.measure import Cell
from mmssl.comparison.measured import Measured
from mmssl.comparison.notes import notes_of
from mmssl.comparison.plan import NAMED, RAW, SUPERVISED, UNTRAINED

TITLES = {NAMED: "pretrained elsewhere", SUPERVISED: "supervised, same budget"}


@dataclass(frozen=True)
class Comparison(Measured):
    """The cells that are there, read as a table; see `Measured`."""

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

    @cached_property
    def sentence(self) -> str:
        """The answer, which task, at which depth, by how much, how sure, and the next command."""
        if not self.ranked:
            return "nothing was measured yet"
        best = self.ranked[0]
        if not self.measures:
            return (
                f"Without labels {self._firsts()}. That tells collapse, and often not which encoder transfers best, as "
                f"labels of a hundred rows would: {trust_in_words()}. Next: mmssl show {self._run(best)}"
            )
        depth, values = self.depth(best, self.main), self.values(best, self.main)
        seeds = f"{len(values)} seed{'s' * (len(values) > 1)}"
        asked = f"{self.asked[:-1]}, {seeds})" if self.asked.endswith(")") else f"{self.asked} ({seeds})"
        text = f"{title_of(best)}, {_place(depth)}: {self._spread(values)} by {asked}, "
        if UNTRAINED not in self.cells:
            return text + "the untrained network was not measured."
        gain = self.difference(best, UNTRAINED, self.main)
        interval = "one seed tells no spread"
        if math.isfinite(gain.low):
            scale, digits = (100, 1) if self.percent else (1, 3)
            interval = f"95 % interval {scale * gain.low:+.{digits}f} to {scale * gain.high:+.{digits}f}"
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
        if self.constant(self.main) >= statistics.fmean(values):
            text += f" It is not above the answer that looks at nothing, {self._spread([self.constant(self.main)])}."
        if gain.told and gain.mean > 0:
            return f"{text} Next: {self._tuning(best)}, or mmssl export {self._run(best)} --to exported"
        more = "longer runs or more seeds of each" if self.plan.runs else "a larger --budget or more --seeds"
        return f"{text} Next: the same with {more}, and another --out"

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
        head = ["", *(title for one in self.measures for title in (self.named(one), f"{one}, best depth"))]
        labeled = bool(self.measures)
        titles = [measure.title for measure in LABEL_FREE]
        head += ["over untrained"] * labeled + [*titles, "samples", "minutes", "GiB", "learning rate"]
        head += ["pretext task", *["audit"] * self.plan.audit]
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
            row += [self.audits.get(line, {}).get("verdict", "")] * self.plan.audit
            lines.append(row)
        if labeled:
            lines.append(
                ["constant answer"]
                + [text for measure in self.measures for text in (self._spread([self.constant(measure)]), "")]
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
        return notes_of(self)

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
