"""BatchNorm sees one view at a time, as in the published code of tasks of two views; in SimCLR's it sees both.

The references are written from the papers' pseudocode, pass by pass, in training mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import NormedImage, tiny_batch
from torch import Tensor

from mmssl.modules.views import encode_views
from mmssl.objectives import Objective, create
from mmssl.ops.draws import Draws

ROWS = 6
HEADS = {"hidden": 8, "width": 5}


def byol(task: Objective, a: Tensor, b: Tensor) -> Tensor:
    def online(x: Tensor) -> Tensor:
        return F.normalize(task.prediction(task.projection(task.encoder("image")(x).pooled)), dim=1)

    def target(x: Tensor) -> Tensor:
        return F.normalize(task.target["projection"](task.target["encoder"](x).pooled), dim=1).detach()

    first, second, t1, t2 = online(a), online(b), target(a), target(b)
    return (first - t2).square().sum(1).mean() + (second - t1).square().sum(1).mean()


def simsiam(task: Objective, a: Tensor, b: Tensor) -> Tensor:
    z1, z2 = (task.projection(task.encoder("image")(x).pooled) for x in (a, b))
    p1, p2 = task.prediction(z1), task.prediction(z2)
    cosine = F.cosine_similarity
    return -(cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()) / 2


def barlow_twins(task: Objective, a: Tensor, b: Tensor) -> Tensor:
    z1, z2 = (task.projection(task.encoder("image")(x).pooled) for x in (a, b))
    norm = torch.nn.BatchNorm1d(z1.shape[1], affine=False)
    c = norm(z1).T @ norm(z2) / len(z1)
    off = c[~torch.eye(len(c), dtype=torch.bool)]
    return (c.diagonal() - 1).square().sum() + 0.0051 * off.square().sum()


def vicreg(task: Objective, a: Tensor, b: Tensor) -> Tensor:
    z1, z2 = (task.expander(task.encoder("image")(x).pooled) for x in (a, b))
    loss = 25 * F.mse_loss(z1, z2)
    for z in (z1, z2):
        loss = loss + 25 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        covariance = torch.cov(z.T)
        loss = loss + (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]
    return loss


def moco_v3(task: Objective, a: Tensor, b: Tensor) -> Tensor:
    q1, q2 = (F.normalize(task.prediction(task.projection(task.encoder("image")(x).pooled)), dim=1) for x in (a, b))
    with torch.no_grad():
        k1, k2 = (F.normalize(task.teacher["projection"](task.teacher["encoder"](x).pooled), dim=1) for x in (a, b))
    own = torch.arange(len(a))
    return sum(2 * task.temperature * F.cross_entropy(q @ k.T / task.temperature, own) for q, k in ((q1, k2), (q2, k1)))


def simclr(task: Objective, a: Tensor, b: Tensor) -> Tensor:
    """Chen et al., algorithm 1, where one pass normalizes both views together."""
    z = F.normalize(task.projection(task.encoder("image")(torch.cat([a, b])).pooled), dim=1)
    logits = (z @ z.T / 0.1).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))


CASES: dict[str, tuple[str, dict, Callable]] = {
    "byol": ("byol", HEADS, byol),
    "simsiam": ("simsiam", HEADS | {"bottleneck": 4}, simsiam),
    "barlow_twins": ("barlow_twins", HEADS, barlow_twins),
    "vicreg": ("vicreg", HEADS, vicreg),
    "moco_v3": ("moco", HEADS | {"form": "v3"}, moco_v3),
    "simclr": ("simclr", HEADS, simclr),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_statistics_are_those_of_the_published_passes(name):
    kind, hyper, reference = CASES[name]
    torch.manual_seed(0)
    task = create(kind, {"image": NormedImage()}, **hyper).train()
    twin = copy.deepcopy(task)
    inputs = task.transform(tiny_batch(ROWS), Draws(0, 0, ROWS))
    # A view that is darker than the other: together they have other statistics than each alone.
    inputs["views"][:, 1] *= 0.3
    found = task(inputs)["loss"]
    expected = reference(twin, *inputs["views"].unbind(1))
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for (path, own), other in zip(task.named_parameters(), twin.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), path
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad)
    for own, other in zip(task.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", [name for name in CASES if name != "simclr"])
def test_one_pass_of_both_views_would_be_another_loss(name):
    kind, hyper, _ = CASES[name]
    torch.manual_seed(0)
    task = create(kind, {"image": NormedImage()}, **hyper).train()
    views = torch.rand(ROWS, 2, 3, 12, 12)
    views[:, 1] *= 0.3
    apart = task({"views": views})["loss"].item()
    task.each_view = lambda inputs, encoder, *heads: together(inputs["views"], encoder, *heads)
    assert task({"views": views})["loss"].item() != pytest.approx(apart, rel=0.01)


def together(views: Tensor, encoder: torch.nn.Module, *heads: torch.nn.Module) -> Tensor:
    z = encode_views(encoder, views).flatten(0, 1)
    for head in heads:
        z = head(z)
    return z.unflatten(0, views.shape[:2])


def test_on_a_cpu_both_views_take_one_pass_through_the_network():
    task = create("byol", {"image": NormedImage()}, **HEADS).train()
    calls: list[int] = []
    for encoder in (task.encoder("image"), task.target["encoder"]):
        encoder.register_forward_hook(lambda module, given, made: calls.append(len(given[0])))
    task({"views": torch.rand(ROWS, 2, 3, 12, 12)})
    assert calls == [2 * ROWS, 2 * ROWS]
    assert not any("forward" in vars(part) for part in task.modules())  # each is its own again
