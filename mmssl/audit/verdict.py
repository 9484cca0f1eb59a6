"""The closing line of a run: learned, unmoved, at chance since step s, collapsed, or too few answers to tell.

The records are cut, from the end, into windows of up to 20. In each window the numbers of known chance level are tested
against it, one-sided: a share of right answers (`accuracy`, `ranking`) by its binomial tail, with one trial a row of
the batch, since the views of a row are not independent; an error or loss by Student's t over the records of the window,
whose scatter is the noise. The 1 % of false alarms that is allowed is divided by the number of tests (Bonferroni), so
that a long run at chance stays there. Where a task leaves rows out, as too short, it logs the share of the others as
`valid`: only those are trials, and a record without any is left out.

Where a task logs `relative_error`, its error over that of the best answer which ignores the input, that alone decides:
knowing how frequent each answer is already takes accuracy and loss far from guessing, with colors as with words. The
loss decides only where nothing else has a level: that of embeddings falls by their being close together. Where all are
one point, `spread` says so; where all are of one cluster, or of two that are left of many, `perplexity`; and a loss of
embeddings that has come to its level says that the answer has become the same for all.

Learned means: in the last window a number is better than guessing, *and* better than that of the untrained network,
which the record of step 0 holds. Three comparisons may show it, each one-sided at 1 %: the last window with step 0; the
very rows and draws of step 0 with the trained network, which the last record holds; the last window with the first.
Shares are compared by Fisher's exact test. A head that was not better than guessing when untrained needs no more than
the first; embeddings, which tell much untrained, always do, and where they have not become better the run is `unmoved`,
unless more of the first batch is right now and its rows are too few to tell. Where a queue or a memory holds random
vectors at first, from which any row is told, the records until it is full are left out, and the first window after them
stands for the untrained network. There a loss that falls shows it as well: among the vectors of a network that has
moved on shares of right answers may fall while it learns.

Not better than guessing is `at chance` where the answers would have shown an effect: a fifth of the way from guessing
to all right, in four of five runs. Below that, and for errors below five records, there are too few to tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Literal, NamedTuple

from scipy import stats

from mmssl.audit.conflicts import fiercest
from mmssl.audit.power import more_often_right, tells
from mmssl.audit.windows import (
    FALSE_ALARM,
    MONITOR,
    ROUNDING,
    Record,
    Records,
    Series,
    counted,
    is_share,
    last_of,
    scatter,
    task_of,
)
from mmssl.objectives.base import EMBEDDINGS, VALID, Chance

Outcome = Literal["learned", "unmoved", "at chance", "collapsed", "too few answers to tell", "unknown"]

RELATIVE = "relative_error"
RECORDS = 5  # below which the scatter of an error is not known
# Isotropic embeddings whose rows have a mean cosine c have the spread sqrt(1 - c): 0.1 is c = 0.99, an angle of 8
# degrees between any two rows. Vectors along one line in 100 dimensions or more fall below it as well.
COLLAPSED = 0.1
ONE_CLUSTER = 1.5  # perplexity: that of 86 % of the rows in one cluster and the rest in another
FEW_CLUSTERS, FEWER = 3.0, 3  # perplexity below which two are left, where the untrained network's is so many times it
AT_LEVEL = 0.01  # of a loss, relative
NONE_COUNTS = (
    "valid 0 in all records: every row was left out, as too short or without what the task asks for, and nothing was "
    "learned; read less of a row (data.audio.seconds, data.video.frames), or see what the task leaves out"
)
LINE = 2.0  # effective rank below which features are hardly more than one direction
ONE_VIEW = 2e-4  # times the squared spread: views of a row so near are one, where rows are twice that square apart
LARGEST_Z = 37.0  # the tail beyond it is 0 in double precision


@dataclass(frozen=True)
class Verdict:
    """How one task of a run ended; `str` of it is the closing line.

    Attributes:
        outcome: `unmoved` is better than guessing and no better than untrained; `unknown` where no record can tell.
        reason: the number that decided it, in words.
        task: its name in a combination; empty where the run has one task.
        since: step from which on it holds, for `collapsed` and `at chance` (0: it never left).
        metric: entry of the records that decided it.
        value: its mean over the last window.
        chance: its level of guessing; None for `spread`, which has none.
        untrained: what it was at step 0; None where that was not recorded.
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
    untrained: float | None = None

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
    run = Records.of(history)
    spreads = (key for record in run.steps for key in record if last_of(key) == "spread")
    tasks = dict.fromkeys(task_of(key) for key in (*chance.levels, *spreads))
    # The total of a combination says nothing of any of its tasks.
    apart = [
        task
        for task in tasks
        if not any(other.startswith(f"{task}/" if task else "") for other in tasks if other != task)
    ]
    compare = {task_of(key) for record in run.steps for key in record if last_of(key) == "spread"}
    flat = {task: _flat(history, task) or _one_view(history, task) for task in apart if task in compare}
    return [flat.get(task) or _judge(run, task, chance, rows) for task in apart]


def _judge(run: Records, task: str, chance: Chance, rows: int) -> Verdict:
    spread = Series.of(run, f"{task}/spread" if task else "spread")
    beside = ""
    if spread.windows:
        value = fmean(spread.values[spread.windows[-1]])
        if value < COLLAPSED:
            room = f"spread of the embeddings {value:.3f}, below {COLLAPSED} (1 all over the sphere, 0 a single point; "
            return _collapsed(spread, task, COLLAPSED, f"{room}{_records(spread.windows[-1])})")
        beside = f"; spread of the embeddings {value:.2f}"

    if alike := _all_alike(run, task, chance, compares=bool(spread.windows)):
        return alike
    levels = {key: level for key, level in chance.levels.items() if task_of(key) == task and last_of(key) != "spread"}
    asked = [
        _test(Series.of(run, key, chance.filled.get(key, 0)), level, rows)
        for key, level in sorted(levels.items(), key=_order)
    ]
    every = [test for test in asked if test.zs]
    relative = [test for test in asked if last_of(test.series.key) == RELATIVE and test.series.windows]
    if relative and not any(test.zs for test in relative):
        return relative[0].without_scatter(task)
    tests = [test for test in relative if test.zs]
    tests = tests or [test for test in every if last_of(test.series.key) != "loss"] or every
    if not tests:
        if _none_counts(run, task):
            return Verdict("too few answers to tell", NONE_COUNTS, task)
        return Verdict("unknown", f"no number of known chance level has two records to test{beside}", task)
    alarm = FALSE_ALARM / sum(len(test.zs) for test in tests)
    enough = NormalDist().inv_cdf(1 - alarm)
    better = [test for test in tests if test.zs[-1] > enough]
    for test in better:
        if test.improved() or not test.told_untrained(enough, embeddings=bool(spread.windows)):
            return test.verdict("learned", task, None, beside)
    if better:
        for test in every:
            if last_of(test.series.key) == "loss" and test.series.filled and test.series.rose():
                return test.verdict("learned", task, None, beside)
        series = better[0].series
        start = "" if series.untrained is not None else f", no better than at {series.between(series.windows[0])}"
        return better[0].verdict(better[0].unmoved(), task, None, start + beside)
    left = [test for test in tests if max(test.zs) > enough]
    if not left:
        telling = next((test for test in tests if test.tells(alarm)), None)
        if telling is None:
            return tests[0].verdict("too few answers to tell", task, None, beside)
        return telling.verdict("at chance", task, 0, beside)
    # Of all that left chance, what came back last.
    test = max(left, key=lambda test: test.back(enough))
    best = test.series.windows[test.zs.index(max(test.zs))]
    before = f", after {_number(test.series.mean(best))} at {test.series.between(best)}"
    return test.verdict("at chance", task, test.back(enough), before + beside)


def _none_counts(run: Records, task: str) -> bool:
    """Whether the task says of all records that it left out all rows."""
    key = f"{task}/{VALID}" if task else VALID
    return any(key in record for record in run.steps) and not any(counted(record, key) for record in run.steps)


def _collapsed(series: Series, task: str, line: float, reason: str) -> Verdict:
    """Of what has ended below the line, since when."""
    window = series.windows[-1]
    above = max((i for i in range(window.start) if series.values[i] >= line), default=-1)
    value = fmean(series.values[window])
    return Verdict("collapsed", reason, task, series.steps[above + 1], series.key, value, untrained=series.untrained)


def _all_alike(run: Records, task: str, chance: Chance, compares: bool) -> Verdict | None:
    """A collapse of what is answered: one cluster for all rows, or for each the same answer; None where there is none.

    Embeddings may keep some room in both. A task that assigns rows to clusters of its own logs their `perplexity`. The
    loss of one that compares embeddings is at its level where the answer is the same for all rows: an untrained
    network's, which is far from it, says at least something.
    """
    own = dict.fromkeys(key for record in run.steps for key in record if task_of(key) == task)
    for key in own:
        series = Series.of(run, key)
        if not last_of(key).startswith("perplexity") or not series.windows:
            continue
        value, before, line = fmean(series.values[series.windows[-1]]), "", ONE_CLUSTER
        if series.untrained is not None:
            before = f"and {series.untrained:.1f} untrained; "
            line = max(line, min(FEW_CLUSTERS, series.untrained / FEWER))
        if value < line:
            few = "one cluster" if value < ONE_CLUSTER else "two clusters"
            reason = f"{last_of(key)} {value:.2f}: nearly all rows are of {few} ({before}"
            return _collapsed(series, task, line, f"{reason}{_records(series.windows[-1])})")
    key = f"{task}/loss" if task else "loss"
    series, level = Series.of(run, key, chance.filled.get(key, 0)), chance.levels.get(key)
    if not compares or not level or not series.windows or series.untrained is None:
        return None
    values = series.values[series.windows[-1]]
    near = len(values) >= RECORDS and abs(fmean(values) / level - 1) < AT_LEVEL < abs(series.untrained / level - 1) / 5
    if not near or (_z(series, series.windows[-1], level, 1) or 0.0) > NormalDist().inv_cdf(1 - FALSE_ALARM):
        return None
    reason = (
        f"loss {_number(fmean(values))}, that of the same answer for all rows, {_number(level)}, and was "
        f"{_number(series.untrained)} untrained ({_records(series.windows[-1])})"
    )
    return Verdict("collapsed", reason, task, None, key, fmean(values), level, untrained=series.untrained)


def _flat(history: Sequence[Record], task: str) -> Verdict | None:
    """A collapse that spread and loss of the task do not show; None where there is none.

    Embeddings along a line have whatever spread a last BatchNorm gives them: their effective rank tells. Features of an
    encoder are judged by both, and of tasks alone that compare embeddings: a head may read small differences. Either is
    a collapse only where it was not so untrained.
    """
    own = f"{MONITOR}{task}/" if task else MONITOR
    names = dict.fromkeys(task_of(key) for r in history for key in r if key.startswith(own) and last_of(key) == "rank")
    for name in names:
        seen = [(r["step"], r[f"{name}/rank"], r[f"{name}/spread"]) for r in history if f"{name}/rank" in r]
        step, rank, spread = seen[0]
        embeddings = last_of(name) == EMBEDDINGS
        flat = [_thin(r, rank) and (embeddings or s < min(COLLAPSED, spread / 2)) for _, r, s in seen]
        if flat[-1]:
            since = max((i for i, one in enumerate(flat) if not one), default=-1) + 1
            last, now, room = seen[-1]
            what = "embeddings" if embeddings else f"features of the encoder '{last_of(name)}'"
            reason = (
                f"{what} of effective rank {now:.1f} and spread {room:.3f} at step {last}, "
                f"against {rank:.1f} and {spread:.3f} at step {step}"
            )
            return Verdict("collapsed", reason, task, seen[since][0], f"{name}/rank", now, untrained=rank)
    return None


def _one_view(history: Sequence[Record], task: str) -> Verdict | None:
    """Of views of a row that were one vector in all records: any network tells them, whatever it sees of the row."""
    own = f"{MONITOR}{task}/{EMBEDDINGS}" if task else f"{MONITOR}{EMBEDDINGS}"
    key, room = f"{own}/alignment", f"{own}/spread"
    seen = [(r[key], r[room]) for r in history if key in r and room in r]
    if not seen or any(apart > ONE_VIEW * spread**2 for apart, spread in seen):
        return None
    reason = f"both views of a row are one vector (alignment {seen[-1][0]:.1g}): nothing is asked of what is in it"
    return Verdict("unmoved", reason, task, metric=key, value=seen[-1][0])


def _thin(rank: float, untrained: float) -> bool:
    """Hardly more than one direction is left, or a few of very many."""
    return rank < min(LINE, untrained / 2) or rank < min(2 * LINE, untrained / 10)


class _Test(NamedTuple):
    """One entry of the records against its level: the z of each window."""

    series: Series
    level: float
    rows: int
    zs: list[float]

    def back(self, enough: float) -> int:
        """Step of the first record after which no window was better than chance; 0 where none ever was."""
        last = max((i for i, z in enumerate(self.zs) if z > enough), default=-1)
        return self.series.steps[self.series.windows[last + 1].start] if last >= 0 else 0

    def improved(self) -> bool:
        """Whether the last window is better than step 0 or than the first window, or the rows of step 0 are now."""
        series, window = self.series, self.series.windows[-1]
        before, again = series.untrained, series.again
        if series.rose():
            return True
        if before is None:
            return False
        values = series.values[window]
        if is_share(last_of(series.key)):
            first, answers = series.first_answers(self.rows), series.answers(window, self.rows)
            tails = [more_often_right(series.mean(window), answers, before, first)]
            tails += [] if again is None else [more_often_right(again, first, before, first)]
            return min(tails) < FALSE_ALARM
        if len(values) < 2:
            return False
        single = scatter(values)  # of one record; that of the window's mean is smaller
        gains = [(before - fmean(values)) / (single * math.sqrt(1 + 1 / len(values)))]
        gains += [] if again is None else [(before - again) / (single * math.sqrt(2))]
        return bool(stats.t.sf(max(gains), len(values) - 1) < FALSE_ALARM)

    def unmoved(self) -> Outcome:
        """Of what has not improved: whether it would have been seen, had it."""
        before, again = self.series.untrained, self.series.again
        if self.series.filled and len(self.zs) == 1:
            return "too few answers to tell"
        if before is None or again is None or not is_share(last_of(self.series.key)):
            return "unmoved"
        rose = again > before and not tells(before, self.series.first_answers(self.rows), FALSE_ALARM)
        return "too few answers to tell" if rose else "unmoved"

    def told_untrained(self, enough: float, *, embeddings: bool) -> bool:
        """Whether the untrained network was, or may have been, better than guessing."""
        series = self.series
        if series.untrained is None:  # or it says nothing: the first window stands for it
            return embeddings and (self.zs[0] > enough if len(self.zs) > 1 else bool(series.filled))
        if embeddings:
            return True
        if is_share(last_of(series.key)):
            answers = series.first_answers(self.rows)
            right = math.floor(series.untrained * answers + 1e-6)
            return bool(stats.binom.sf(right - 1, answers, self.level) < FALSE_ALARM)
        return series.untrained < self.level * (1 - ROUNDING)

    def tells(self, false_alarm: float) -> bool:
        """Whether the last window would have shown an effect."""
        window = self.series.windows[-1]
        if is_share(last_of(self.series.key)):
            return tells(self.level, self.series.answers(window, self.rows), false_alarm)
        return window.stop - window.start >= RECORDS

    def without_scatter(self, task: str) -> Verdict:
        """Of an error that one record holds: accuracy, which frequent answers raise, does not stand in for it."""
        value, name = self.series.mean(self.series.windows[-1]), last_of(self.series.key)
        reason = (
            f"{name} {_number(value)} against {_number(self.level)} of the best constant answer, in one record alone; "
            "log more often (training.log_every) or train longer"
        )
        return Verdict("too few answers to tell", reason, task, None, self.series.key, value, self.level)

    def verdict(self, outcome: Outcome, task: str, since: int | None, rest: str) -> Verdict:
        window, z, name = self.series.windows[-1], self.zs[-1], last_of(self.series.key)
        value = self.series.mean(window)
        answers = f", {self.series.answers(window, self.rows)} answers" if is_share(name) else ""
        by = "of the best constant answer" if name == RELATIVE else "by guessing"
        sign = {LARGEST_Z: ">", -LARGEST_Z: "<"}.get(z, "=")
        before, again = self.series.untrained, self.series.again
        untrained = "" if before is None else f" and {_number(before)} untrained"
        same = "" if again is None else f", {_number(again)} on the rows of step 0"
        reason = (
            f"{name} {_number(value)} against {_number(self.level)} {by}{untrained} "
            f"({_records(window)}{answers}, z {sign} {z:.1f}{same}){rest}"
        )
        return Verdict(outcome, reason, task, since, self.series.key, value, self.level, z, before)


def _test(series: Series, level: float, rows: int) -> _Test:
    return _Test(series, level, rows, [z for w in series.windows if (z := _z(series, w, level, rows)) is not None])


def _z(series: Series, window: slice, level: float, rows: int) -> float | None:
    """How much better than its level, or None where there is no scatter to measure it by."""
    values = series.values[window]
    if is_share(last_of(series.key)):
        trials = series.answers(window, rows)
        # Half of the observed count's own probability: the tails to both sides then add up to 1.
        right = math.floor(series.mean(window) * trials + 1e-6)
        tail = stats.binom.sf(right, trials, level) + stats.binom.pmf(right, trials, level) / 2
    elif len(values) > 1:
        error = scatter(values) / math.sqrt(len(values))
        tail = stats.t.sf((level - fmean(values)) / error, len(values) - 1)
    else:
        return None
    return min(max(float(stats.norm.isf(tail)), -LARGEST_Z), LARGEST_Z)


def _order(item: tuple[str, float]) -> bool:
    """Shares first: they say most to a person."""
    return not is_share(last_of(item[0]))


def _records(window: slice) -> str:
    count = window.stop - window.start
    return f"last {count} records" if count > 1 else "the only record"


def _number(value: float) -> str:
    return f"{value:.4g}"
