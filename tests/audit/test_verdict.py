"""The closing line says learned only where a run is better than guessing, and with the number that decided it."""

from __future__ import annotations

import math
import random
import re

import pytest

import mmssl
from mmssl.audit.verdict import judge
from mmssl.objectives.base import Chance

ROWS = 16
FOUR = Chance(math.log(4), {"accuracy": 0.25})
SPREAD = Chance(2.0, {"ranking": 0.5})


def records(accuracies: list[float], seed: int = 0, rows: int = ROWS, every: int = 10) -> list[dict]:
    """A run whose answers are right with these probabilities; its loss falls from ln 4 as accuracy rises."""
    draw = random.Random(seed)
    return [
        {
            "step": every * (i + 1),
            "loss": math.log(4) * (1 - (p - 0.25) / 0.75) + draw.gauss(0.02, 0.05),
            "accuracy": sum(draw.random() < p for _ in range(rows)) / rows,
            "lr": 1e-3,
        }
        for i, p in enumerate(accuracies)
    ]


def only(history: list[dict], chance: Chance = FOUR, rows: int = ROWS):
    (verdict,) = judge(history, chance, rows)
    assert re.search(r"nan|inf\b", str(verdict)) is None
    return verdict


def test_learned_names_the_number_and_what_stands_beside_it():
    verdict = only(records([0.25] * 30 + [0.7] * 40))
    assert (verdict.outcome, verdict.metric, verdict.since, verdict.chance) == ("learned", "accuracy", None, 0.25)
    assert verdict.value == pytest.approx(0.7, abs=0.1)
    assert re.fullmatch(
        r"learned: accuracy 0\.\d+ against 0\.25 by guessing \(last 20 records, 320 answers, z = \d+\.\d\)",
        str(verdict),
    )


@pytest.mark.parametrize(
    ("losses", "outcome"), [([3.0, 2.0], "learned"), ([3.0, 3.0], "unmoved"), ([2.0, 3.0], "unmoved")]
)
def test_a_queue_whose_loss_falls_has_learned_though_fewer_answers_are_right(losses, outcome):
    among = Chance(math.log(64), {"accuracy": 1 / 64}, {"accuracy": 30, "loss": 30})
    history = records([0.8] * 3 + [0.5] * 20 + [0.3] * 20)
    for i, record in enumerate(history):
        record |= {"spread": 0.5, "loss": losses[i >= 23] + 0.01 * (-1) ** i}
    assert only(history, among).outcome == outcome


def test_z_is_that_of_the_binomial():
    history = [{"step": i + 1, "accuracy": 0.375, "loss": math.log(4)} for i in range(1, 4)]
    verdict = only(history, rows=32)
    assert verdict.z == pytest.approx(
        (0.375 - 0.25) / math.sqrt(0.25 * 0.75 / 96), rel=0.06
    )  # its normal approximation


@pytest.mark.parametrize(
    ("later", "count", "outcome"),
    [
        ([0.3], 40, "unmoved"),
        ([0.3, 0.8], 40, "learned"),
        ([0.3], 5, "too few answers to tell"),
        ([0.02], 40, "at chance"),
    ],
)
def test_records_of_a_queue_that_holds_random_vectors_say_nothing_of_the_network(later, count, outcome):
    among = Chance(math.log(64), {"accuracy": 1 / 64}, {"accuracy": 30, "loss": 30})
    part = count // len(later)
    history = [{"step": 0, "accuracy": 1.0, "loss": 1.0}, *records([1.0] * 3 + [p for p in later for _ in range(part)])]
    history = [record | {"spread": 0.5} for record in history]
    history[-1]["same_rows/accuracy"] = 0.3
    verdict = only(history, among)
    assert verdict.outcome == outcome
    assert verdict.untrained is None
    told = only(history, Chance(among.loss, among.metrics))
    assert told.untrained == 1.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [20, 33, 400])
def test_a_run_that_only_guesses_is_at_chance_since_step_0(count, seed):
    verdict = only(records([0.25] * count, seed))
    assert (verdict.outcome, verdict.since, verdict.metric) == ("at chance", 0, "accuracy")
    assert str(verdict).startswith("at chance since step 0: accuracy 0.")


@pytest.mark.long
def test_one_run_in_a_hundred_that_guesses_is_called_otherwise():
    wrong = sum(only(records([0.25] * 100, seed)).since != 0 for seed in range(300))
    assert wrong <= 9  # 3 expected; the binomial has at most 9 with probability 0.999


def test_only_rows_that_count_are_answers():
    wrong, mistaken = 0, 0
    for seed in range(20):
        history = records([0.25] * 40, seed, rows=1)
        mistaken += only(history).outcome == "learned"
        history = [record | {"valid": 1 / ROWS} for record in history]
        wrong += only(history).outcome == "learned"
    assert wrong <= 1 < 3 < mistaken  # where one of 16 rows is heard, 16 answers a record are 15 too many
    verdict = only([{"step": 0, "accuracy": 0.5, "loss": 1.4, "valid": 0.5}, *history])
    assert ", 20 answers, " in str(verdict)
    assert verdict.value == pytest.approx(sum(record["accuracy"] for record in history[20:]) / 20)


def test_records_in_which_no_row_counts_say_nothing():
    history = [record | {"valid": 1.0} for record in records([0.7] * 40)]
    nothing = [{"step": 10 * i + 5, "accuracy": 0.0, "loss": 0.0, "valid": 0.0} for i in range(40)]
    mixed = sorted(history + nothing, key=lambda record: record["step"])
    assert only([{**nothing[0], "step": 0}, *mixed]) == only(history)
    verdict = only(nothing)
    assert verdict.outcome == "too few answers to tell"
    assert str(verdict).startswith("too few answers to tell: valid 0 in all records: every row was left out")


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_fell_back_is_at_chance_since_then(seed):
    verdict = only(records([0.25] * 40 + [0.7] * 80 + [0.25] * 80, seed))
    assert verdict.outcome == "at chance"
    assert verdict.since == 1210  # the window that begins with the first record after the fall
    assert re.search(r", after 0\.[67]\d* at steps \d+ to \d+$", str(verdict))


@pytest.mark.parametrize("count", range(2, 11))
def test_a_few_records_are_enough_where_the_difference_is_large(count):
    assert only(records([0.25] * (count // 2) + [0.95] * (count - count // 2))).outcome == "learned"
    assert (
        only([{"step": i + 1, "loss": 0.5 - 0.04 * i + 0.01 * (i % 2)} for i in range(count)], Chance(1.39)).outcome
        == "learned"
    )


def test_a_single_record_decides_by_its_answers_or_not_at_all():
    assert str(only(records([1.0]))).startswith("learned: accuracy 1 against 0.25 by guessing (the only record, 16 ans")
    assert only([{"step": 1, "loss": 0.1}]).outcome == "unknown"
    assert only([]).outcome == "unknown"


def test_a_loss_is_measured_by_its_own_scatter():
    noise = [0.5 * (-1) ** i for i in range(20)]
    near = [{"step": i + 1, "loss": 1.29 + x} for i, x in enumerate(noise)]
    far = [{"step": i + 1, "loss": 0.8 + x} for i, x in enumerate(noise)]
    assert only(near, Chance(1.39)).outcome == "at chance"
    assert (only(far, Chance(1.39)).outcome, only(far, Chance(1.39)).metric) == ("learned", "loss")
    worse = only([{"step": i + 1, "loss": 40 + x} for i, x in enumerate(noise)], Chance(1.39))
    assert (worse.outcome, worse.since) == ("at chance", 0)
    assert worse.z < -5


def test_a_constant_loss_that_is_its_level_but_for_rounding_is_at_chance():
    history = [{"step": i + 1, "loss": math.log(31) - 1e-7} for i in range(1, 40)]
    assert only(history, Chance(math.log(31))).outcome == "at chance"
    assert only([record | {"loss": 3.0} for record in history], Chance(math.log(31))).outcome == "learned"


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_levels_may_be_negative_or_nothing(level):
    noise = [0.1 * (-1) ** i for i in range(12)]
    at, below, above = ([{"step": i + 1, "loss": level + d + x} for i, x in enumerate(noise)] for d in (0, -0.5, 0.5))
    outcomes = [only(history, Chance(level)).outcome for history in (at, below, above)]
    assert outcomes == ["at chance", "learned", "at chance"]
    zero = [{"step": i + 1, "loss": 1.0, "accuracy": 0.0} for i in range(5)]
    assert only(zero, Chance(1.0, {"accuracy": 0.0})).outcome == "at chance"
    assert only([r | {"accuracy": 0.5} for r in zero], Chance(1.0, {"accuracy": 0.0})).outcome == "learned"


def test_without_a_level_of_the_loss_a_metric_decides_and_less_of_it_is_better():
    chance = Chance(None, {"relative_error": 1.0})
    history = [{"step": i + 1, "loss": 0.01, "relative_error": 1.0 + 0.05 * (-1) ** i} for i in range(30)]
    assert (only(history, chance).outcome, only(history, chance).since) == ("at chance", 0)
    better = [record | {"relative_error": record["relative_error"] - 0.4} for record in history]
    assert (only(better, chance).outcome, only(better, chance).metric) == ("learned", "relative_error")
    assert only(history + better, chance).outcome == "learned"
    worse = [record | {"relative_error": record["relative_error"] + 0.4} for record in history]
    assert only(worse, chance).outcome == "at chance"


def test_a_loss_decides_nothing_where_a_metric_can():
    # Colors: how frequent each is lowers the loss far below that of all alike, without a look at the picture.
    history = [{"step": i + 1, "loss": 3.0, "relative_error": 1.0 + 0.01 * (-1) ** i} for i in range(40)]
    verdict = only(history, Chance(math.log(313), {"relative_error": 1.0}))
    assert str(verdict).startswith(
        "at chance since step 0: relative_error 1 against 1 of the best constant answer (last"
    )


def test_a_relative_error_decides_alone():
    """Knowing the frequent answers is enough for an accuracy far above guessing."""
    history = [
        {"step": i + 1, "loss": 7.0, "accuracy": 0.06, "relative_error": 1.0 + 0.01 * (-1) ** i} for i in range(40)
    ]
    chance = Chance(math.log(8000), {"accuracy": 1 / 8000, "relative_error": 1.0})
    assert (only(history, chance).outcome, only(history, chance).metric) == ("at chance", "relative_error")
    better = [record | {"relative_error": record["relative_error"] - 0.1} for record in history]
    assert (only(better, chance).outcome, only(better, chance).metric) == ("learned", "relative_error")
    one = only(history[:1], chance)  # of accuracy alone it would be "learned"
    assert (one.outcome, one.metric, one.value) == ("too few answers to tell", "relative_error", 1.01)
    assert "in one record alone; log more often (training.log_every)" in str(one)


def test_values_that_are_missing_or_not_finite_are_left_out():
    history = records([0.25] * 10 + [0.8] * 20)
    for i, record in enumerate(history):
        if i % 3 == 0:
            record["accuracy"] = math.nan
        if i % 3 == 1:
            del record["loss"]
    assert only(history).outcome == "learned"


def test_collapsed_whatever_the_loss_says():
    history = [
        {"step": i, "loss": 1e-3, "ranking": 1.0, "spread": 0.9 if i <= 20 else 0.02 + 0.001 * (i % 2)}
        for i in range(1, 61)
    ]
    verdict = only(history, SPREAD)
    assert (verdict.outcome, verdict.since, verdict.metric) == ("collapsed", 21, "spread")
    assert str(verdict).startswith("collapsed since step 21: spread of the embeddings 0.02")
    assert only(history[:20], SPREAD).outcome == "unmoved"
    assert str(only(history[:20], SPREAD)).endswith("; spread of the embeddings 0.90")


def test_embeddings_that_are_better_than_guessing_untrained_have_to_become_better_still():
    steady = [record | {"spread": 0.3} for record in records([0.6] * 40, rows=64)]
    verdict = only(steady, rows=64)
    assert verdict.outcome == "unmoved"
    assert str(verdict).endswith(", no better than at steps 10 to 200; spread of the embeddings 0.30")
    rising = [record | {"spread": 0.3} for record in records([0.4] * 20 + [0.9] * 20)]
    assert only(rising).outcome == "learned"
    near = [{"step": i + 1, "loss": 1 / i, "ranking": 0.9, "spread": 0.3} for i in range(1, 61)]
    assert only(near, SPREAD).outcome == "unmoved"  # a loss of embeddings falls when they come together


def test_a_head_that_is_better_than_guessing_has_learned_it_however_early():
    verdict = only(records([0.6] * 40, rows=64), rows=64)
    assert (verdict.outcome, verdict.metric) == ("learned", "accuracy")


def test_a_task_of_a_combination_is_judged_alone():
    chance = Chance(
        2.5, {"turn/loss": math.log(4), "turn/accuracy": 0.25, "fill/relative_error": 1.0, "pull/ranking": 0.5}
    )
    turn, still = records([0.25] * 10 + [0.8] * 30), records([0.25] * 40, seed=1)
    history = [
        {
            "step": a["step"],
            "loss": 0.1,
            "turn/loss": a["loss"],
            "turn/accuracy": a["accuracy"],
            "fill/relative_error": 1.0 + b["loss"] - math.log(4),
            "pull/ranking": 0.9,
            "pull/spread": 0.01,
        }
        for a, b in zip(turn, still, strict=True)
    ]
    verdicts = judge(history, chance, ROWS)
    assert [(v.task, v.outcome) for v in verdicts] == [
        ("turn", "learned"),
        ("fill", "at chance"),
        ("pull", "collapsed"),
    ]
    assert [str(v).split(":")[0] for v in verdicts] == ["turn", "fill", "pull"]
    assert "turn/" not in str(verdicts[0])


@pytest.mark.long
def test_a_run_closes_with_it(tmp_path, capsys):
    run = mmssl.run("rotation_toy", {"training.optimizer.lr": 1e-12, "training.log_every": 1}, tmp_path / "run")
    (verdict,) = run.verdict
    assert verdict.outcome == "at chance"
    assert f"verdict: {verdict}" in capsys.readouterr().err.splitlines()
