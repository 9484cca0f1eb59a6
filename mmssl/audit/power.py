"""How surely a share of right answers can be told from another one."""

from __future__ import annotations

import math

from scipy import stats

EFFECT = 0.2  # of the way from guessing to all right: what a run should show at least
POWER = 0.8  # how often it has to be found where it is there


def tells(level: float, answers: int, false_alarm: float) -> bool:
    """Whether so many answers find a share a fifth of the way above `level` in four of five runs.

    One-sided and exact. By guessing one of four, at 1 % of false alarms, that takes about 90 answers; of two, 250.

    Args:
        level: the share by guessing, 0 to 1.
        answers: independent ones.
        false_alarm: how often guessing may be taken for more.
    """
    least = stats.binom.isf(false_alarm, answers, level)
    return bool(stats.binom.sf(least, answers, level + EFFECT * (1 - level)) >= POWER)


def more_often_right(share: float, answers: int, before: float, answers_before: int) -> float:
    """Probability of such a rise, or a larger one, between two equal networks: Fisher's exact test, one-sided.

    Args:
        share: of right answers now.
        answers: of which it is a share.
        before: the share before.
        answers_before: of which that was one.
    """
    now, then = (math.floor(p * n + 1e-6) for p, n in ((share, answers), (before, answers_before)))
    table = [[now, answers - now], [then, answers_before - then]]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)
