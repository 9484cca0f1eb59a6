"""Rankings without labels on numbers that are known, and their agreement with scores against scipy."""

import math

import pytest
from scipy.stats import kendalltau, spearmanr

from mmssl.comparison.label_free import ALPHA_REQ, LABEL_FREE, LIDAR, RANKME, agreement, rank_by, value_of

RANKS, VIEWED, DECAYS = [4.0, 9.0, 7.0, 2.0], [1.0, 2.0, 3.0, 4.0], [0.2, 1.3, 0.9, 2.5]
TASKS = ("a", "b", "c", "d")


def cells(**changes):
    """Two seeds a task, around the numbers above."""
    numbers = {"effective_rank": RANKS, "lidar": VIEWED, "spectrum_decay": DECAYS} | changes
    found = {}
    for place, task in enumerate(TASKS):
        means = {key: values[place] for key, values in numbers.items() if values is not None}
        found[task] = [{"monitors": {key: mean + shift for key, mean in means.items()}} for shift in (-0.1, 0.1)]
    return found


def test_more_is_better_but_a_decay_is_best_at_one():
    assert rank_by(cells(), TASKS, RANKME) == ["b", "c", "a", "d"]
    assert rank_by(cells(), TASKS, LIDAR) == ["d", "c", "b", "a"]
    assert rank_by(cells(), TASKS, ALPHA_REQ) == ["c", "b", "a", "d"]
    assert value_of(cells(), "b", ALPHA_REQ) == pytest.approx(1.3)


def test_what_was_not_measured_has_no_place():
    few = cells(lidar=None, spectrum_decay=[math.nan, *DECAYS[1:]])
    assert rank_by(few, TASKS, LIDAR) == []
    assert rank_by(few, TASKS, ALPHA_REQ) == ["c", "b", "d"]
    assert value_of(few, "a", LIDAR) is None


@pytest.mark.parametrize("measure", LABEL_FREE)
def test_agreement_is_that_of_scipy_on_the_merits(measure):
    scores = dict(zip(TASKS, (0.3, 0.8, 0.6, 0.5), strict=True))
    merits = {"effective_rank": RANKS, "lidar": VIEWED, "spectrum_decay": [-abs(decay - 1) for decay in DECAYS]}
    found = agreement(cells(), scores, measure)
    tau, own = kendalltau(merits[measure.key], list(scores.values())), list(scores.values())
    assert found == pytest.approx((tau.statistic, spearmanr(merits[measure.key], own).statistic, tau.pvalue, 4))
    turned = agreement(cells(), {task: -score for task, score in scores.items()}, measure)
    assert turned.tau == pytest.approx(-found.tau)


def test_two_tasks_or_equal_ones_say_nothing():
    assert agreement(cells(), {"a": 0.1, "b": 0.2}, RANKME) is None
    assert agreement(cells(), dict.fromkeys(TASKS, 0.5), RANKME) is None
    assert agreement(cells(effective_rank=[3.0] * 4), dict(zip(TASKS, RANKS, strict=True)), RANKME) is None
    assert agreement(cells(), {"a": 0.1, "b": 0.2, "d": 0.05}, RANKME).tasks == 3
