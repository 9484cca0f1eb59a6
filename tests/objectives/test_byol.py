"""BYOL: both directions, a target without gradient, and what tells collapse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import tiny_batch, tiny_encoders
from torch import Tensor, nn

from mmssl.errors import RecipeError
from mmssl.objectives import Objective, create
from mmssl.ops.draws import Draws


def make(**hyper: Any) -> Objective:
    torch.manual_seed(0)
    name = hyper.get("encoder", "image")
    return create("byol", {name: tiny_encoders()[name]}, **{"hidden": 10, "width": 6, **hyper})


def loss_of(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    return make().loss({"prediction": prediction, "target": target}, {})


def test_from_0_for_the_same_over_4_at_a_right_angle_to_8_for_the_opposite():
    a, b = torch.eye(6)[:3], torch.eye(6)[3:]
    prediction = torch.stack([a, b], dim=1)
    target = prediction.flip(1)  # the target of a view is asked of the other
    assert loss_of(prediction, target)["loss"] == 0
    assert loss_of(prediction, prediction)["loss"] == make().chance(3).loss == 4
    assert loss_of(prediction, -target)["loss"] == 8
    one_way = loss_of(torch.stack([a, a], dim=1), torch.stack([b, a], dim=1))["loss"]
    assert one_way == 2  # one direction answers, the other is at a right angle


def test_it_is_the_squared_distance_of_normalized_vectors_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(5, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = loss_of(F.normalize(raw, dim=-1), F.normalize(target, dim=-1))["loss"]
    loss.backward()
    assert target.grad is None
    expected = 0.0
    for i in range(5):
        for view in range(2):
            p, t = raw[i, view].detach(), target[i, 1 - view].detach()
            p_unit, t_unit = p / p.norm(), t / t.norm()
            expected += float((p_unit - t_unit).square().sum()) / 5
            along = (p_unit @ t_unit) * p_unit
            torch.testing.assert_close(raw.grad[i, view], -2 * (t_unit - along) / p.norm() / 5)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("encoder", ["image", "audio"])
def test_the_target_is_the_copy_s_projection_and_takes_no_gradient(encoder):
    task = make(encoder=encoder).train()
    assert task.needs == (encoder,)
    inputs = task.transform(tiny_batch(7), Draws(0, 0, 7))
    state = {name: value.clone() for name, value in task.state_dict().items()}
    outputs = task.predict(inputs)
    assert outputs["prediction"].shape == outputs["target"].shape == (7, 2, 6)
    assert not outputs["target"].requires_grad
    task.loss(outputs, inputs)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in task.target.parameters())
    assert all(p.grad is not None for name, p in task.named_parameters() if not name.startswith("target."))
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, state[name])}
    assert "target.projection.1.running_mean" in changed  # in training mode, with statistics of its own

    task.load_state_dict(state)
    with torch.no_grad():  # the copy is equal at the start: its projection is what the online network projects
        for view in range(2):
            parts = [inputs[key][:, view] for key in ("views", "valid") if key in inputs]
            z = task.projection(task.encoder(encoder)(*parts).pooled)
            torch.testing.assert_close(outputs["target"][:, view], F.normalize(z, dim=1))
            torch.testing.assert_close(outputs["prediction"][:, view], F.normalize(task.prediction(z), dim=1))


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.996), (0.5, 0.998), (1.0, 1.0)])
def test_the_target_follows_from_tau_to_one(progress, share):
    task = make()
    before = {name: p.clone() for name, p in task.target.named_parameters()}
    with torch.no_grad():
        for p in task.parameters():
            if p.requires_grad:
                p += torch.randn_like(p)
        task.after_step(progress)
    online = nn.ModuleDict({"encoder": task.encoder("image"), "projection": task.projection})
    assert before.keys() == {name for name, _ in online.named_parameters()}
    for name, own in task.target.named_parameters():
        torch.testing.assert_close(own, share * before[name] + (1 - share) * online.get_parameter(name))


def test_views_are_the_published_ones():
    first, second = make().views.settings
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert {v.strength * v.saturation for v in (first, second)} == {0.2}  # of saturation, where SimCLR has 0.8
    assert {0.8 * v.strength for v in (first, second)} == {0.4}  # of brightness and contrast
    assert first.area == (0.08, 1.0)


def test_collapse_shows_in_spread_and_ranking_where_the_loss_is_best():
    same = torch.ones(8, 2, 4) / 2
    losses = loss_of(same, same)
    assert losses["loss"] == pytest.approx(0, abs=1e-6)
    assert losses["spread"] == pytest.approx(0, abs=1e-6)
    assert losses["ranking"] == make().chance(8).metrics["ranking"] == 0.5
    apart = torch.eye(8)[:, None].expand(8, 2, 8)
    losses = loss_of(apart, apart)
    assert (losses["loss"], losses["ranking"]) == (0, 1)
    assert losses["spread"] > 0.9


def test_preview_finds_the_nearest_target():
    task = make()
    inputs = task.transform(tiny_batch(3), Draws(0, 0, 3))
    target = torch.eye(3)[[1, 0, 2]][:, None].expand(3, 2, 3)
    outputs = {"prediction": torch.eye(3)[:, None].expand(3, 2, 3), "target": target}
    first, second, nearest = task.preview(inputs, outputs)
    assert first.cells[0].shape == (3, 12, 12)
    assert torch.equal(nearest.cells[0], second.cells[1])
    assert torch.equal(nearest.cells[2], second.cells[2])


def test_refuses_other_modalities():
    with pytest.raises(RecipeError, match="reads text"):
        make(encoder="text")
