"""SigLIP 2 as a combination: sigmoid pairs and captions, with self-distillation that joins late on the same encoder."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from tiny_encoders import TinyCausal, TinyCross, TinyImage, TinyText, tiny_batch
from torch import Tensor

from mmssl.errors import Interrupted
from mmssl.objectives import Objective, create
from mmssl.objectives.base import Step
from mmssl.ops.draws import Draws
from mmssl.recipe import Training
from mmssl.training.loop import fit

STEPS, START, ROWS = 8, 5, 8
DISTIL = {"name": "dino", "prototypes": 12, "hidden": 8, "bottleneck": 4, "local_crops": 1, "freeze_last": 0.0}
TASKS: dict[str, dict[str, Any]] = {
    "pairs": {"name": "contrastive", "form": "siglip", "width": 7, "views": {"area": None}},
    "caption": {"name": "captioning", "b": "words", "weight": 0.7},
    "distil": DISTIL | {"momentum": 0.5, "local_views": {"size": 8}, "weight": 0.25},
}
LATE = TASKS | {"distil": TASKS["distil"] | {"steps": [START, None]}}


class Data:
    def batches(self, start: int, stop: int):
        for step in range(start, stop):
            yield tiny_batch(ROWS, step)


class Stops(Data):
    def batches(self, start: int, stop: int):
        for step, batch in enumerate(super().batches(start, stop), start):
            if step == START - 2:
                os.kill(os.getpid(), 15)
            yield batch


def settings() -> Training:
    values = {"steps": STEPS, "batch_size": ROWS, "precision": "fp64", "log_every": 1, "save_every": 100}
    return Training.model_validate(values | {"optimizer": {"lr": 0.02}})


def combination(tasks: dict[str, dict[str, Any]]) -> Objective:
    torch.manual_seed(0)
    encoders = {"image": TinyImage(), "text": TinyText(), "words": TinyCausal(), "fusion": TinyCross()}
    return create("combine", encoders, tasks=tasks)


def gradient(task: Objective, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*((n, p) for n, p in task.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


@pytest.mark.usefixtures("double")
def test_its_gradients_are_the_weighted_sum_of_those_of_each_task_alone():
    task = combination(TASKS)
    batch = tiny_batch(ROWS)
    inputs = task.transform(batch, Draws(0, 0, ROWS))
    whole = gradient(task, task(inputs)["loss"])
    total: dict[str, Tensor] = {}
    for name, part in task.tasks.items():
        own = part(part.transform(batch, Draws(0, 0, ROWS).named(name)))
        for key, value in gradient(task, own["loss"]).items():
            total[key] = total.get(key, 0) + TASKS[name].get("weight", 1.0) * value
    assert whole.keys() == total.keys()
    for key, value in whole.items():
        torch.testing.assert_close(value, total[key], rtol=1e-9, atol=1e-12)
    assert sum(key.startswith("encoders.image") for key in whole) == 4


def test_the_teacher_begins_as_the_encoder_of_that_step_and_goes_along_its_stage(monkeypatch):
    task = combination(LATE)
    distil = task.tasks["distil"]
    image, taught = task.encoder("image"), distil.teacher["encoder"]
    before, after = task.before_step, distil.after_step
    alike: list[bool] = []
    seen: list[float] = []

    def before_step(step: Step) -> None:
        before(step)
        alike.append(all(torch.equal(*two) for two in zip(image.parameters(), taught.parameters(), strict=True)))

    monkeypatch.setattr(task, "before_step", before_step)
    monkeypatch.setattr(distil, "after_step", lambda progress: (seen.append(progress), after(progress)))
    fit(task, Data(), settings(), quiet=True)
    assert alike == [True, *[False] * (START - 1), True, False, False]  # at first nobody has learned anything
    assert seen == pytest.approx([1 / 3, 2 / 3, 1])
    assert float(distil.progress) == 1


def test_a_run_that_stops_before_the_stage_goes_on_to_the_same_bits(tmp_path):
    whole = combination(LATE)
    expected = fit(whole, Data(), settings(), tmp_path / "whole", quiet=True)
    assert ["distil/loss" in record for record in expected[1:]] == [False] * START + [True] * (STEPS - START)
    assert expected[-1]["same_rows/loss"] < expected[0]["loss"]
    with pytest.raises(Interrupted):
        fit(combination(LATE), Stops(), settings(), tmp_path / "parts", quiet=True)
    torch.manual_seed(99)
    again = combination(LATE)
    history = fit(again, Data(), settings(), tmp_path / "parts", resume=True, quiet=True)
    assert [record["loss"] for record in history] == [record["loss"] for record in expected]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())
