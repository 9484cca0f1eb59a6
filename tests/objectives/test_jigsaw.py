"""Jigsaw: tiles of a grid, in one of N orders."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_encoders import TinyImage, tiny_batch, tiny_encoders
from torch import Tensor

from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws

PLAIN = {"gray": 0.0, "projection": 0.0, "shift": 0, "standardize": False, "tile_width": 8, "hidden": None}


class Patches(TinyImage):
    """A network of patches of 8 pixels."""

    patch_size = (8, 8)


def ramps(rows: int, side: int) -> Tensor:
    """Images whose pixels say where they are: row in red, column in green, image in blue; all below 256."""
    line = torch.arange(side)
    image = torch.stack([line[:, None].expand(side, side), line.expand(side, side), torch.zeros(side, side)])
    return (image + torch.arange(rows)[:, None, None, None] * torch.tensor([0, 0, 1])[:, None, None]).byte()


def corners(tiles: Tensor) -> Tensor:
    """Row and column of each tile's first pixel."""
    return (tiles[:, :, :2, 0, 0] * 255).round().long()


def task_with(encoder: Encoder | None = None, **hyper):
    return create("jigsaw", {"image": encoder or TinyImage()}, **{**PLAIN, **hyper})


def test_published_measures():
    task = task_with()
    inputs = task.transform({"image": ramps(150, 255)}, Draws(0, 0, 150))
    assert inputs["tiles"].shape == (150, 9, 3, 64, 64)
    places = task.orders[inputs["order"]]
    offset = corners(inputs["tiles"]) - torch.stack([places // 3, places % 3], -1) * 85
    assert (int(offset.min()), int(offset.max())) == (0, 21)
    for cell in range(9):  # the same offsets in every cell, also at the border
        assert set(offset[places == cell].flatten().tolist()) == set(range(22))
    tiles = inputs["tiles"]
    assert (tiles[:, :, 2] * 255 - torch.arange(150)[:, None, None, None]).abs().max() < 1e-3
    assert torch.equal(tiles[..., 1:, :][:, :, 0] - tiles[..., :-1, :][:, :, 0] > 0, torch.ones(150, 9, 63, 64) > 0)


@pytest.mark.parametrize(("side", "tile"), [(32, 8), (48, 12), (64, 16), (224, 56), (256, 64)])
def test_defaults_follow_the_size_of_the_image(side, tile):
    assert task_with(shift=None).transform({"image": ramps(2, side)}, Draws(0, 0, 2))["tiles"].shape[-1] == tile


def test_the_order_is_the_label_and_its_inverse_puts_the_tiles_back():
    task = task_with(orders=24, grid=2)
    inputs = task.transform({"image": ramps(400, 40)}, Draws(0, 0, 400))
    back = task.orders[inputs["order"]].argsort(1)
    sorted_corners = corners(inputs["tiles"]).gather(1, back[..., None].expand(-1, -1, 2))
    assert torch.equal(sorted_corners // 20, torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).expand(400, 4, 2))
    assert inputs["order"].unique().tolist() == list(range(24))
    assert (inputs["order"].bincount() < 45).all()  # 16.7 expected


def test_gap_keeps_neighbors_apart():
    task = task_with(tile=8, gap=5)
    inputs = task.transform({"image": ramps(300, 60)}, Draws(0, 0, 300))
    back = task.orders[inputs["order"]].argsort(1)
    grid = corners(inputs["tiles"]).gather(1, back[..., None].expand(-1, -1, 2)).view(300, 3, 3, 2)
    between = torch.cat(
        [(grid[:, 1:] - grid[:, :-1])[..., 0].flatten(), (grid[:, :, 1:] - grid[:, :, :-1])[..., 1].flatten()]
    )
    assert (int(between.min()) - 8, int(between.max()) - 8) == (5, 19)


def test_channels_are_shifted_apart_within_their_cell():
    image = torch.arange(30, dtype=torch.uint8).expand(1, 3, 30, 30)
    task = task_with(shift=2, tile=6)
    inputs = task.transform({"image": image.expand(200, 3, 30, 30)}, Draws(0, 0, 200))
    column = (inputs["tiles"][:, :, :, 0, 0] * 255).round().long()
    inside = column - task.orders[inputs["order"]][..., None] % 3 * 10
    assert (int(inside.min()), int(inside.max())) == (0, 4)
    assert set((column[:, :, 0] - column[:, :, 1]).unique().tolist()) == {-2, -1, 0, 1, 2}


def test_a_smaller_square_is_anywhere_and_a_crop_is_resized():
    inputs = task_with(views={"size": 30}, tile=10).transform({"image": ramps(300, 40)}, Draws(0, 0, 300))
    first = corners(inputs["tiles"]).amin(1)
    assert set(first.flatten().tolist()) == set(range(11))
    wide = torch.zeros(2, 3, 30, 50, dtype=torch.uint8)
    assert task_with().transform({"image": wide}, Draws(0, 0, 2))["tiles"].shape == (2, 9, 3, 8, 8)
    inputs = task_with(views={"area": (1.0, 1.0), "size": 90}).transform({"image": ramps(2, 30)}, Draws(0, 0, 2))
    steps = inputs["tiles"][:, :, 1, :, 1:] - inputs["tiles"][:, :, 1, :, :-1]
    assert float(steps[:, :, 0, 5].mean() * 255) == pytest.approx(1 / 3, rel=0.01)
    mirrored = task_with(views={"flip": 1.0}).transform({"image": ramps(2, 30)}, Draws(0, 0, 2))["tiles"]
    assert (mirrored[..., 1:] <= mirrored[..., :-1]).all()


def test_colors_and_statistics():
    batch = {"image": tiny_batch(300, size=30)["image"]}
    tiles = task_with(gray=0.5, standardize=True).transform(batch, Draws(0, 0, 300))["tiles"]
    torch.testing.assert_close(tiles.mean((2, 3, 4)), torch.full((300, 9), 0.5))
    torch.testing.assert_close(tiles.std((2, 3, 4), correction=0), torch.full((300, 9), 0.25))
    is_gray = (tiles.std(2) < 1e-4).flatten(2).all(2)
    assert torch.equal(is_gray, is_gray[:, :1].expand(-1, 9))  # one fate for an image
    assert 110 < int(is_gray[:, 0].sum()) < 190
    dropped = task_with(drop=1.0, standardize=True).transform(batch, Draws(0, 0, 300))["tiles"]
    assert ((dropped.std((3, 4)) > 0.2).sum(2) == 1).all()
    falling = {"image": torch.linspace(1.0, 0.5, 60)[:, None].expand(4, 3, 60, 60)}
    flat = task_with(flat_field=True).transform(falling, Draws(0, 0, 4))["tiles"]
    assert flat.std((3, 4)).max() < 1e-3 < task_with().transform(falling, Draws(0, 0, 4))["tiles"].std((3, 4)).min()


def test_every_tile_goes_through_the_encoder_alone_and_in_one_call():
    torch.manual_seed(0)
    calls = []
    task = task_with()
    task.encoders["image"].register_forward_hook(lambda module, given, result: calls.append(len(given[0])))
    inputs = task.transform({"image": tiny_batch(4, size=60)["image"]}, Draws(0, 0, 4))
    logits = task.predict(inputs)["logits"]
    assert calls == [36]
    assert logits.shape == (4, 100)
    swapped = {**inputs, "tiles": inputs["tiles"].flip(1)}
    assert not torch.allclose(task.predict(swapped)["logits"], logits)


def test_chance_is_the_loss_of_equal_logits():
    task = task_with(orders=64)
    inputs = task.transform({"image": tiny_batch(8, size=60)["image"]}, Draws(0, 0, 8))
    chance = task.chance(8)
    assert task.loss({"logits": torch.zeros(8, 64)}, inputs)["loss"] == pytest.approx(chance.loss)
    assert (chance.loss, chance.metrics["accuracy"]) == (pytest.approx(math.log(64)), 1 / 64)
    assert task.loss({"logits": torch.eye(64)[inputs["order"]]}, inputs)["accuracy"] == 1


def test_patches_decide_the_size_of_a_tile():
    assert task_with(Patches()).transform({"image": ramps(2, 64)}, Draws(0, 0, 2))["tiles"].shape[-1] == 16
    assert task_with(Patches()).transform({"image": ramps(2, 48)}, Draws(0, 0, 2))["tiles"].shape[-1] == 16
    assert task_with(Patches(), gap=1).transform({"image": ramps(2, 48)}, Draws(0, 0, 2))["tiles"].shape[-1] == 8
    with pytest.raises(RecipeError, match="jigsaw: a tile of 8 pixels does not fit into the 6"):
        task_with(Patches()).transform({"image": ramps(2, 20)}, Draws(0, 0, 2))


def test_refuses_what_it_cannot_cut():
    with pytest.raises(RecipeError, match="reads audio"):
        create("jigsaw", tiny_encoders(), encoder="audio")
    with pytest.raises(RecipeError, match="has no 25 orders"):
        task_with(grid=2, orders=25)
    with pytest.raises(RecipeError, match="size = 70 is more than the image's 60 pixels"):
        task_with(views={"size": 70}).transform({"image": ramps(2, 60)}, Draws(0, 0, 2))


def test_preview_assembles_what_the_network_answers():
    task = task_with()
    inputs = task.transform({"image": ramps(3, 90)}, Draws(0, 0, 3))
    answers = torch.eye(100)[torch.stack([inputs["order"][0], *((inputs["order"][1:] + 1) % 100)])]
    fed, solved, answered, words = task.preview(inputs, {"logits": answers})
    assert torch.equal(answered.cells[0], solved.cells[0])
    assert not torch.equal(answered.cells[1], solved.cells[1])
    assert not torch.equal(fed.cells[1], solved.cells[1])
    first = (solved.cells[1][:2, ::24, ::24] * 255).round() // 30  # tiles of 23 pixels and lines of one; cells of 30
    assert torch.equal(first, torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="ij")))
    assert words.cells[0] == "✓ all"
    assert words.cells[1].startswith("✗ ")
