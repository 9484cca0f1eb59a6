"""NNCLR: neighbors from before the batch, the loss against loops over rows, and what tells that they are all one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from tiny_encoders import NormedImage, tiny_batch, tiny_encoders
from torch import Tensor, nn

from mmssl.errors import RecipeError
from mmssl.objectives import Objective, create
from mmssl.ops.draws import Draws
from mmssl.training.step import ForwardPass, accumulated_backward

SMALL = {"hidden": 16, "prediction_hidden": 12, "width": 7, "queue": 20}


def make(**hyper) -> Objective:
    torch.manual_seed(0)
    return create("nnclr", tiny_encoders(), **(SMALL | hyper))


def outputs(rows: int = 6, width: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z, p = (F.normalize(torch.randn(rows, 2, width, generator=generator, dtype=torch.float64), dim=-1) for _ in "zp")
    return {"z": z.requires_grad_(), "p": p.requires_grad_()}


@pytest.mark.usefixtures("double")
def test_loss_and_gradient_are_equation_3_with_scikit_learns_neighbors():
    task, given = make(temperature=0.3), outputs()
    losses = task.loss(given, {})
    losses["loss"].backward()
    assert given["z"].grad is None
    queue = NearestNeighbors(n_neighbors=1, metric="cosine").fit(task.queue.rows.numpy())
    again, expected = given["p"].detach().requires_grad_(), []
    for view in range(2):
        found = queue.kneighbors(given["z"][:, view].detach().numpy(), return_distance=False)[:, 0]
        for row in range(6):
            neighbor = task.queue.rows[int(found[row])]
            likeness = torch.stack([(neighbor @ again[k, 1 - view] / 0.3).exp() for k in range(6)])
            expected.append(-(likeness[row] / likeness.sum()).log())
        if view == 0:
            assert float(losses["neighbors"]) == len(set(found.tolist())) / 6
    mean = torch.stack(expected).mean()
    mean.backward()
    torch.testing.assert_close(losses["loss"], mean)
    torch.testing.assert_close(given["p"].grad, again.grad)
    assert again.grad.abs().max() > 1e-3


@pytest.mark.usefixtures("double")
def test_it_is_the_pseudocode_pass_by_pass_with_batch_statistics():
    """Algorithm 1 of the paper, in training mode: values, gradients of every parameter, and the queue afterwards."""
    torch.manual_seed(0)
    task = create("nnclr", {"image": NormedImage()}, **SMALL).train()
    twin = copy.deepcopy(task)
    inputs = task.transform(tiny_batch(8), Draws(0, 0, 8))
    inputs["views"][:, 1] *= 0.3
    before = task.queue.rows.clone()
    found = task(inputs)["loss"]
    found.backward()
    raw = [twin.projection(twin.encoder("image")(x).pooled) for x in inputs["views"].unbind(1)]
    z1, z2 = (F.normalize(z, dim=1) for z in raw)
    p1, p2 = (F.normalize(twin.prediction(z), dim=1) for z in raw)
    nn1, nn2 = (before[(z.detach() @ before.T).argmax(1)] for z in (z1, z2))
    own = torch.arange(8)
    expected = (F.cross_entropy(nn1 @ p2.T / 0.1, own) + F.cross_entropy(nn2 @ p1.T / 0.1, own)) / 2
    expected.backward()
    torch.testing.assert_close(found, expected)
    for (name, one), other in zip(task.named_parameters(), twin.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, msg=name)
    task.after_step(0.1)
    torch.testing.assert_close(task.queue.rows[:8], z1.detach())
    assert torch.equal(task.queue.rows[8:], before[8:])


def test_a_batch_meets_the_queue_from_before_it():
    task, given = make().double(), outputs()
    before, first = task.queue.rows.clone(), task.loss(given, {})["loss"]
    assert torch.equal(task.queue.rows, before)
    torch.testing.assert_close(task.loss(given, {})["loss"], first)
    task.after_step(0.5)
    # Now every first view finds itself.
    torch.testing.assert_close(task.queue.rows[task.neighbors(given["z"][:, 0])], given["z"][:, 0].detach())
    task.eval().loss(given, {})
    rows = task.queue.rows.clone()
    task.after_step(0.6)
    assert torch.equal(task.queue.rows, rows)  # evaluation enters nothing


def test_micro_batches_fill_the_queue_as_one_batch_does():
    queues = []
    for parts in (1, 4):
        task = make()
        inputs = task.transform(tiny_batch(8), Draws(0, 0, 8))
        for module in task.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        accumulated_backward(ForwardPass(task), inputs, parts)
        task.after_step(0.5)
        queues.append(task.queue.rows)
        assert int(task.queue.pointer) == 8
    torch.testing.assert_close(*queues)


def test_one_neighbor_for_all_is_chance_and_told():
    task, given = make().double(), outputs()
    task.queue.rows.zero_()[3, 0] = 1  # exact on every machine, where rows that are alike tie or nearly tie
    given["z"] = torch.cat([torch.ones(6, 2, 1), given["z"].detach()[..., 1:]], dim=-1)
    losses = task.loss(given, {})
    assert losses["neighbors"] == pytest.approx(1 / 6)
    blind = task.loss({key: torch.zeros_like(value) for key, value in given.items()}, {})
    assert blind["loss"] == pytest.approx(task.chance(6).loss) == pytest.approx(math.log(6))
    assert losses["loss"] > math.log(6) - 0.5  # a constant question has no answer


def test_heads_are_the_published_ones():
    task = create("nnclr", tiny_encoders(), queue=8)
    shapes = [(m.in_features, m.out_features) for m in (*task.projection, *task.prediction) if isinstance(m, nn.Linear)]
    assert shapes == [(6, 2048), (2048, 2048), (2048, 256), (256, 4096), (4096, 256)]
    kinds = [type(m).__name__ for m in task.projection]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [type(m).__name__ for m in task.prediction] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


def test_preview_asks_by_the_neighbor():
    task = make(width=3, queue=3)
    inputs = task.transform(tiny_batch(3), Draws(0, 0, 3))
    task.queue.rows.copy_(torch.eye(3))
    z, p = torch.eye(3)[:, None].expand(3, 2, 3), torch.eye(3)[[1, 0, 2]][:, None].expand(3, 2, 3)
    first, second, nearest = task.preview(inputs, {"z": z, "p": p})
    assert first.cells[0].shape == (3, 12, 12)
    assert torch.equal(nearest.cells[0], second.cells[1])
    assert nearest.right == [False, False, True]


def test_refuses_other_modalities():
    with pytest.raises(RecipeError, match="reads text"):
        make(encoder="text")
