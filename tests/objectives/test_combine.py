"""Several tasks at once: the weighted sum of what each would be alone."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_encoders import tiny_batch, tiny_encoders
from torch import Tensor

from mmssl import recipe
from mmssl.build import build
from mmssl.cli import find_recipe
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.training.loop import fit
from mmssl.training.step import diagnosed

TASKS = {
    "turn": {"name": "rotation", "weight": 0.5, "data": "pictures"},
    "pairs": {"name": "contrastive", "width": 7, "data": "pairs"},
}


def _batch(rows: int = 4) -> dict[str, torch.Tensor]:
    return {
        f"{source}/{k}": v for i, source in enumerate(("pictures", "pairs")) for k, v in tiny_batch(rows, i).items()
    }


def test_loss_is_the_weighted_sum_of_each_alone():
    torch.manual_seed(0)
    task = create("combine", tiny_encoders(), tasks=TASKS)
    assert task.coupled
    assert task.needs == ("pictures/image", "pairs/image", "pairs/text")
    draws = Draws(3, 1, 4)
    inputs = task.transform(_batch(), draws)
    losses = task(inputs)
    alone = {}
    for i, (name, given) in enumerate(TASKS.items()):
        hyper = {key: value for key, value in given.items() if key not in ("name", "weight", "data")}
        single = create(given["name"], task.encoders, **hyper)
        single.load_state_dict(
            {k.removeprefix(f"tasks.{name}."): v for k, v in task.state_dict().items() if not k.startswith("tasks.")
             or k.startswith(f"tasks.{name}.")}
        )  # fmt: skip
        alone[name] = single(single.transform(tiny_batch(4, i), Draws(3, 1, 4).named(name)))
        for key, value in alone[name].items():
            torch.testing.assert_close(losses[f"{name}/{key}"], value)
    torch.testing.assert_close(losses["loss"], 0.5 * alone["turn"]["loss"] + alone["pairs"]["loss"])


def test_tasks_draw_apart_and_adding_one_changes_no_other():
    encoders = tiny_encoders()
    one = {"first": {"name": "rotation"}}
    two = {"second": {"name": "rotation"}, **one}
    batch = tiny_batch(4)
    alone = create("combine", encoders, tasks=one).transform(batch, Draws(0, 0, 4))
    both = create("combine", encoders, tasks=two).transform(batch, Draws(0, 0, 4))
    assert torch.equal(alone["first/image"], both["first/image"])
    assert not torch.equal(both["first/image"], both["second/image"])


def test_encoders_are_shared_and_saved_once():
    task = create("combine", tiny_encoders(), tasks=TASKS)
    names = [name for name, _ in task.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(task.parameters()))
    assert not any("tasks" in name and "encoders" in name for name in task.state_dict())
    assert task.tasks["turn"].encoder("image") is task.encoder("image")
    copy = create("combine", tiny_encoders(), tasks=TASKS)
    copy.load_state_dict(task.state_dict())
    inputs = task.transform(_batch(), Draws(0, 0, 4))
    torch.testing.assert_close(copy(inputs)["loss"], task(inputs)["loss"])
    assert task.double().tasks["turn"].encoder("image").first.weight.dtype == torch.float64


def test_chance_steps_and_previews_are_those_of_the_tasks():
    task = create("combine", tiny_encoders(), tasks=TASKS)
    chance = task.chance(8)
    assert math.isclose(chance.loss, 0.5 * math.log(4) + math.log(8))
    assert chance.metrics["turn/accuracy"] == 0.25
    assert math.isclose(chance.metrics["pairs/loss"], math.log(8))
    task.tasks["pairs"].logit_scale.data.fill_(9)
    task.after_step(0.5)
    assert math.isclose(task.tasks["pairs"].logit_scale.item(), math.log(100), rel_tol=1e-6)
    inputs = task.transform(_batch(), Draws(0, 0, 4))
    titles = [panel.title for panel in task.preview(inputs, task.predict(inputs))]
    assert titles[0] == "turn: 0°"
    assert titles[-1] == "pairs: found"
    assert not create("combine", tiny_encoders(), tasks={"turn": {"name": "rotation"}}).coupled


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"a": {"name": "rotatoin"}}, r"tasks.a: .*did you mean 'rotation'"),
        ({"a": {"name": "rotation", "flop": 1}}, r"tasks.a: .*unknown key 'flop' \(did you mean 'flip'"),
        ({"a": {"name": "rotation", "flip": "often"}}, r"tasks.a: .*flip = 'often'"),
        ({"a": {}}, r"tasks.a: needs a name"),
        ({"a": {"name": "rotation", "weight": -1}}, r"tasks.a: weight = -1"),
        ({"a": {"name": "rotation", "data": 3}}, r"tasks.a: data = 3"),
        ({"a/b": {"name": "rotation"}}, r"tasks.a/b: a task is named by letters"),
        ({"a": {"name": "rotation", "encoder": "sound"}}, r"tasks.a: .*needs an encoder named 'sound'"),
        ({"probe": {"name": "rotation"}}, r"tasks.probe: .probe. has another meaning"),
        ({"keys": {"name": "rotation"}}, r"tasks.keys: .keys. has another meaning"),
        ({}, r"needs at least one task"),
    ],
)
def test_errors_name_the_task(tasks, message):
    with pytest.raises(RecipeError, match=message):
        create("combine", tiny_encoders(), tasks=tasks)


def test_conflicts_need_two_tasks_and_a_number_of_steps():
    with pytest.raises(RecipeError, match="between two tasks, and there is one"):
        create("combine", tiny_encoders(), tasks={"a": {"name": "rotation"}}, conflicts=5)
    with pytest.raises(RecipeError, match="conflicts = -1 should be a number of steps"):
        create("combine", tiny_encoders(), tasks=TASKS, conflicts=-1)


FIGHT = {
    "turn": {"name": "rotation", "weight": 0.5},
    "pairs": {"name": "contrastive", "width": 7},
    "words": {"name": "masked_language", "weight": 3.0},
}
ROWS = 8


def _conflicts(rank: int = 0, world: int = 1, parts: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(1)
    task = create("combine", tiny_encoders(), tasks=FIGHT, conflicts=1)
    local = ROWS // world
    own = {key: value[rank * local : (rank + 1) * local] for key, value in tiny_batch(ROWS).items()}
    inputs, random = task.transform(own, Draws(5, 3, local, share=rank, shares=world)), torch.get_rng_state()
    numbers = diagnosed(task, inputs, parts, reseed=torch.manual_seed)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in task.parameters())
    return numbers


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save([_conflicts(rank, world, parts) for parts in (1, 2)], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
def test_conflicts_are_cosines_of_the_gradients_of_each_alone_however_the_batch_is_cut(tmp_path: Path):
    torch.manual_seed(1)
    task = create("combine", tiny_encoders(), tasks=FIGHT, conflicts=1)
    assert task.diagnose_every == 1
    inputs = task.transform(tiny_batch(ROWS), Draws(5, 3, ROWS))
    alone = {}
    for name, given in FIGHT.items():
        task.zero_grad()
        (given.get("weight", 1.0) * task(inputs)[f"{name}/loss"]).backward()
        alone[name] = {
            modality: torch.cat([p.grad.flatten() for p in encoder.parameters()])
            for modality, encoder in task.encoders.items()
            if all(p.grad is not None for p in encoder.parameters())
        }
    cosine = torch.nn.functional.cosine_similarity
    norms = {name: torch.cat(list(own.values())).norm() for name, own in alone.items()}
    expected = {f"gradient_share/{name}": norm / sum(norms.values()) for name, norm in norms.items()}
    expected["conflict/turn_pairs"] = cosine(alone["turn"]["image"], alone["pairs"]["image"], 0)
    expected["conflict/pairs_words"] = cosine(alone["pairs"]["text"], alone["words"]["text"], 0)
    assert expected["conflict/turn_pairs"].abs() > 1e-3

    multiprocessing.set_forkserver_preload(["torch.distributed", "mmssl.training.loop", "mmssl.build"])
    torch.multiprocessing.start_processes(_process, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    cut = [
        _conflicts(),
        _conflicts(parts=4),
        *(part for rank in (0, 1) for part in torch.load(tmp_path / f"{rank}.pt")),
    ]
    for found in cut:
        assert found.keys() == expected.keys()  # rotation and masked language share no encoder
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)


def test_a_run_that_measures_conflicts_has_the_same_bits_and_logs_them_when_due():
    def trained(conflicts: int) -> tuple[dict[str, Tensor], list[dict]]:
        # BatchNorm in the image encoder, dropout in the text encoder, cached accumulation.
        changes = {"objective.conflicts": conflicts, "training.steps": 5, "training.log_every": 4}
        loaded = recipe.load(find_recipe(Path("rotation_contrastive_toy")), changes | {"training.accumulate": 2})
        torch.manual_seed(0)
        objective, loader = build(loaded)
        history = fit(objective, loader, loaded.training, quiet=True)
        return objective.state_dict(), history

    (state, history), (plain_state, plain) = trained(2), trained(0)
    assert all(torch.equal(value, plain_state[key]) for key, value in state.items())
    assert [record["step"] for record in history] == [2, 4, 5]
    assert [record["step"] for record in plain] == [4, 5]
    assert ["conflict/turn_match" in record for record in history] == [True, True, False]
    for record in plain:
        (same,) = (other for other in history if other["step"] == record["step"])
        assert {key: same[key] for key in record if "loss" in key} == {
            key: value for key, value in record.items() if "loss" in key
        }
