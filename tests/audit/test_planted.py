"""Runs whose end is known, because it was planted, and the verdicts on them: real ones, and records made by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from planted import RUNS, Planted

from mmssl.audit.power import more_often_right, tells
from mmssl.audit.verdict import judge
from mmssl.objectives.base import Chance

FILLED = ("moco_toy", "nnclr_toy", "instance_discrimination_toy")
"""Whose first records are measured against random vectors."""
ALWAYS = {
    "VICReg without variance and covariance",
    "data2vec without EMA",
    "JEPA without EMA and predictor",
    "JEPA as published",
    "SimCSE without dropout",
    "CAPI without Sinkhorn",
    "data2vec with it",
    "rotation, learned early",
    "pairs that do",
    "rotation, targets by lot",
    "rotation, nothing moves",
    "instance discrimination, one vector for all rows",
    "SimCLR, nothing moves",
    "BYOL, nothing moves",
    "rotation, 64 answers",
}
"""The shortest runs of every outcome; `python scripts/planted.py` and `pytest -m slow` make the others."""


@pytest.mark.long
@pytest.mark.parametrize(
    "planted", [pytest.param(p, id=p.words, marks=() if p.words in ALWAYS else pytest.mark.slow) for p in RUNS]
)
def test_real_runs(planted: Planted) -> None:
    _, (verdict,) = planted.run()
    assert verdict.outcome == planted.outcome, str(verdict)
    told = planted.recipe not in FILLED or verdict.outcome == "collapsed"
    assert (verdict.untrained is not None) == (told and not str(verdict.metric).endswith("alignment"))


def test_every_outcome_is_among_the_runs_that_are_always_made() -> None:
    made = [planted for planted in RUNS if planted.words in ALWAYS]
    assert len(made) == len(ALWAYS)
    assert {planted.outcome for planted in made} == {planted.outcome for planted in RUNS}


QUARTER = Chance(math.log(4), {"accuracy": 0.25})
AMONG = Chance(math.log(255), {"accuracy": 1 / 255})
HALF = Chance(4.0, {"ranking": 0.5})
ERROR = Chance(None, {"relative_error": 1.0})


def shares(key: str, probabilities: list[float], rows: int, again: float, **others: float) -> list[dict[str, Any]]:
    """Records of right answers of these probabilities, that of step 0 first, and those of its rows at the end."""
    draw = random.Random(0)
    history = [
        {"step": 10 * i, key: sum(draw.random() < p for _ in range(rows)) / rows} | others
        for i, p in enumerate(probabilities)
    ]
    history[0][key] = round(probabilities[0] * rows) / rows
    history[-1][f"same_rows/{key}"] = round(again * rows) / rows
    return history


def errors(values: list[float], again: float) -> list[dict[str, Any]]:
    history = [{"step": 10 * i, "relative_error": v + 0.01 * (-1) ** i} for i, v in enumerate(values)]
    history[-1]["same_rows/relative_error"] = again
    return history


def assigned(history: list[dict[str, Any]], *perplexities: float) -> list[dict[str, Any]]:
    """Perplexities, the first at step 0, each for its part of the run."""
    part = math.ceil((len(history) - 1) / (len(perplexities) - 1))
    return [
        record | {"perplexity": perplexities[0] if not i else perplexities[1 + (i - 1) // part]}
        for i, record in enumerate(history)
    ]


def costing(history: list[dict[str, Any]], untrained: float, trained: float) -> list[dict[str, Any]]:
    """A loss around a value."""
    return [record | {"loss": trained + 0.002 * (-1) ** i if i else untrained} for i, record in enumerate(history)]


def monitored(history: list[dict[str, Any]], what: str, *rooms: tuple[float, float]) -> list[dict[str, Any]]:
    """Ranks and spreads, one a tenth of the run, the first at step 0."""
    every = (len(history) - 1) // (len(rooms) - 1)
    for i, (rank, spread) in enumerate(rooms):
        history[i * every] |= {f"monitor/{what}/rank": rank, f"monitor/{what}/spread": spread}
    return history


def viewed(history: list[dict[str, Any]], *distances: float) -> list[dict[str, Any]]:
    """Mean squared distances of a row's views, the first at step 0, the last from then on."""
    every = [{"monitor/embeddings/spread": 0.9, "monitor/embeddings/alignment": d} for d in distances]
    return [r | (every[min(i, len(every) - 1)] if i % 5 == 0 or i == 1 else {}) for i, r in enumerate(history)]


SPREAD = {"spread": 0.9}
FINE = shares("ranking", [0.55] + [0.9] * 20, 64, 0.9, **SPREAD)


@pytest.mark.parametrize(
    ("history", "chance", "rows", "outcome"),
    [
        (shares("accuracy", [0.25] + [0.9] * 40, 64, 0.9), QUARTER, 64, "learned"),  # early: before the first record
        (shares("accuracy", [0.25] * 30 + [0.7] * 20, 64, 0.7), QUARTER, 64, "learned"),  # late
        (shares("accuracy", [0.25] * 60, 64, 0.25), QUARTER, 64, "at chance"),
        (shares("accuracy", [0.25] + [0.8] * 30 + [0.25] * 30, 64, 0.25), QUARTER, 64, "at chance"),
        (shares("accuracy", [0.25] * 2, 4, 0.5), QUARTER, 4, "too few answers to tell"),
        (shares("accuracy", [0.25] * 2, 64, 0.25), QUARTER, 64, "too few answers to tell"),
        (shares("accuracy", [0.25] * 6, 64, 0.25), QUARTER, 64, "at chance"),
        # SimCLR of 128 rows on a plateau at 37 % from the first record on, but for step 0.
        (shares("accuracy", [0.08] + [0.37] * 3, 128, 0.37, **SPREAD), AMONG, 128, "learned"),
        (shares("accuracy", [0.37] + [0.37] * 3, 128, 0.36, **SPREAD), AMONG, 128, "unmoved"),
        (shares("accuracy", [0.3] + [0.37] * 3, 16, 0.44, **SPREAD), AMONG, 16, "too few answers to tell"),
        # The same rows show what the noise between batches hides.
        (shares("ranking", [0.6] + [0.62] * 2, 128, 0.8, **SPREAD), HALF, 128, "learned"),
        (errors([1.2] + [0.7] * 30, 0.7), ERROR, 64, "learned"),
        (errors([1.2] + [1.0] * 30, 1.0), ERROR, 64, "at chance"),
        (errors([1.2] + [1.0] * 3, 1.0), ERROR, 64, "too few answers to tell"),
        (errors([0.8] + [0.8] * 30, 0.8), ERROR, 64, "unmoved"),
        (FINE, HALF, 64, "learned"),
        (monitored([dict(r) for r in FINE], "embeddings", (49, 1), (9, 0.9), (3.5, 0.9)), HALF, 64, "collapsed"),
        (monitored([dict(r) for r in FINE], "embeddings", (49, 1), (20, 0.9), (16, 0.9)), HALF, 64, "learned"),
        (monitored([dict(r) for r in FINE], "image", (6, 0.3), (4, 0.2), (1.1, 0.02)), HALF, 64, "collapsed"),
        (monitored([dict(r) for r in FINE], "image", (1.1, 0.02), (1.1, 0.02), (1.1, 0.02)), HALF, 64, "learned"),
        (monitored([dict(r) for r in FINE], "image", (6, 0.3), (1.1, 0.02), (5, 0.3)), HALF, 64, "learned"),
        # Views of a row that are one vector, and views that are nearly one.
        (viewed(FINE, 1e-9), HALF, 64, "unmoved"),
        (viewed(FINE, 1e-3), HALF, 64, "learned"),
        (viewed(FINE, 0.3, 1e-9), HALF, 64, "learned"),
        # All rows of one cluster, whatever room embeddings have.
        (assigned(FINE, 12.0, 6.0, 1.2), HALF, 64, "collapsed"),
        (assigned(FINE, 12.0, 1.2, 6.0), HALF, 64, "learned"),
        (assigned(FINE, 1.9, 1.9, 1.8), HALF, 64, "learned"),  # of two clusters both
        # The same answer for all rows.
        (costing(FINE, 5.2, 4.003), HALF, 64, "collapsed"),
        (costing(FINE, 5.2, 3.98), HALF, 64, "learned"),
        (costing(FINE, 4.01, 4.003), HALF, 64, "learned"),  # it never was another one
        (costing(FINE, 5.2, 4.2), HALF, 64, "learned"),
        # A head may read small differences.
        (
            monitored(shares("accuracy", [0.25] + [0.9] * 40, 64, 0.9), "image", (6, 0.3), (1.1, 0.02)),
            QUARTER,
            64,
            "learned",
        ),
    ],
)
def test_records_by_hand(history: list[dict[str, Any]], chance: Chance, rows: int, outcome: str) -> None:
    (verdict,) = judge(history, chance, rows)
    assert verdict.outcome == outcome, str(verdict)


def test_a_collapse_names_its_step_and_what_was_before() -> None:
    history = monitored([dict(r) for r in FINE], "embeddings", (49, 1), (9, 0.9), (1.5, 0.9), (1.2, 0.9), (1.1, 0.9))
    (verdict,) = judge(history, HALF, 64)
    assert str(verdict) == (
        "collapsed since step 100: embeddings of effective rank 1.1 and spread 0.900 at step 200, "
        "against 49.0 and 1.000 at step 0"
    )


def test_a_collapse_to_one_cluster_names_its_step() -> None:
    (verdict,) = judge(assigned(FINE, 12.0, 6.0, 1.2), HALF, 64)
    assert str(verdict) == (
        "collapsed since step 110: perplexity 1.20: nearly all rows are of one cluster (and 12.0 untrained; "
        "last 10 records)"
    )


def test_two_clusters_are_a_collapse_where_there_were_many() -> None:
    (verdict,) = judge(assigned(FINE, 8.5, 4.0, 2.1), HALF, 64)
    assert str(verdict).startswith(
        "collapsed since step 110: perplexity 2.10: nearly all rows are of two clusters (and 8.5"
    )
    for few in (5.0, 2.2):  # not so many fewer, or from the start
        (verdict,) = judge(assigned(FINE, few, few, 2.1), HALF, 64)
        assert verdict.outcome == "learned"


def test_the_untrained_network_stands_in_the_line() -> None:
    (verdict,) = judge(shares("accuracy", [0.25] + [1.0] * 5, 64, 0.75), QUARTER, 64)
    assert str(verdict).startswith("learned: accuracy 1 against 0.25 by guessing and 0.25 untrained (last 5 records, ")
    assert str(verdict).endswith(", 0.75 on the rows of step 0)")


def test_power_is_what_simulation_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    for level, answers in ((0.25, 60), (0.25, 120), (0.5, 150), (0.5, 320), (0.01, 30)):
        target = level + 0.2 * (1 - level)
        guess, right = (
            torch.binomial(torch.full((20_000,), float(answers)), torch.full((20_000,), p), generator=generator)
            for p in (level, target)
        )
        # The smallest count that guessing passes in at most one of a hundred runs.
        least = next(c for c in range(answers + 1) if (guess > c).float().mean() <= 0.01)
        found = (right > least).float().mean()
        assert tells(level, answers, 0.01) == (found >= 0.8), (level, answers, found)


def test_a_rise_is_as_unlikely_as_shuffling_says() -> None:
    answers = torch.cat([torch.ones(40), torch.zeros(60), torch.ones(10), torch.zeros(30)])
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack([answers[torch.randperm(140, generator=generator)] for _ in range(20_000)])
    expected = (shuffled[:, :100].sum(1) >= 40).double().mean()
    assert more_often_right(0.4, 100, 0.25, 40) == pytest.approx(float(expected), abs=0.01)
