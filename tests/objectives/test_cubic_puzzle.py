"""Cubic puzzles: which cubes of a clip are shuffled, in space and in time."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws

SIDE, FRAMES = 24, 16
STEP = 3  # cubes of two frames with one between them


def task(**hyper):
    torch.manual_seed(0)
    given = {"frames": 2, "gap": 1, "replicate": 0.0, "cube_width": 8, "hidden": 16} | hyper
    return create("cubic_puzzle", tiny_encoders(), **given)


def placed(rows, frames=FRAMES):
    """Pixels say where they are: row in red, column in green, frame in blue."""
    line = torch.arange(SIDE, dtype=torch.uint8)
    red, green = line[:, None].expand(frames, SIDE, SIDE), line.expand(frames, SIDE, SIDE)
    blue = torch.arange(frames, dtype=torch.uint8)[:, None, None].expand(frames, SIDE, SIDE)
    return {"video": torch.stack([red, green, blue], dim=1).expand(rows, -1, -1, -1, -1)}


def origins(inputs):
    """Top, left and first frame of each cube (B, 4, 3), in the order in which they came."""
    cubes = (inputs["cubes"] * 255).round().long()
    side = torch.arange(cubes.shape[-1])
    first = cubes[:, :, 0, :, 0, 0]
    for axis, offset in ((0, side[:, None]), (1, side)):  # unbroken squares of unbroken moments
        assert (cubes[:, :, :, axis] == first[:, :, None, axis, None, None] + offset).all()
    assert (cubes[:, :, :, 2] == first[:, :, None, 2, None, None] + torch.arange(cubes.shape[2])[:, None, None]).all()
    return first


def test_cubes_are_of_four_places_or_of_four_times():
    rows, built = 3000, task()
    inputs = built.transform(placed(rows), Draws(0, 0, rows))
    side = inputs["cubes"].shape[-1]
    assert side == round(12 * 80 / 112) == 9
    shown, answer = origins(inputs), inputs["answer"]
    order = built.orders[answer % 24]
    came = torch.zeros_like(shown).scatter(1, order[..., None].expand_as(shown), shown)
    space = answer < 24
    cell, jitter = came[..., :2] // 12, came[..., :2] % 12
    assert jitter.unique().tolist() == list(range(12 - side + 1))
    number = torch.arange(4)
    assert (cell[space] == torch.stack([number // 2, number % 2], 1)).all()
    assert (came[space][..., 2] == came[space][:, :1, 2]).all()
    assert (cell[~space] == cell[~space][:, :1]).all()
    assert len(cell[~space][:, 0].unique(dim=0)) == 4
    assert (came[~space][..., 2].diff(dim=1) == STEP).all()
    # Neither the kind nor the order depends on where the clip begins, and all are equally frequent.
    assert stats.chisquare(torch.bincount(answer, minlength=48).numpy()).pvalue > 1e-4
    assert set(came[~space][:, 0, 2].tolist()) == set(range(FRAMES - 11 + 1))


def test_moments_of_a_still_are_one():
    rows = 40
    still = tiny_batch(rows, frames=1)["video"].expand(-1, FRAMES, -1, -1, -1)
    inputs = task(space=0.0, side=6).transform({"video": still}, Draws(0, 0, rows))  # cells of 6 pixels: no jitter
    assert torch.equal(inputs["cubes"], inputs["cubes"][:, :1, :1].expand_as(inputs["cubes"]))
    assert not inputs["valid"].any()


def test_a_row_that_ends_in_a_still_counts_where_there_is_room_before_it():
    batch = tiny_batch(4, frames=FRAMES)
    batch["video"][0, 10:] = batch["video"][0, 10:11]
    batch["video"][1, 9:] = batch["video"][1, 9:10]
    inputs = task().transform(batch, Draws(0, 0, 4))
    assert inputs["valid"].tolist() == [True, False, True, True]
    assert inputs["valid_rows"] == 3


def test_one_channel_stands_for_all():
    rows = 60
    plain, gray = (task(replicate=share).transform(placed(rows), Draws(0, 0, rows))["cubes"] for share in (0.0, 1.0))
    assert torch.equal(gray, gray[:, :, :, :1].expand_as(gray))
    which = [[torch.equal(gray[row, :, :, 0], plain[row, :, :, c]) for c in range(3)] for row in range(rows)]
    assert all(sum(row) == 1 for row in which)
    assert all(any(row[c] for row in which) for c in range(3))


def test_a_crop_is_one_for_all_frames():
    rows = 20
    still = tiny_batch(rows, frames=1)["video"].expand(-1, FRAMES, -1, -1, -1)
    for views in ({"area": [0.5, 0.9]}, {"size": 8}, {"flip": 0.5}):
        cubes = task(views=views).transform({"video": still}, Draws(0, 0, rows))["cubes"]
        assert torch.equal(cubes, cubes[:, :, :1].expand_as(cubes))


def test_chance_is_the_loss_of_equal_logits():
    built = task()
    inputs = built.transform(placed(8), Draws(0, 0, 8))
    losses, chance = built.loss({"logits": torch.zeros(8, 48)}, inputs), built.chance(8)
    assert math.isclose(losses["loss"], chance.loss, rel_tol=1e-6)
    assert chance.levels == {"loss": math.log(48), "accuracy": 1 / 48}
    assert built.loss({"logits": 50 * torch.eye(48)[inputs["answer"]]}, inputs)["accuracy"] == 1


def test_refuses_what_cannot_work():
    with pytest.raises(RecipeError, match="reads video, and the encoder 'image' reads image"):
        task(encoder="image")
    with pytest.raises(RecipeError, match="4 moments of 16 frames with 8 between them are 88 frames, and a row has 16"):
        task(frames=16, gap=8).transform(placed(2), Draws(0, 0, 2))
    with pytest.raises(RecipeError, match="cubic_puzzle: a tile of 20 pixels does not fit into the 12"):
        task(side=20).transform(placed(2), Draws(0, 0, 2))
