"""SimCLR: two views of each row, of images and of sound."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws


@pytest.mark.parametrize("encoder", ["image", "audio"])
def test_views_are_two_different_ones_of_the_same_row(encoder):
    task = create("simclr", tiny_encoders(), encoder=encoder, width=7)
    assert task.needs == (encoder,)
    batch = tiny_batch(5)
    batch[encoder][1] = batch[encoder][0]
    inputs = task.transform(batch, Draws(0, 0, 5))
    views = inputs["views"]
    assert views.shape[:2] == (5, 2)
    assert len({tuple(v.flatten().tolist()) for v in views.flatten(0, 1)}) == 10
    z = task.predict(inputs)["z"]
    assert z.shape == (5, 2, 7)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(5, 2))
    assert task.loss({"z": z}, inputs)["loss"].ndim == 0


def test_view_size_and_small_image_settings():
    task = create("simclr", tiny_encoders(), views={"size": 10, "blur": 0, "strength": 0.5})
    assert task.transform(tiny_batch(2), Draws(0, 0, 2))["views"].shape == (2, 2, 3, 10, 10)


def test_chance_is_the_loss_of_collapse():
    task = create("simclr", tiny_encoders())
    z = torch.ones(8, 2, 4) / 2
    chance = task.chance(8)
    assert math.isclose(task.loss({"z": z}, {})["loss"], chance.loss, rel_tol=1e-6)
    assert chance.metrics["accuracy"] == 1 / 15
    assert task.meets == "loss"


def test_refuses_other_modalities():
    with pytest.raises(RecipeError, match="reads text"):
        create("simclr", tiny_encoders(), encoder="text")


def test_preview_finds_the_nearest_partner():
    task = create("simclr", tiny_encoders())
    inputs = task.transform(tiny_batch(3), Draws(0, 0, 3))
    z = torch.eye(3)[:, None].expand(3, 2, 3)
    first, second, found = task.preview(inputs, {"z": z})
    assert all(torch.equal(a, b) for a, b in zip(second.cells, found.cells, strict=True))
    assert first.cells[0].shape == (3, 12, 12)
