"""SwAV: assignments as in the published code, the loss against loops over pairs, the queue, prototypes that stay."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import tiny_batch, tiny_encoders
from torch import Tensor, nn

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.invariance.swav import SwAV
from mmssl.ops.draws import Draws
from mmssl.training.step import ForwardPass, accumulated_backward

K, ROWS = 9, 6
SMALL = {"prototypes": K, "hidden": 12, "width": 5, "local_crops": 2, "local_views": {"size": 8}}


def make(**hyper) -> SwAV:
    torch.manual_seed(0)
    return create("swav", tiny_encoders(), **(SMALL | hyper))


def audio(**hyper) -> SwAV:
    return make(encoder="audio", local_views=None, **hyper)


def outputs(task: SwAV, crops: int = 8, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(rows, crops, 5, generator=generator, dtype=torch.float64), dim=-1)
    scores = (z @ task.prototypes.weight.detach().double().T).requires_grad_()
    return {"scores": scores, "z": z[:, :2]}


def published(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn-Knopp as the paper's appendix writes it, with exponentials: (N, K) -> (N, K)."""
    plan = (scores / epsilon).exp().T
    plan = plan / plan.sum()
    k, n = plan.shape
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True) / k
        plan = plan / plan.sum(0, keepdim=True) / n
    return (plan * n).T


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("iterations", [1, 3])
def test_loss_and_gradient_are_those_of_every_pair_and_of_the_published_assignment(iterations):
    task = make(iterations=iterations)
    given = outputs(task)
    losses = task.loss(given, {})
    losses["loss"].backward()
    again, terms = given["scores"].detach().requires_grad_(), []
    for i in range(2):
        wanted = published(again[:, i].detach(), 0.05, iterations)
        torch.testing.assert_close(wanted.sum(1), torch.ones(ROWS))
        for j in range(8):
            if i != j:
                terms.append(-(wanted * (again[:, j] / 0.1).softmax(1).log()).sum(1).mean())
    assert len(terms) == 14
    expected = sum(terms) / 14
    expected.backward()
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(given["scores"].grad, again.grad)
    assert again.grad.abs().max() > 1e-3
    assert given["z"].grad is None


def test_prototypes_get_equal_shares_where_rows_are_many():
    task = make(prototypes=4, iterations=50, epsilon=0.2).double()
    wanted = task.assigned(outputs(task, rows=64)["scores"][:, :2])
    assert not wanted.requires_grad
    torch.testing.assert_close(wanted.mean(0), torch.full((2, 4), 0.25, dtype=torch.float64))
    torch.testing.assert_close(wanted.sum(2), torch.ones(64, 2, dtype=torch.float64))


@pytest.mark.usefixtures("double")
def test_the_queue_takes_part_once_it_is_full_and_it_is_time():
    task = make(queue=10, queue_start=0.5).train()
    first, second = outputs(task), outputs(task)
    second["z"] = second["z"].flip(0)
    alone = task.assigned(first["scores"][:, :2])
    for progress, given in ((0.6, first), (0.3, second), (0.6, None)):
        torch.testing.assert_close(task.assigned(first["scores"][:, :2]), alone)
        if given is not None:
            task.loss(given, {})
            task.after_step(progress)
    task.progress.fill_(0.6)
    earlier = torch.cat([first["z"], second["z"]])[-10:]  # in whatever order
    expected = []
    for view in range(2):
        everyone = torch.cat([earlier[:, view] @ task.prototypes.weight.T, first["scores"][:, view].detach()])
        expected.append(published(everyone, 0.05, 3)[-ROWS:])
    found = task.assigned(first["scores"][:, :2])
    torch.testing.assert_close(found, torch.stack(expected, 1))
    assert (found - alone).abs().max() > 1e-3
    task.progress.fill_(0.4)
    torch.testing.assert_close(task.assigned(first["scores"][:, :2]), alone)


def test_prototypes_stay_at_first_and_are_unit_vectors_after_each_step():
    task = make(freeze=0.1)
    inputs = task.transform(tiny_batch(ROWS), Draws(0, 0, ROWS))
    for progress, frozen in ((0.0, True), (0.09, True), (0.1, False)):
        task.progress.fill_(progress)
        task.zero_grad()
        task(inputs)["loss"].backward()
        assert (task.prototypes.weight.grad.abs().max() == 0) == frozen
        assert task.projection[0].weight.grad.abs().max() > 0
    with torch.no_grad():
        task.prototypes.weight.mul_(3)
    task.after_step(0.2)
    torch.testing.assert_close(task.prototypes.weight.norm(dim=1), torch.ones(K))


@pytest.mark.parametrize("task", [make, audio])
def test_all_crops_are_scored_and_the_large_ones_assigned(task):
    task = task().eval()
    inputs = task.transform(tiny_batch(ROWS), Draws(0, 0, ROWS))
    assert inputs["views"].shape[:2] == inputs["local"].shape[:2] == (ROWS, 2)
    assert inputs["local"].shape[-1] < inputs["views"].shape[-1]
    found = task.predict(inputs)
    assert found["scores"].shape == (ROWS, 4, K)
    assert found["z"].shape == (ROWS, 2, 5)
    encoder = task.encoder(task.name)
    with torch.no_grad():
        for i, (views, valid) in enumerate((("views", "valid"), ("local", "local_valid"))):
            for view in range(2):
                parts = [inputs[key][:, view] for key in (views, valid) if key in inputs]
                z = F.normalize(task.projection(encoder(*parts).pooled), dim=1)
                cosine = z @ F.normalize(task.prototypes.weight, dim=1).T
                torch.testing.assert_close(found["scores"][:, 2 * i + view], cosine)
        panels = task.preview(inputs, found)
    assert [panel.title for panel in panels][-1] == "prototypes of 1 and 2"
    assert all(len(panel.cells) == ROWS for panel in panels)


def test_published_settings():
    task = create("swav", tiny_encoders())
    assert [(v.area, v.strength, v.saturation, v.blur) for v in task.views.settings] == [
        ((0.14, 1.0), 1.0, 0.8, 0.5)
    ] * 2
    assert [view.area for view in task.local_views.settings] == [(0.05, 0.14)] * 6
    linear = [
        (m.in_features, m.out_features, m.bias is None)
        for m in (*task.projection, task.prototypes)
        if isinstance(m, nn.Linear)
    ]
    assert linear == [(6, 2048, False), (2048, 128, False), (128, 3000, True)]
    assert len([m for m in task.projection if isinstance(m, nn.BatchNorm1d)]) == 1


def test_micro_batches_fill_the_queue_as_one_batch_does():
    queues = []
    for parts in (1, 4):
        task = make(queue=12).train()
        for module in task.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        accumulated_backward(ForwardPass(task), task.transform(tiny_batch(8), Draws(0, 0, 8)), parts)
        task.after_step(0.5)
        queues.append(task.queue.rows)
    assert (queues[0][:8].unflatten(1, (2, 5)).norm(dim=2) > 0.99).all()
    assert not queues[0][8:].any()
    torch.testing.assert_close(*queues)


def test_one_point_is_ln_k_and_told():
    task = make().double()
    given = {key: torch.ones_like(value) for key, value in outputs(task).items()}
    losses = task.loss(given, {})
    assert losses["loss"] == pytest.approx(task.chance(ROWS).loss) == pytest.approx(math.log(K))
    assert losses["perplexity"] == pytest.approx(K)
    assert losses["spread"] == pytest.approx(0, abs=1e-6)
    one = torch.zeros(ROWS, 8, K, dtype=torch.float64)
    one[..., 3] = 9.0
    assert task.loss(given | {"scores": one}, {})["perplexity"] == pytest.approx(1)


def test_refuses_other_modalities():
    with pytest.raises(RecipeError, match="swav compares crops of images or of sounds, and the encoder 'video' reads"):
        make(encoder="video")
