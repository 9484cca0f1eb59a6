"""Intervals of shares and of means are those of scipy; those of differences hold the truth as often as they say."""

import math

import numpy as np
import pytest
from scipy import stats

from mmssl.ops.intervals import mean_interval, paired_interval, wilson


@pytest.mark.parametrize("confidence", [0.95, 0.99])
@pytest.mark.parametrize(("right", "trials"), [(0, 30), (1, 9), (256, 1024), (300, 1024), (1024, 1024)])
def test_wilson_is_that_of_scipy(right, trials, confidence):
    expected = stats.binomtest(right, trials).proportion_ci(confidence, method="wilson")
    assert wilson(right / trials, trials, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_of_a_mean_is_that_of_scipy():
    values = np.array([0.3, 0.1, 0.25, 0.6])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((expected.low, expected.high))
    assert mean_interval(values[:1]) == (-math.inf, math.inf)


def test_a_paired_interval_of_one_seed_is_that_of_the_mean_of_the_differences():
    random = np.random.default_rng(0)
    a, b = random.random((1, 400)) < 0.7, random.random((1, 400)) < 0.6
    difference = a[0].astype(float) - b[0]
    low, high = paired_interval(a, b)
    half = 1.96 * difference.std() / 400**0.5
    assert (low, high) == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.01)
    assert paired_interval(a, a) == (0, 0)


def test_rows_of_a_group_are_drawn_together():
    random = np.random.default_rng(0)
    a = np.repeat(random.random((1, 50)) < 0.7, 8, axis=1)
    b = np.zeros_like(a)
    low, high = paired_interval(a, b)
    wide = paired_interval(a, b, np.repeat(np.arange(50), 8))
    assert wide[1] - wide[0] == pytest.approx(8**0.5 * (high - low), rel=0.2)


def test_seeds_that_differ_widen_it():
    equal = np.ones((4, 200))
    zero = np.zeros((4, 200))
    assert paired_interval(equal, zero) == (1, 1)
    low, high = paired_interval(np.stack([np.ones(200), np.zeros(200)] * 2), zero)
    assert low < 0.1
    assert high > 0.9
