"""SimSiam: the gradient that is not there keeps it from collapsing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import tiny_batch, tiny_encoders
from torch import Tensor, nn

from mmssl.errors import RecipeError
from mmssl.objectives import Objective, create
from mmssl.ops.draws import Draws
from mmssl.recipe import Optimizer
from mmssl.training.optim import make_optimizer, set_lr


def make(**hyper: Any) -> Objective:
    torch.manual_seed(0)
    name = hyper.get("encoder", "image")
    return create("simsiam", {name: tiny_encoders()[name]}, **{"width": 16, "bottleneck": 4, **hyper})


def test_it_is_minus_the_mean_cosine_with_the_other_view_and_half_its_gradient():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    z = torch.randn(5, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = make().loss({"p": F.normalize(p, dim=-1), "z": F.normalize(z, dim=-1)}, {})["loss"]
    loss.backward()
    assert z.grad is None
    reference = torch.nn.CosineSimilarity(dim=1)
    with torch.no_grad():
        expected = -(reference(p[:, 0], z[:, 1]).mean() + reference(p[:, 1], z[:, 0]).mean()) / 2
    torch.testing.assert_close(loss.detach(), expected)
    for i in range(5):
        for view in range(2):
            own, other = p[i, view].detach(), z[i, 1 - view].detach()
            own_unit, other_unit = own / own.norm(), other / other.norm()
            along = (own_unit @ other_unit) * own_unit
            torch.testing.assert_close(p.grad[i, view], -(other_unit - along) / own.norm() / 10)


def test_from_minus_one_for_the_same_to_zero_at_a_right_angle():
    a, b = torch.eye(6)[:3], torch.eye(6)[3:]
    p = torch.stack([a, b], dim=1)
    assert make().loss({"p": p, "z": p.flip(1)}, {})["loss"] == -1
    assert make().loss({"p": p, "z": p}, {})["loss"] == make().chance(3).loss == 0


@pytest.mark.parametrize("encoder", ["image", "audio"])
def test_each_view_goes_through_one_network(encoder):
    task = make(encoder=encoder).train()
    assert task.needs == (encoder,)
    inputs = task.transform(tiny_batch(7), Draws(0, 0, 7))
    outputs = task.predict(inputs)
    assert outputs["p"].shape == outputs["z"].shape == (7, 2, 16)
    with torch.no_grad():
        for view in range(2):
            parts = [inputs[key][:, view] for key in ("views", "valid") if key in inputs]
            z = task.projection(task.encoder(encoder)(*parts).pooled)
            torch.testing.assert_close(outputs["z"][:, view], F.normalize(z, dim=1))
            torch.testing.assert_close(outputs["p"][:, view], F.normalize(task.prediction(z), dim=1))
    task.loss(outputs, inputs)["loss"].backward()
    assert all(p.grad is not None for p in task.parameters())


def test_heads_are_the_published_ones():
    task = create("simsiam", tiny_encoders())
    shape = [(m.in_features, m.out_features, m.bias is not None) for m in task.modules() if isinstance(m, nn.Linear)]
    head, predictor = [(6, 6, False), (6, 6, False), (6, 2048, False)], [(2048, 512, False), (512, 2048, True)]
    assert shape[-5:] == head + predictor
    norms = [m.affine for m in task.modules() if isinstance(m, nn.BatchNorm1d)]
    assert norms == [True, True, False, True]
    assert isinstance(task.projection[-1], nn.BatchNorm1d)
    assert [(v.strength, v.area, v.solarize) for v in task.views.settings] == [(0.5, (0.2, 1.0), 0.0)] * 2


@pytest.mark.parametrize("fixed", [True, False])
def test_the_predictor_keeps_its_learning_rate(fixed):
    task = make(fix_pred_lr=fixed)
    optimizer = make_optimizer(task, Optimizer(name="sgd", lr=0.4))
    set_lr(optimizer, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in task.prediction.parameters()} == {0.4 if fixed else 0.1}
    assert {rates[id(p)] for p in task.projection.parameters()} == {0.1}


def test_spread_is_one_at_the_start_and_zero_when_collapsed():
    random = F.normalize(torch.randn(512, 2, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    losses = make().loss({"p": random, "z": random}, {})
    assert losses["spread"] == pytest.approx(1, abs=0.01)
    assert float(random.flatten(0, 1).std(0).mean()) == pytest.approx(1 / math.sqrt(64), rel=0.01)
    same = torch.ones(8, 2, 4) / 2
    losses = make().loss({"p": same, "z": same}, {})
    assert losses["loss"] == -1
    assert losses["spread"] == pytest.approx(0, abs=1e-6)
    assert losses["ranking"] == make().chance(8).metrics["ranking"] == 0.5


class Flowing(Tensor):
    """Outputs whose gradient nothing stops."""

    def detach(self) -> Tensor:
        return self


def train_on_unrelated_views(stop: bool) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    task = make(width=32, bottleneck=8).train()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.05, momentum=0.9)
    history = []
    for _ in range(200):
        outputs = task.predict({"views": torch.rand(32, 2, 3, 12, 12, generator=generator)})
        if not stop:
            outputs["z"] = outputs["z"].as_subclass(Flowing)
        losses = task.loss(outputs, {})
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({key: value.item() for key, value in losses.items()})
    return {key: sum(record[key] for record in history[-10:]) / 10 for key in history[0]}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_only_the_stopped_gradient_keeps_it_from_collapsing():
    # The two views have nothing in common, so that nothing but a constant answer brings the loss toward -1.
    stopped, flowing = train_on_unrelated_views(stop=True), train_on_unrelated_views(stop=False)
    assert stopped["loss"] > -0.5
    assert stopped["spread"] > 0.85
    assert -1 <= flowing["loss"] < -0.6
    assert flowing["spread"] < 0.75
    assert flowing["ranking"] == pytest.approx(0.5, abs=0.05)


def test_preview_finds_the_nearest_projection():
    task = make()
    inputs = task.transform(tiny_batch(3), Draws(0, 0, 3))
    z = torch.eye(3)[[1, 0, 2]][:, None].expand(3, 2, 3)
    first, second, nearest = task.preview(inputs, {"p": torch.eye(3)[:, None].expand(3, 2, 3), "z": z})
    assert first.cells[0].shape == (3, 12, 12)
    assert torch.equal(nearest.cells[0], second.cells[1])
    assert torch.equal(nearest.cells[2], second.cells[2])


def test_refuses_other_modalities():
    with pytest.raises(RecipeError, match="reads text"):
        make(encoder="text")
