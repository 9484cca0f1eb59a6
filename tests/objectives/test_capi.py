"""CAPI: the losses against loops in double precision, Sinkhorn place by place, what learns from what, and collapse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.audit.gradients import leaks
from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.reconstruction.capi import CAPI, visible_blocks
from mmssl.ops.clustering import balanced_assignment
from mmssl.ops.draws import Draws
from mmssl.training.optim import parameter_groups

K, ROWS, SIDE = 7, 5, 24
VIT = {"img_size": SIDE, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
SMALL = {"prototypes": K, "predicted": 0.3, "predictor_depth": 2, "predictor_width": 12, "predictor_heads": 3}

pytestmark = pytest.mark.usefixtures("double")


def task(**hyper: Any) -> CAPI:
    torch.manual_seed(0)
    encoder = create_encoder("timm/vit_tiny_patch16_224", "image", **VIT)
    return create("capi", {"image": encoder}, **(SMALL | hyper))


def pictures(rows: int = ROWS, side: int = SIDE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (rows, 3, side, side), generator=generator, dtype=torch.uint8)}


def sinkhorn(logits: np.ndarray) -> np.ndarray:
    """As the published code has it: columns, then rows, three times, of one place (B, K)."""
    shares = np.exp(logits / 0.06 - (logits / 0.06).max(0))
    for _ in range(3):
        shares = shares / shares.sum(0, keepdims=True)
        shares = shares / shares.sum(1, keepdims=True)
    return shares


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def by_hand(built: CAPI, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both losses with loops over rows and places, from the tokens on."""
    student, teacher = built.encoders["image"], built.teacher["encoder"]
    with torch.no_grad():
        taught = unit(teacher(inputs["image"]).tokens)
    sorted_ = taught @ built.clustering.weight.T + built.clustering.bias
    assigned = [sinkhorn(sorted_[:, place].detach().numpy()) for place in range(taught.shape[1])]
    wanted = torch.from_numpy(np.stack(assigned, axis=1))
    every, told = [], []
    directions = unit(built.head.weight) * built.head.length[:, None]
    for row in range(ROWS):
        for place in range(taught.shape[1]):
            logits = sorted_[row, place] / 0.12
            every.append(-wanted[row, place] @ (logits - logits.exp().sum().log()))
        tokens = student.embed(inputs["image"][row : row + 1])[:, inputs["seen"][row]]
        predicted = built.predictor(
            student.encode(tokens), inputs["seen"][row : row + 1], inputs["hidden"][row : row + 1], (6, 6)
        )[0]
        for x, place in zip(predicted, inputs["hidden"][row], strict=True):
            logits = directions @ unit(x) / 0.12
            told.append(-wanted[row, int(place)] @ (logits - logits.exp().sum().log()))
    return torch.stack(told).mean(), torch.stack(every).mean()


def test_losses_and_gradients_are_those_of_loops():
    built = task()
    with torch.no_grad():
        for parameter in (built.head.length, built.clustering.bias):
            parameter.add_(torch.randn_like(parameter) / 4)
    inputs = built.transform(pictures(), Draws(0, 0, ROWS))
    names, learning = zip(*[(n, p) for n, p in built.named_parameters() if p.requires_grad], strict=True)
    losses = built(inputs)
    found = torch.autograd.grad(losses["loss"], learning)
    prediction, clustering = by_hand(built, inputs)
    torch.testing.assert_close(losses["prediction_loss"], prediction)
    torch.testing.assert_close(losses["clustering_loss"], clustering)
    torch.testing.assert_close(losses["loss"], prediction + clustering)
    for name, ours, expected in zip(
        names, found, torch.autograd.grad(prediction + clustering, learning, allow_unused=True), strict=True
    ):
        assert ours.abs().max() > 1e-8, name
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_each_loss_has_parameters_of_its_own_and_the_teacher_learns_from_neither():
    built = task()
    losses = built(built.transform(pictures(), Draws(0, 0, ROWS)))
    clustering = {f"clustering.{name}" for name in ("weight", "bias")}
    for key, of_it in (("clustering_loss", True), ("prediction_loss", False)):
        built.zero_grad()
        losses[key].backward(retain_graph=True)
        reached = {name for name, p in built.named_parameters() if p.grad is not None}
        expected = {name for name, p in built.named_parameters() if p.requires_grad and (name in clustering) == of_it}
        assert reached == expected
    assert not any(name.startswith("teacher") for name in expected)
    slower = {id(p) for group in parameter_groups(built, 0.0) if group["lr_scale"] == 0.5 for p in group["params"]}
    assert slower == {id(p) for p in built.clustering.parameters()}


def test_places_are_balanced_one_by_one():
    scores = 3 * torch.randn(12, 4, K, generator=torch.Generator().manual_seed(0))
    counted = torch.rand(12, 4, generator=torch.Generator().manual_seed(1)) < 0.7
    alone = torch.stack([balanced_assignment(scores[:, place], counted[:, place]) for place in range(4)], dim=1)
    torch.testing.assert_close(balanced_assignment(scores, counted)[counted], alone[counted])
    at_once = balanced_assignment(scores, iterations=300).exp()
    torch.testing.assert_close(at_once.sum(0), torch.full((4, K), 12 / K))
    together = balanced_assignment(scores.flatten(0, 1), iterations=300).exp().view_as(scores)
    assert (together.sum(0) - 12 / K).abs().max() > 0.5  # so all places at once are something else


def test_clusters_that_say_where_a_patch_is_are_worth_nothing():
    built = task()
    inputs = {"hidden": torch.arange(6).expand(ROWS, 6)}
    where = 5 * torch.nn.functional.one_hot(torch.arange(K), K).double().expand(ROWS, K, K)
    told = torch.zeros(ROWS, 6, K)
    losses = built.loss({"told": told, "sorted": where, "taught": where / 5}, inputs)
    assert losses["prediction_loss"].item() == pytest.approx(math.log(K))
    assert losses["target_entropy"].item() == pytest.approx(math.log(K))
    assert losses["spread"] < 1e-6  # of the rows, though places differ
    assert built.chance(ROWS).levels == pytest.approx({"loss": 2 * math.log(K), "prediction_loss": math.log(K)})
    one = torch.zeros(ROWS, K, K)
    one[..., 2] = 100.0
    built.assigned = lambda logits: (logits / 0.06).softmax(-1)  # nothing is balanced
    losses = built.loss({"told": one[:, :6], "sorted": one, "taught": torch.randn(ROWS, K, 8)}, inputs)
    assert losses["loss"] < 1e-12
    assert losses["perplexity"].item() == pytest.approx(1)
    assert losses["spread"] > 0.5


def rolled(mask: np.ndarray) -> np.ndarray | None:
    """The mask, rolled so that it begins at the upper left; None where it is no rectangle less the end of a line."""
    for down in range(mask.shape[0]):
        for across in range(mask.shape[1]):
            moved = np.roll(mask, (-down, -across), (0, 1))
            wide = moved.any(0).sum()
            block = np.zeros_like(mask)
            block[:, :wide] = np.arange(mask.shape[0])[:, None] * wide + np.arange(wide) < mask.sum()
            if np.array_equal(block, moved):
                return moved
    return None


@pytest.mark.parametrize(("grid", "number"), [((6, 6), 13), ((7, 4), 9), ((2, 8), 6), ((1, 5), 2), ((5, 5), 24)])
def test_one_block_is_seen_wherever_it_lies(grid, number):
    drawn = visible_blocks(grid, number, Draws(0, 0, 400)).unflatten(1, grid)
    assert torch.all(drawn.sum((1, 2)) == number)
    blocks = [rolled(mask) for mask in drawn[:60].numpy()]
    assert all(block is not None for block in blocks)
    share = drawn.double().mean(0)
    assert (share - number / math.prod(grid)).abs().max() < 0.13  # 5 deviations
    if grid == (6, 6):
        sizes = {(block.any(1).sum(), block.any(0).sum()) for block in blocks}
        assert sizes <= {(5, 3), (4, 4), (3, 5), (3, 6), (6, 3)}
        assert len(sizes) >= 3


def test_what_is_told_is_hidden_and_no_answer_sees_it():
    built = task().eval()
    inputs = built.transform(pictures(), Draws(0, 0, ROWS))
    assert inputs["seen"].shape == (ROWS, 36 - 23)
    assert inputs["hidden"].shape == (ROWS, 6)
    for seen, hidden in zip(inputs["seen"].tolist(), inputs["hidden"].tolist(), strict=True):
        assert len({*seen, *hidden}) == 13 + 6
    assert not any(leak.leaks for leak in leaks(built, pictures()))
    other = inputs | {"hidden": inputs["hidden"].flip(1)}  # hidden patches are told one by one
    torch.testing.assert_close(built.predict(other)["told"], built.predict(inputs)["told"].flip(1))


def test_the_teacher_moves_as_the_published_learning_rate_does():
    built = task(momentum=0.9, momentum_warmup=0.2)
    student, teacher = (next(network.parameters()) for network in (built.encoders["image"], built.teacher["encoder"]))
    with torch.no_grad():
        student.add_(1.0)
    for progress, pace in ((0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.7, (1 + math.cos(0.5 * math.pi)) / 2), (1.0, 0.0955)):
        gap = (student - teacher).mean().item()
        built.after_step(progress)
        assert (student - teacher).mean().item() == pytest.approx(gap * (1 - 0.1 * pace), rel=1e-4)
    assert built.exported["image"] is built.teacher["encoder"]


def test_what_cannot_be_hidden_is_refused():
    with pytest.raises(RecipeError, match="of one patch none can be hidden"):
        task(views={"size": 4}).transform(pictures(), Draws(0, 0, ROWS))
    with pytest.raises(RecipeError, match="predictor_width = 12 should be a multiple of 4 and of predictor_heads = 5"):
        task(predictor_heads=5)
