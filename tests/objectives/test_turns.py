"""Tasks of a combination that take turns: stages, one source a step, steps of their own, heads in common."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders, tiny_pairs
from torch import Tensor, nn

from mmssl.audit.verdict import judge
from mmssl.errors import Interrupted, RecipeError
from mmssl.objectives import Objective, create
from mmssl.objectives._mixing import Mixing
from mmssl.objectives.base import Step
from mmssl.ops.draws import Draws
from mmssl.recipe import Training
from mmssl.training import checkpoint
from mmssl.training.launch import start_processes
from mmssl.training.loop import fit

STAGES = {
    "turn": {"name": "rotation", "data": "pictures", "steps": [0, 4]},
    "words": {"name": "masked_language", "data": "pairs", "steps": [2, None]},
    "pairs": {"name": "contrastive", "width": 7, "data": "pairs", "steps": [4, None]},
}
PICK: dict[str, Any] = {name: {k: v for k, v in task.items() if k != "steps"} for name, task in STAGES.items()}

TURNS: dict[str, dict[str, Any]] = {"stages": {"tasks": STAGES}, "pick": {"tasks": PICK, "pick": "one"}}


class Data:
    """Two sources of noise."""

    def __init__(self, share: int = 0, shares: int = 1, rows: int = 8) -> None:
        size = rows // shares
        self.mine = slice(share * size, (share + 1) * size)
        self.rows = rows

    def batches(self, start: int, stop: int):
        for step in range(start, stop):
            yield {
                f"{source}/{key}": value[self.mine]
                for i, source in enumerate(("pictures", "pairs"))
                for key, value in tiny_batch(self.rows, 10 * step + i).items()
            }


def _settings(**changes: Any) -> Training:
    base = {"steps": 8, "batch_size": 8, "precision": "fp64", "log_every": 1, "save_every": 100, "clip": 1.0}
    return Training.model_validate(base | {"optimizer": {"lr": 0.02, "weight_decay": 0.3}} | changes)


def _task(tasks: dict[str, Any], **hyper: Any) -> Objective:
    torch.manual_seed(0)
    encoders = {k: v for k, v in tiny_encoders().items() if k in ("image", "text")}
    return create("combine", encoders, tasks=tasks, **hyper)


def _weights(task: nn.Module, part: str) -> list[Tensor]:
    return [p.detach().clone() for name, p in task.named_parameters() if name.startswith(part)]


# Who trains when.


def test_stages_and_odds():
    stages = {"a": (0, 10), "b": (5, None), "c": (0, None)}
    mixing = Mixing(stages, {"a": "x", "b": "x", "c": "y"}, "all")
    assert [mixing.active(0, step) for step in (0, 5, 10)] == [["a", "c"], ["a", "b", "c"], ["b", "c"]]
    assert mixing.takes_turns
    assert not Mixing({"a": (0, None)}, {"a": "a"}, "one").takes_turns
    one = Mixing(stages, {"a": "x", "b": "x", "c": "y"}, "one")
    picked = [tuple(one.active(3, step)) for step in range(10, 1010)]
    assert set(picked) == {("b",), ("c",)}
    assert stats.binomtest(Counter(picked)["b",], 1000, 0.5).pvalue > 1e-3
    assert {tuple(one.active(3, step)) for step in range(5, 10)} <= {("a", "b"), ("c",)}
    assert picked == [tuple(one.active(3, step)) for step in range(10, 1010)]
    assert picked != [tuple(one.active(4, step)) for step in range(10, 1010)]
    odds = Mixing(stages, {"a": "x", "b": "x", "c": "y"}, {"x": 3, "y": 1})
    picked = [tuple(odds.active(3, step)) for step in range(10, 2010)]
    assert stats.binomtest(Counter(picked)["b",], 2000, 0.75).pvalue > 1e-3


@pytest.mark.parametrize(
    ("tasks", "hyper", "message"),
    [
        ({"turn": {"name": "rotation", "steps": [5, None]}}, {}, r"no task is trained at step 0"),
        ({"turn": {"name": "rotation", "steps": [0, 5]}}, {}, r"no task is trained at step 5; steps: \[5, null\]"),
        ({"turn": {"name": "rotation", "steps": [5, 5]}}, {}, r"tasks.turn: steps = \[5, 5\] should be"),
        ({"turn": {"name": "rotation", "steps": 5}}, {}, r"tasks.turn: steps = 5 should be"),
        (PICK, {"pick": {"pairs": 1}}, r"should give a number above 0 to each of pictures, pairs"),
        (PICK, {"pick": {"pairs": 1, "pictures": 0}}, r"should give a number above 0"),
        (PICK, {"pick": "some"}, r"pick = 'some'"),
        ({"words": {"name": "masked_language", "heads": "other"}}, {}, r"heads = 'other' should be a task above"),
        (
            {"turn": {"name": "rotation"}, "words": {"name": "contrastive", "heads": "turn"}},
            {},
            r"no modules of the same name",
        ),
        (
            {"a": {"name": "contrastive", "width": 7}, "b": {"name": "contrastive", "width": 6, "heads": "a"}},
            {},
            r"tasks.b: heads: 'project_a' has another size",
        ),
    ],
)
def test_errors_say_what_is_wrong(tasks, hyper, message):
    with pytest.raises(RecipeError, match=message):
        _task(tasks, **hyper)


# What a task costs whose turn it is not.


def test_who_does_not_train_makes_nothing_runs_nothing_and_stays_as_it_is():
    task = _task(STAGES)
    calls: list[tuple[str, str]] = []
    for name, part in task.tasks.items():
        for method in ("transform", "predict", "loss", "after_step"):
            own = getattr(part, method)
            setattr(part, method, lambda *a, n=name, m=method, f=own: (calls.append((n, m)), f(*a))[1])
    seen: list[dict[str, list[Tensor]]] = []
    after = task.after_step

    def after_step(progress: float) -> None:
        after(progress)
        seen.append({name: _weights(task, f"tasks.{name}") for name in task.tasks})

    task.after_step = after_step  # type: ignore[method-assign]
    history = fit(task, Data(), _settings(), quiet=True)
    methods = ("transform", "predict", "loss", "after_step")
    expected = [["turn"]] * 2 + [["turn", "words"]] * 2 + [["words", "pairs"]] * 4
    made = Counter((name, method) for names in expected for name in names for method in methods)
    made.update(("turn", method) for method in methods if method != "after_step")  # the rows of step 0, at the end
    assert Counter(calls) == made
    for step, names in enumerate(expected):
        record = history[step + 1]
        logged = {key.partition("/")[0] for key in record if "/loss" in key and not key.startswith("same_rows")}
        assert logged == set(names)
        assert record["loss"] == pytest.approx(sum(record[f"{name}/loss"] for name in names))
    # Neither momentum nor weight decay moves what has not begun, or is over.
    for name, moving in (("turn", range(4)), ("words", range(2, 8)), ("pairs", range(4, 8))):
        for step in range(1, 8):
            same = all(torch.equal(a, b) for a, b in zip(seen[step][name], seen[step - 1][name], strict=True))
            assert same == (step not in moving), (name, step)


def test_all_take_part_in_evaluation_and_the_sum_has_no_level():
    task = _task(STAGES).eval()
    batch = next(Data().batches(0, 1))
    inputs = task.transform(batch, Draws(0, 0, 8))
    losses = task(inputs)
    assert {key.partition("/")[0] for key in losses if "/" in key} == set(STAGES)
    chance = task.chance(8)
    assert chance.loss is None
    assert set(chance.levels) <= set(losses)
    assert {panel.title.partition(":")[0] for panel in task.preview(inputs, task.predict(inputs))} == set(STAGES)
    task.train()
    assert {key.partition("/")[0] for key in task.transform(batch, Draws(0, 0, 8))} == {"turn"}
    whole = _task(PICK)
    assert not whole.takes_turns
    assert whole.chance(8).loss is not None


@pytest.mark.long
def test_records_without_a_task_are_judged_by_those_with_it():
    task = _task(STAGES)
    history = fit(task, Data(), _settings(steps=30), quiet=True)
    verdicts = {verdict.task: verdict for verdict in judge(history, task.chance(8), 8)}
    assert set(verdicts) == set(STAGES)
    assert "4 records" in verdicts["turn"].reason
    measured = _task(STAGES, conflicts=1)
    conflicts = fit(measured, Data(), _settings(steps=6), quiet=True)
    names = [sorted(key for key in record if key.startswith("gradient_share")) for record in conflicts[1:]]
    assert names[0] == []  # of one task there is nothing to compare
    assert names[2] == ["gradient_share/turn", "gradient_share/words"]
    assert names[5] == ["gradient_share/pairs", "gradient_share/words"]


@pytest.mark.quick(1)
@pytest.mark.parametrize("hyper", TURNS.values(), ids=TURNS)
def test_a_resumed_run_has_the_same_bits(hyper, tmp_path):
    class Stops(Data):
        def batches(self, start: int, stop: int):
            for step, batch in enumerate(super().batches(start, stop), start):
                if step == 3:
                    os.kill(os.getpid(), 15)
                yield batch

    whole = _task(**hyper)
    expected = fit(whole, Data(), _settings(), tmp_path / "whole", quiet=True)
    with pytest.raises(Interrupted):
        fit(_task(**hyper), Stops(), _settings(), tmp_path / "parts", quiet=True)
    torch.manual_seed(99)
    again = _task(**hyper)
    history = fit(again, Data(), _settings(), tmp_path / "parts", resume=True, quiet=True)
    assert [r["loss"] for r in history] == [r["loss"] for r in expected]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


# Several processes.


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    start_processes()
    for name, hyper in TURNS.items():
        task = _task(**hyper)
        history = fit(task, Data(rank, world), _settings(accumulate=2), quiet=True)
        if rank == 0:
            Path(folder, f"{name}.json").write_text(json.dumps([record["loss"] for record in history]))
            torch.save(task.state_dict(), Path(folder, f"{name}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_and_micro_batches_train_what_one_trains(tmp_path, processes):
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        Path(tmp_path, "port").write_text(str(free.getsockname()[1]))
    processes(_process, (2, str(tmp_path)), 2)
    for name, hyper in TURNS.items():
        task = _task(**hyper)
        losses = [record["loss"] for record in fit(task, Data(), _settings(), quiet=True)]
        assert json.loads((tmp_path / f"{name}.json").read_text()) == pytest.approx(losses, rel=1e-9)
        for key, value in torch.load(tmp_path / f"{name}.pt").items():
            torch.testing.assert_close(value, task.state_dict()[key], rtol=1e-8, atol=1e-10)


# What comes before a step.


def test_before_a_step_each_task_sees_its_own_number_source_and_inputs():
    seen: dict[str, list[tuple[int, set[str], set[str]]]] = {name: [] for name in STAGES}

    def looks(name: str):
        def before_step(step: Step) -> None:
            for _ in range(2):
                batches = list(step.data())
                assert len(batches) == 3
            seen[name].append((step.number, set(batches[0]), set(step.inputs)))
            step.log({"number": torch.tensor(step.number)})

        return before_step

    task = _task({**STAGES, "turn": {**STAGES["turn"], "steps": [1, 4]}, "words": {**PICK["words"]}})
    for name, part in task.tasks.items():
        part.before_step = looks(name)
    loader = Data()
    loader.steps_per_epoch = 3
    history = fit(task, loader, _settings(steps=6), quiet=True)
    numbers = {name: [number for number, *_ in calls] for name, calls in seen.items()}
    assert numbers == {"turn": [0, 1, 2], "words": [0, 1, 2, 3, 4, 5], "pairs": [0, 1]}
    assert [record.get("turn/number") for record in history] == [None, None, 0, 1, 2, None, None]
    assert [record.get("pairs/number") for record in history] == [None] * 5 + [0, 1]
    for calls in seen.values():
        assert all(keys == set(tiny_batch(2)) for _, keys, _ in calls)
    assert all(inputs == {"image", "turn"} for *_, inputs in seen["turn"])


def test_a_task_that_is_not_picked_may_look_at_the_data_and_has_no_inputs():
    seen = []
    task = _task(**TURNS["pick"])
    task.tasks["turn"].before_step = lambda step: seen.append((step.number, bool(step.inputs)))
    history = fit(task, Data(), _settings(steps=12), quiet=True)
    picked = ["turn/loss" in record for record in history[1:]]
    assert seen == list(enumerate(picked))
    assert {True, False} == set(picked)


PAIRS = {
    "pairs": {"name": "masked_pair", "codes": 6, "form": "beit3", "data": "pairs"},
    "alone": {"name": "masked_pair", "codes": 6, "form": "beit3", "b": None, "heads": "pairs", "data": "pictures"},
    "words": {"name": "masked_pair", "form": "beit3", "a": None, "heads": "pairs", "data": "pairs"},
}


def test_heads_and_codebook_are_one_where_they_are_asked_to_be():
    torch.manual_seed(0)
    task = create("combine", tiny_pairs("multiway"), tasks=PAIRS)
    own = task.tasks["pairs"]
    assert task.tasks["alone"].patches is own.patches
    assert task.tasks["words"].words is own.words
    assert not any(name.startswith(("tasks.alone", "tasks.words")) for name in checkpoint.tensors(task))
    assert (own.mask_ratio["b"], task.tasks["words"].mask_ratio["b"]) == (0.5, 0.15)
    batch = next(Data().batches(0, 1))
    task.before_step(Step(0, lambda: [batch]))
    assert int(own.patches.codebook.counts.sum()) == 8 * 9
    expected = create("combine", tiny_pairs("multiway"), tasks={"pairs": PAIRS["pairs"]}).tasks["pairs"].patches
    expected.codebook.seed.copy_(own.patches.codebook.seed)
    pairs = {k[6:]: v for k, v in batch.items() if k[0:6] == "pairs/"}
    vectors = own.patches.vectors(own.sides["a"], pairs, 0)
    expected.codebook.fit([vectors])  # on pairs alone, and not again on pictures
    assert torch.equal(own.patches.codebook.centers, expected.codebook.centers)
    inputs = task.transform(batch, Draws(0, 0, 8))
    losses = task(inputs)
    # The classifier of patches learns from both.
    weight = own.patches.head[3].weight
    both, alone, pairs = (
        torch.autograd.grad(losses[key], [weight], retain_graph=True)[0] for key in ("loss", "alone/loss", "pairs/loss")
    )
    torch.testing.assert_close(both, alone + pairs)
    assert alone.abs().max() > 0
    copy = create("combine", tiny_pairs("multiway"), tasks=PAIRS)
    copy.load_state_dict(task.state_dict())
    torch.testing.assert_close(copy(inputs)["loss"], losses["loss"])
    late = {**PAIRS, "pairs": {**PAIRS["pairs"], "steps": [5, None]}}
    with pytest.raises(RecipeError, match="heads: pairs begins later"):
        create("combine", tiny_pairs("multiway"), tasks=late)
