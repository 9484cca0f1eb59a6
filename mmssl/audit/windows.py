"""The records of a run as windows of each of its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy import stats

from mmssl.objectives.base import VALID
from mmssl.training.monitors import MONITOR as MONITORED
from mmssl.training.monitors import SAME_ROWS

Record = Mapping[str, Any]

MONITOR, AGAIN = f"{MONITORED}/", f"{SAME_ROWS}/"
WINDOW = 20  # records at most
FALSE_ALARM = 0.01  # how often a run at chance is said to have left it, if only for a while
ROUNDING = 1e-5  # of float32 sums, relative: a loss that says nothing differs by less from its level


class Records(NamedTuple):
    """The records of the steps; what the untrained network scored on the first batch, and the trained one; or empty."""

    steps: Sequence[Record]
    untrained: Record
    again: Record

    @classmethod
    def of(cls, history: Sequence[Record]) -> Records:
        """Of the records of metrics.jsonl."""
        last = history[-1] if history else {}
        return cls(
            [{k: v for k, v in r.items() if not k.startswith((AGAIN, MONITOR))} for r in history if r["step"] > 0],
            next((record for record in history if record["step"] == 0), {}),
            {key.removeprefix(AGAIN): value for key, value in last.items() if key.startswith(AGAIN)},
        )


class Series(NamedTuple):
    """The finite values of one entry of the records, and its windows from first to last.

    A value is a mean over the rows that count: `counted` is their share in each record, and `counted_first` in the
    first batch; 1 where a task leaves out no rows.
    """

    key: str
    steps: list[int]
    values: list[float]
    counted: list[float]
    windows: list[slice]
    untrained: float | None
    again: float | None
    counted_first: float = 1.0
    filled: int = 0

    @classmethod
    def of(cls, run: Records, key: str, filled: int = 0) -> Series:
        """Of the entry `key`, without the first steps and what is compared with them where those say nothing.

        Args:
            run: the records.
            key: of them.
            filled: steps; see `Chance`.
        """
        steps = (record for record in run.steps if record["step"] > filled)
        kept = [
            (record["step"], value, share)
            for record in steps
            if (value := finite(record, key)) is not None and (share := counted(record, key)) > 0
        ]
        # Half of a short run, for a loss that still moves; at least five records, to know their scatter.
        size = min(WINDOW, max(5, math.ceil(len(kept) / 2)))
        stops = sorted(range(len(kept), 0, -size))
        if len(stops) > 1 and stops[0] < 3:
            del stops[0]  # one or two left over at the beginning go to the first window
        windows = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
        at, values, shares = (
            [step for step, _, _ in kept],
            [value for _, value, _ in kept],
            [share for *_, share in kept],
        )
        first = counted(run.untrained, key)
        before = (None, None) if filled or not first else (finite(run.untrained, key), finite(run.again, key))
        return cls(key, at, values, shares, windows, *before, first, filled)

    def mean(self, window: slice) -> float:
        """Of a window, over the rows that count."""
        return fmean(self.values[window], self.counted[window])

    def answers(self, window: slice, rows: int) -> int:
        """How many rows count in a window, of `rows` in each record."""
        return round(rows * sum(self.counted[window]))

    def first_answers(self, rows: int) -> int:
        """How many rows count in the first batch."""
        return round(rows * self.counted_first)

    def between(self, window: slice) -> str:
        """The steps of a window, in words."""
        return f"steps {self.steps[window][0]} to {self.steps[window][-1]}"

    def rose(self) -> bool:
        """Whether the last window is better than the first, by Welch's test."""
        if len(self.windows) < 2:
            return False
        first, last = (
            (fmean(values), scatter(values), len(values))
            for values in (self.values[self.windows[0]], self.values[self.windows[-1]])
        )
        better = "greater" if is_share(last_of(self.key)) else "less"
        tail = stats.ttest_ind_from_stats(*last, *first, equal_var=False, alternative=better).pvalue
        return bool(tail < FALSE_ALARM)


def counted(record: Record, key: str) -> float:
    """Share of the rows that an entry is a mean over: what its task logs as `valid`, and 1 where it logs none."""
    value = finite(record, f"{task_of(key)}/{VALID}" if task_of(key) else VALID)
    return 1.0 if value is None else value


def finite(record: Record, key: str) -> float | None:
    """The number of that name; None where it is missing or not finite."""
    value = float(record.get(key, math.nan))
    return value if math.isfinite(value) else None


def scatter(values: Sequence[float]) -> float:
    """Standard deviation, at least that of rounding."""
    return max(stdev(values), ROUNDING * max(1.0, *map(abs, values)))


def is_share(name: str) -> bool:
    """Whether an entry is a share of right answers."""
    return name.startswith(("accuracy", "ranking"))


def task_of(key: str) -> str:
    """`turn` of `turn/accuracy`; empty where a run has one task."""
    return key.rpartition("/")[0]


def last_of(key: str) -> str:
    """`accuracy` of `turn/accuracy`."""
    return key.rpartition("/")[2]
