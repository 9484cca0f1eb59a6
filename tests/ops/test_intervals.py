"""Intervals of shares are those of scipy."""

import pytest
from scipy import stats

from mmssl.ops.intervals import wilson


@pytest.mark.parametrize("confidence", [0.95, 0.99])
@pytest.mark.parametrize(("right", "trials"), [(0, 30), (1, 9), (256, 1024), (300, 1024), (1024, 1024)])
def test_wilson_is_that_of_scipy(right, trials, confidence):
    expected = stats.binomtest(right, trials).proportion_ci(confidence, method="wilson")
    assert wilson(right / trials, trials, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)
