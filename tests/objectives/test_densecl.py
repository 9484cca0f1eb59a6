"""DenseCL: the loss against loops over places, matches by the encoder's own features, two queues, nothing betrayed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import NormedImage, TinyImage, tiny_batch, tiny_encoders
from torch import Tensor, nn

from mmssl.encoders.base import Features
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.invariance.densecl import DenseCL, _lit
from mmssl.ops.draws import Draws
from mmssl.training.step import ForwardPass, accumulated_backward

SMALL = {"hidden": 9, "width": 7, "queue": 20}


def make(**hyper) -> DenseCL:
    torch.manual_seed(0)
    return create("densecl", {"image": TinyImage()}, **(SMALL | hyper))


@pytest.mark.usefixtures("double")
def test_loss_and_gradients_are_those_of_loops_over_images_and_places():
    task = make(dense=0.3).train()
    inputs = task.transform(tiny_batch(5), Draws(0, 0, 5))
    with torch.no_grad():  # another network than the one that asks
        for parameter in task.teacher.parameters():
            parameter.mul_(1.1)
    losses = task(inputs)
    losses["loss"].backward()
    mine = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()

    def contrast(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        share = torch.cat([(query @ key)[None], queue @ query]).div(0.2).exp()
        return -(share[0] / share.sum()).log()

    net, copied = task.encoder("image"), task.teacher
    images, places, right = [], [], []
    for first, second in inputs["views"]:
        asked, answered = net(first[None]), copied["encoder"](second[None])
        query = F.normalize(task.projection(asked.pooled)[0], dim=0)
        key = F.normalize(copied["projection"](answered.pooled)[0], dim=0).detach()
        images.append(contrast(query, key, task.queue.rows))
        for place in asked.tokens[0]:
            likeness = [float(F.cosine_similarity(place, other, dim=0).detach()) for other in answered.tokens[0]]
            match = answered.tokens[0, max(range(len(likeness)), key=likeness.__getitem__)]
            query = F.normalize(task.dense_projection(place), dim=0)
            key = F.normalize(copied["dense_projection"](match), dim=0).detach()
            places.append(contrast(query, key, task.dense_queue.rows))
            right.append(float(query @ key > (task.dense_queue.rows @ query).max()))
    assert len(places) == 5 * 4
    plain = 0.7 * torch.stack(images).mean() + 0.3 * torch.stack(places).mean()
    plain.backward()
    torch.testing.assert_close(losses["loss"], plain)
    torch.testing.assert_close(losses["loss_dense"], torch.stack(places).mean())
    assert float(losses["accuracy_dense"]) == pytest.approx(sum(right) / len(right))
    assert len(mine) == 12
    for name, gradient in mine.items():
        torch.testing.assert_close(task.get_parameter(name).grad, gradient, msg=name)


class Painted(TinyImage):
    """Four places, whose features are the colors of the view's quarters."""

    dim = 3

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        tokens = F.adaptive_avg_pool2d(x.to(self.first.weight.dtype), 2).flatten(2).mT
        return Features(tokens, tokens.mean(1), (2, 2))


def test_a_place_is_matched_with_the_one_that_looks_alike():
    torch.manual_seed(0)
    task = create("densecl", {"image": Painted()}, **SMALL)
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])

    def painted(order: list[int]) -> Tensor:
        return colors[order].T.view(3, 2, 2).repeat_interleave(6, 1).repeat_interleave(6, 2)

    views = torch.stack([painted([0, 1, 2, 3]), painted([2, 0, 3, 1])])[None].repeat(2, 1, 1, 1, 1)
    outputs = task.predict({"views": views})
    assert outputs["match"].tolist() == [[1, 3, 0, 2]] * 2
    assert not any(outputs[key].requires_grad for key in ("k", "mean_k", "dense_k", "match"))
    # Alike under an equal head, each place is its match's key.
    torch.testing.assert_close(outputs["dense_q"], outputs["dense_k"][:, [1, 3, 0, 2]])


def test_the_queues_keep_keys_of_images_and_means_over_places():
    for parts in (1, 2):
        task = make().train()
        inputs = task.transform(tiny_batch(4), Draws(0, 0, 4))
        outputs = task.predict(inputs)
        before = task.dense_queue.rows.clone()
        accumulated_backward(ForwardPass(task), inputs, parts)
        assert torch.equal(task.dense_queue.rows, before)
        task.after_step(0.5)
        torch.testing.assert_close(task.queue.rows[:4], outputs["k"][:, 0])
        with torch.no_grad():
            tokens = task.teacher["encoder"](inputs["views"][:, 1]).tokens
            mean = F.normalize(make().teacher["dense_projection"](tokens).mean(1), dim=1)
        torch.testing.assert_close(task.dense_queue.rows[:4], mean, atol=2e-2, rtol=0)  # the copy has moved a little
        assert torch.equal(task.dense_queue.rows[4:], before[4:])


def test_the_copy_follows_with_both_heads():
    task = make(momentum=0.9).train()
    before = {name: p.clone() for name, p in task.teacher.named_parameters()}
    with torch.no_grad():
        for p in task.parameters():
            if p.requires_grad:
                p.add_(1.0)
    task.after_step(0.5)
    assert {name.partition(".")[0] for name in before} == {"encoder", "projection", "dense_projection"}
    for name, p in task.teacher.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.1)


@pytest.mark.usefixtures("double")
def test_batch_statistics_of_a_query_are_not_those_of_its_places_keys():
    torch.manual_seed(0)
    task = create("densecl", {"image": NormedImage()}, **(SMALL | {"queue": 64})).train()
    assert task.local_norms
    inputs = task.transform(tiny_batch(24), Draws(0, 0, 24))

    def influence(key: str, view: int) -> Tensor:
        with torch.no_grad():
            still, moved = task.predict(inputs)[key], []
            for row in range(24):
                views = inputs["views"].clone()
                views[row, view] += 0.5
                moved.append((task.predict(inputs | {"views": views})[key] - still).abs().amax((1, 2)) > 1e-12)
        return torch.stack(moved, 1)

    of_query, of_key = influence("dense_q", 0), influence("dense_k", 1)
    itself = torch.eye(24, dtype=torch.bool)
    for reached in (of_query, of_key):
        assert (reached & itself).sum() == 24
        assert set(reached.sum(1).tolist()) == {3}
    assert int((of_query & of_key & ~itself).sum()) / int((of_key & ~itself).sum()) < 0.3


def test_heads_and_views_are_the_published_ones():
    task = create("densecl", tiny_encoders(), queue=8)
    for head in (task.projection, task.dense_projection):
        assert [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)] == [(6, 6), (6, 128)]
    assert [(v.strength, v.area) for v in task.views.settings] == [(0.5, (0.2, 1.0))] * 2
    assert task.chance(4).loss == pytest.approx(math.log(9))


def test_preview_lights_the_places_that_are_like_the_middle():
    task = make()
    inputs = task.transform(tiny_batch(3), Draws(0, 0, 3))
    with torch.no_grad():
        panels = task.preview(inputs, task.predict(inputs))
    assert [panel.title for panel in panels] == [
        "query, its middle lit",
        "key",
        "places like the query's middle",
        "nearest key",
    ]
    assert all(len(panel.cells) == 3 for panel in panels)
    lit = _lit(torch.ones(1, 3, 4, 4), torch.tensor([[[0.0, 1.0], [0.0, 0.5]]]))
    assert lit[0, 0, 0].tolist() == [0.25, 0.25, 1.0, 1.0]
    assert lit[0, 0, 3].tolist() == [0.25, 0.25, 0.625, 0.625]


def test_refuses_what_cannot_work():
    task = make(queue=3)
    inputs = task.transform(tiny_batch(4), Draws(0, 0, 4))
    with pytest.raises(RecipeError, match="queue = 3 should hold the keys of a batch, 4 rows"):
        task(inputs)
    with pytest.raises(RecipeError, match="makes one of a view of this size"):
        make().predict({"views": torch.rand(2, 2, 3, 7, 7)})
    with pytest.raises(RecipeError, match="densecl reads image, and the encoder 'audio' reads audio"):
        create("densecl", tiny_encoders(), encoder="audio")
