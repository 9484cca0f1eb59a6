"""Several tasks at once: the weighted sum of what each would be alone."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws

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
        ({}, r"needs at least one task"),
    ],
)
def test_errors_name_the_task(tasks, message):
    with pytest.raises(RecipeError, match=message):
        create("combine", tiny_encoders(), tasks=tasks)
