"""Sixteen planted leaks are found, and where they are not there the task is at chance: see `scripts/leaks.py`."""

from __future__ import annotations

import pytest
from leaks import LEAKS, Ask, Leak

CLEAN = {leak.clean: f"{leak.task}, {leak.without}" for leak in LEAKS}


def test_there_are_sixteen():
    assert len({leak.words for leak in LEAKS}) == 16


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.words)
def test_a_planted_leak_is_found(leak: Leak):
    finding = leak.leaking(0)
    assert finding.verdict == "leaks", finding
    assert finding.low > finding.chance


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clean", CLEAN, ids=CLEAN.values())
def test_without_it_the_task_is_at_chance(clean: Ask, seed: int):
    finding = clean(seed)
    assert finding.verdict != "leaks", finding
    assert finding.low < finding.chance
