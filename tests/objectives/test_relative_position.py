"""Relative position: pairs of patches in both orders, and where the second lies."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_encoders import TinyImage, tiny_batch, tiny_encoders
from torch import Tensor

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.transformation.relative_position import DIRECTIONS, STEPS
from mmssl.ops.draws import Draws

PLAIN = {"views": {"area": None}, "color": "none", "coarse": 0.0, "standardize": False, "hidden": 8}


def ramps(rows: int, height: int, width: int | None = None) -> Tensor:
    """Images whose pixels say where they are: row in red and blue, column in green, as floats in [0, 1]."""
    width = width or height
    down, across = torch.arange(height)[:, None].expand(height, width), torch.arange(width).expand(height, width)
    return (torch.stack([down, across, down]) / 1000).expand(rows, 3, height, width)


def corners(patches: Tensor) -> Tensor:
    return (patches[:, :, :2, 0, 0] * 1000).round().long()


def task_with(**hyper):
    return create("relative_position", {"image": TinyImage()}, **{**PLAIN, **hyper})


def drawn(task, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs, and of each pair how far the second patch is from the first, in pixels."""
    inputs = task.transform({"image": images}, Draws(0, 0, len(images)))
    row = torch.arange(len(images))[:, None, None]
    return inputs, corners(inputs["patches"])[row, inputs["pairs"]].diff(dim=2)[:, :, 0]


def test_the_second_patch_lies_where_the_label_says_at_the_published_distance():
    inputs, distance = drawn(task_with(), ramps(40, 398))
    assert inputs["patches"].shape == (40, 36, 3, 96, 96)
    off = distance - torch.tensor(STEPS)[inputs["direction"]] * 144
    assert (int(off.min()), int(off.max())) == (-14, 14)
    assert [name.split() for name in DIRECTIONS] == [
        [word for word in ({-1: "above", 1: "below"}.get(y), {-1: "left", 1: "right"}.get(x)) if word] for y, x in STEPS
    ]


def test_both_orders_of_a_pair_have_opposite_labels():
    inputs = task_with(pairs=3).transform({"image": ramps(5, 64)}, Draws(0, 0, 5))
    half = 4 * 3 * 4
    assert inputs["pairs"].shape == (5, 2 * half, 2)
    assert torch.equal(inputs["pairs"][:, :half].flip(-1), inputs["pairs"][:, half:])
    steps = torch.tensor(STEPS)[inputs["direction"]]
    assert torch.equal(steps[:, :half], -steps[:, half:])


@pytest.mark.parametrize("pairs", [1, 4])
def test_the_eight_answers_are_equally_frequent_in_every_image(pairs):
    inputs = task_with(pairs=pairs, grids=2).transform({"image": ramps(300, 64)}, Draws(0, 0, 300))
    for direction in inputs["direction"]:
        assert torch.equal(direction.bincount(), torch.full((8,), 2 * pairs))
    assert all(len(row.unique(dim=0)) == len(row) for row in inputs["pairs"])
    # Over the images every neighboring pair of a grid comes, and no pair spans two grids.
    seen = {tuple(pair) for pair in inputs["pairs"].flatten(0, 1).tolist()}
    assert len(seen) == 2 * 2 * 20
    assert all(a // 9 == b // 9 for a, b in seen)


def test_no_patch_is_clamped_so_that_every_cell_has_the_same_jitter():
    task = task_with(patch=10, gap=5, jitter=3, grids=1)
    images = ramps(600, 46, 60)
    inputs, _ = drawn(task, images)
    places = corners(inputs["patches"]).view(600, 3, 3, 2)
    down = places[..., 0] - torch.arange(3)[:, None] * 15
    for y in range(3):
        for x in range(3):
            assert set(down[:, y, x].tolist()) == set(range(7))
    right = places[..., 1] - torch.arange(3) * 15
    assert (int(right.min()), int(right.max())) == (0, 20)  # 14 pixels are free for the grid, 6 for the patch


@pytest.mark.parametrize(
    ("side", "measures"), [(32, (8, 3, 1)), (48, (12, 5, 1)), (64, (15, 8, 1)), (398, (96, 48, 7))]
)
def test_defaults_follow_the_size_of_the_image(side, measures):
    assert task_with()._measures(side, torch.zeros(1, 3, side, side)) == measures


def test_a_square_of_the_image_is_enlarged():
    inputs, _ = drawn(task_with(views={"area": (0.25, 0.25)}, grids=2), ramps(20, 80))
    slope = inputs["patches"][:, :, 0].diff(dim=-2)[..., 8, 8] * 1000
    torch.testing.assert_close(slope, torch.full_like(slope, 0.5), atol=1e-3, rtol=0)
    origins = corners(inputs["patches"])[:, ::9]
    assert (origins[:, 0] != origins[:, 1]).any(1).sum() > 15  # each grid in a square of its own


def test_disguise():
    images = tiny_batch(20, size=64)["image"]
    inputs = create("relative_position", {"image": TinyImage()}, hidden=8).transform({"image": images}, Draws(0, 0, 20))
    patches = inputs["patches"]
    torch.testing.assert_close(patches.mean((2, 3, 4)), torch.full((20, 36), 0.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(patches.std((2, 3, 4), correction=0), torch.full((20, 36), 0.25), atol=1e-3, rtol=0)
    deviation = patches.std((3, 4))
    assert ((deviation > 0.2).sum(2) == 1).all()  # one channel of each patch
    assert (deviation.argmax(2).flatten().bincount(minlength=3) > 180).all()
    falling = torch.linspace(1.0, 0.5, 64)[:, None].expand(4, 3, 64, 64)
    flat = task_with(flat_field=True).transform({"image": falling}, Draws(0, 0, 4))["patches"]
    assert flat.std((3, 4)).max() < 1e-3
    # A patch that was resized down and up has smoother neighbors than noise.
    plain = task_with(grids=4).transform({"image": images}, Draws(0, 0, 20))["patches"]
    coarse = task_with(grids=4, coarse=0.33).transform({"image": images}, Draws(0, 0, 20))["patches"]
    changed = (plain != coarse).flatten(2).any(2)
    assert float(changed.float().mean()) == pytest.approx(0.33, abs=0.05)
    assert (coarse.var((2, 3, 4))[changed] < plain.var((2, 3, 4))[changed]).all()


def test_each_patch_goes_through_the_encoder_once_and_pairs_see_their_two_alone():
    torch.manual_seed(0)
    calls = []
    task = task_with(grids=1)
    task.encoders["image"].register_forward_hook(lambda module, given, result: calls.append(len(given[0])))
    inputs = task.transform({"image": tiny_batch(3, size=64)["image"]}, Draws(0, 0, 3))
    inputs["patches"].requires_grad_()
    logits = task.predict(inputs)["logits"]
    assert calls == [27]
    assert logits.shape == (3, 32, 8)
    logits[1, 5].square().sum().backward()
    touched = inputs["patches"].grad.flatten(2).abs().amax(2)
    assert touched.nonzero().tolist() == [[1, int(k)] for k in sorted(inputs["pairs"][1, 5].tolist())]
    swapped = {**inputs, "pairs": inputs["pairs"].flip(-1)}
    assert not torch.allclose(task.predict(swapped)["logits"], logits)


def test_chance_is_the_loss_of_equal_logits():
    task = task_with()
    inputs = task.transform({"image": ramps(4, 64)}, Draws(0, 0, 4))
    losses = task.loss({"logits": torch.zeros(4, 128, 8)}, inputs)
    chance = task.chance(4)
    assert math.isclose(losses["loss"], chance.loss, rel_tol=1e-6)
    assert losses["accuracy"] == chance.metrics["accuracy"] == 1 / 8
    assert task.loss({"logits": torch.eye(8)[inputs["direction"]]}, inputs)["accuracy"] == 1


def test_refuses_what_does_not_fit():
    with pytest.raises(RecipeError, match="reads audio"):
        create("relative_position", tiny_encoders(), encoder="audio")
    with pytest.raises(RecipeError, match="1 to 4 pairs of each direction, not 5"):
        task_with(pairs=5)
    images = {"image": ramps(2, 60)}
    with pytest.raises(RecipeError, match="size = 70 is more than the image's 60 pixels"):
        task_with(views={"area": None, "size": 70}).transform(images, Draws(0, 0, 2))
    with pytest.raises(RecipeError, match="three patches of 16, two gaps of 8 and a jitter of 1"):
        task_with(patch=16, gap=8).transform(images, Draws(0, 0, 2))
    with pytest.raises(RecipeError, match="a tile of 30 pixels does not fit into the 20"):
        task_with(patch=30).transform(images, Draws(0, 0, 2))


def test_preview_lays_the_second_patch_where_the_network_puts_it():
    task = task_with(grids=1)
    inputs = task.transform({"image": ramps(8, 64)}, Draws(0, 0, 8))
    answers = torch.eye(8)[inputs["direction"]]
    answers[1:] = torch.eye(8)[7 - inputs["direction"][1:]]
    panels = {panel.title: panel.cells for panel in task.preview(inputs, {"logits": answers})}
    assert torch.equal(panels["as they lie"][0], panels["as answered"][0])
    assert panels["the second lies"][0] == "✓ above left"
    for row in range(8):  # one direction after another
        y, x = STEPS[row]
        lies = panels["as they lie"][row][:, 16 * (1 + y) : 16 * (1 + y) + 15, 16 * (1 + x) : 16 * (1 + x) + 15]
        assert torch.equal(lies, panels["second"][row])
        assert torch.equal(panels["as they lie"][row][:, 16:31, 16:31], panels["first"][row])
    assert panels["the second lies"][3] == "✗ right; it is left"
