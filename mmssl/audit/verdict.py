"""The closing line of a run: learned, at chance since step s, or collapsed, with the number that decided it.

The records are cut, from the end, into windows of up to 20. In each window the numbers of known chance level are tested
against it, one-sided: a share of right answers (`accuracy`, `ranking`) by its binomial tail, with one trial a row of
the batch, since the views of a row are not independent; an error or loss by Student's t over the records of the window,
whose scatter is the noise. The 1 % of false alarms that is allowed is divided by the number of tests (Bonferroni), so
that a long run at chance stays there.

Where a task logs `relative_error`, its error over that of the best answer which ignores the input, that alone decides:
knowing how frequent each answer is already takes accuracy and loss far from guessing, with colors as with words. The
loss decides only where nothing else has a level: that of embeddings falls by their being close together. Where all are
one point, `spread` says so.

Learned means: in the last window a number is better than guessing. Where embeddings are compared, which log `spread`,
that is not enough: untrained networks already find the other view of a picture far more often than guessing does. There
it has to be better than in the first window, unless that was at chance, and where it is not the run is `unmoved`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any, Literal, NamedTuple

from scipy import stats

from mmssl.audit.conflicts import fiercest
from mmssl.objectives.base import Chance

Record = Mapping[str, Any]
Outcome = Literal["learned", "unmoved", "at chance", "collapsed", "unknown"]

RELATIVE = "relative_error"
WINDOW = 20  # records at most
FALSE_ALARM = 0.01  # how often a run at chance is said to have left it, if only for a while
# Isotropic embeddings whose rows have a mean cosine c have the spread sqrt(1 - c): 0.1 is c = 0.99, an angle of 8
# degrees between any two rows. Vectors along one line in 100 dimensions or more fall below it as well.
COLLAPSED = 0.1
ROUNDING = 1e-5  # of float32 sums, relative: a loss that says nothing differs by less from its level
LARGEST_Z = 37.0  # the tail beyond it is 0 in double precision


@dataclass(frozen=True)
class Verdict:
    """How one task of a run ended; `str` of it is the closing line.

    Attributes:
        outcome: `unmoved` is better than guessing and no better than at first; `unknown` where the records cannot tell.
        reason: the number that decided it, in words.
        task: its name in a combination; empty where the run has one task.
        since: step from which on it holds, for `collapsed` and `at chance` (0: it never left).
        metric: entry of the records that decided it.
        value: its mean over the last window.
        chance: its level of guessing; None for `spread`, which has none.
        z: how far `value` is better than `chance`, as standard deviations of a normal of the same tail.
    """

    outcome: Outcome
    reason: str
    task: str = ""
    since: int | None = None
    metric: str | None = None
    value: float | None = None
    chance: float | None = None
    z: float | None = None

    def __str__(self) -> str:
        task = f"{self.task}: " if self.task else ""
        since = "" if self.since is None else f" since step {self.since}"
        return f"{task}{self.outcome}{since}: {self.reason}"


def closing_lines(history: Sequence[Record], chance: Chance, rows: int) -> list[str]:
    """What the console says when a run has ended; arguments as for `judge`."""
    fight = fiercest(history)
    return [f"verdict: {verdict}" for verdict in judge(history, chance, rows)] + [f"conflict: {fight}"] * bool(fight)


def judge(history: Sequence[Record], chance: Chance, rows: int) -> list[Verdict]:
    """One verdict a task, in the order of `chance`.

    Args:
        history: the records of metrics.jsonl, those of earlier parts of a resumed run included.
        chance: of the objective with global batches of `rows`.
        rows: of the global batch; a share in a record is a share of so many answers.
    """
    spreads = (key for record in history for key in record if _last(key) == "spread")
    tasks = dict.fromkeys(_task(key) for key in (*chance.levels, *spreads))
    # The total of a combination says nothing of any of its tasks.
    apart = [
        task
        for task in tasks
        if not any(other.startswith(f"{task}/" if task else "") for other in tasks if other != task)
    ]
    return [_judge(history, task, chance, rows) for task in apart]


def _judge(history: Sequence[Record], task: str, chance: Chance, rows: int) -> Verdict:
    spread = _Series.of(history, f"{task}/spread" if task else "spread")
    spread_now = ""
    if spread.windows:
        value = fmean(spread.values[spread.windows[-1]])
        if value < COLLAPSED:
            return _collapsed(spread, task, value)
        spread_now = f"; spread of the embeddings {value:.2f}"

    levels = {key: level for key, level in chance.levels.items() if _task(key) == task and _last(key) != "spread"}
    every = [_test(_Series.of(history, key), level, rows) for key, level in sorted(levels.items(), key=_order)]
    every = [test for test in every if test.zs]
    relative = [test for test in every if _last(test.series.key) == RELATIVE]
    tests = relative or [test for test in every if _last(test.series.key) != "loss"] or every
    if not tests:
        return Verdict("unknown", f"no number of known chance level has two records to test{spread_now}", task)
    enough = NormalDist().inv_cdf(1 - FALSE_ALARM / sum(len(test.zs) for test in tests))
    better = [test for test in tests if test.zs[-1] > enough]
    for test in better:
        # An untrained head says nothing; untrained embeddings, which have a spread, already tell much.
        if not spread.windows or test.zs[0] <= enough or len(test.zs) == 1 or test.series.improved():
            return test.verdict("learned", task, None, spread_now)
    if better:
        start = f", no better than at {better[0].series.between(better[0].series.windows[0])}"
        return better[0].verdict("unmoved", task, None, start + spread_now)
    left = [test for test in tests if max(test.zs) > enough]
    if not left:
        return tests[0].verdict("at chance", task, 0, spread_now)
    # Of all that left chance, what came back last.
    test = max(left, key=lambda test: test.back(enough))
    best = test.series.windows[test.zs.index(max(test.zs))]
    before = f", after {_number(fmean(test.series.values[best]))} at {test.series.between(best)}"
    return test.verdict("at chance", task, test.back(enough), before + spread_now)


def _collapsed(spread: _Series, task: str, value: float) -> Verdict:
    window = spread.windows[-1]
    above = max((i for i in range(window.start) if spread.values[i] >= COLLAPSED), default=-1)
    reason = (
        f"spread of the embeddings {value:.3f}, below {COLLAPSED} (1 all over the sphere, 0 a single point; "
        f"{_records(window)})"
    )
    return Verdict("collapsed", reason, task, spread.steps[above + 1], spread.key, value)


class _Series(NamedTuple):
    """The finite values of one entry of the records, and its windows from first to last."""

    key: str
    steps: list[int]
    values: list[float]
    windows: list[slice]

    @classmethod
    def of(cls, history: Sequence[Record], key: str) -> _Series:
        kept = [(record["step"], float(record[key])) for record in history if math.isfinite(record.get(key, math.nan))]
        # Half of a short run, for a loss that still moves; at least five records, to know their scatter.
        size = min(WINDOW, max(5, math.ceil(len(kept) / 2)))
        stops = sorted(range(len(kept), 0, -size))
        if len(stops) > 1 and stops[0] < 3:
            del stops[0]  # one or two left over at the beginning go to the first window
        windows = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
        return cls(key, [step for step, _ in kept], [value for _, value in kept], windows)

    def between(self, window: slice) -> str:
        return f"steps {self.steps[window][0]} to {self.steps[window][-1]}"

    def improved(self) -> bool:
        """Whether the last window is better than the first, by Welch's test."""
        if len(self.windows) < 2:
            return False
        first, last = (
            (fmean(values), _scatter(values), len(values))
            for values in (self.values[self.windows[0]], self.values[self.windows[-1]])
        )
        better = "greater" if _is_share(_last(self.key)) else "less"
        tail = stats.ttest_ind_from_stats(*last, *first, equal_var=False, alternative=better).pvalue
        return bool(tail < FALSE_ALARM)


class _Test(NamedTuple):
    """One entry of the records against its level: the z of each window."""

    series: _Series
    level: float
    rows: int
    zs: list[float]

    def back(self, enough: float) -> int:
        """Step of the first record after which no window was better than chance; 0 where none ever was."""
        last = max((i for i, z in enumerate(self.zs) if z > enough), default=-1)
        return self.series.steps[self.series.windows[last + 1].start] if last >= 0 else 0

    def verdict(self, outcome: Outcome, task: str, since: int | None, rest: str) -> Verdict:
        window, z, name = self.series.windows[-1], self.zs[-1], _last(self.series.key)
        value = fmean(self.series.values[window])
        answers = f", {self.rows * (window.stop - window.start)} answers" if _is_share(name) else ""
        by = "of the best constant answer" if name == RELATIVE else "by guessing"
        sign = {LARGEST_Z: ">", -LARGEST_Z: "<"}.get(z, "=")
        reason = (
            f"{name} {_number(value)} against {_number(self.level)} {by} "
            f"({_records(window)}{answers}, z {sign} {z:.1f}){rest}"
        )
        return Verdict(outcome, reason, task, since, self.series.key, value, self.level, z)


def _test(series: _Series, level: float, rows: int) -> _Test:
    return _Test(series, level, rows, [z for w in series.windows if (z := _z(series, w, level, rows)) is not None])


def _z(series: _Series, window: slice, level: float, rows: int) -> float | None:
    """How much better than its level, or None where there is no scatter to measure it by."""
    values = series.values[window]
    if _is_share(_last(series.key)):
        trials = rows * len(values)
        # Half of the observed count's own probability: the tails to both sides then add up to 1.
        right = math.floor(fmean(values) * trials + 1e-6)
        tail = stats.binom.sf(right, trials, level) + stats.binom.pmf(right, trials, level) / 2
    elif len(values) > 1:
        error = _scatter(values) / math.sqrt(len(values))
        tail = stats.t.sf((level - fmean(values)) / error, len(values) - 1)
    else:
        return None
    return min(max(float(stats.norm.isf(tail)), -LARGEST_Z), LARGEST_Z)


def _scatter(values: Sequence[float]) -> float:
    return max(stdev(values), ROUNDING * max(1.0, *map(abs, values)))


def _is_share(name: str) -> bool:
    return name.startswith(("accuracy", "ranking"))


def _order(item: tuple[str, float]) -> bool:
    """Shares first: they say most to a person."""
    return not _is_share(_last(item[0]))


def _task(key: str) -> str:
    return key.rpartition("/")[0]


def _last(key: str) -> str:
    return key.rpartition("/")[2]


def _records(window: slice) -> str:
    count = window.stop - window.start
    return f"last {count} records" if count > 1 else "the only record"


def _number(value: float) -> str:
    return f"{value:.4g}"
