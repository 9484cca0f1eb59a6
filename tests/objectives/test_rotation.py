"""Rotation: four exact turns of one crop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_encoders import TinyImage, tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws


@pytest.mark.parametrize(
    "crop", [{"area": None, "flip": 0.0}, {"area": None}, {}, {"size": 8}, {"area": None, "size": 8}]
)
def test_views_are_quarter_turns_of_one_square(crop):
    batch = tiny_batch(6)
    task = create("rotation", {"image": TinyImage()}, views=crop)
    inputs = task.transform(batch, Draws(0, 0, 6))
    views = inputs["image"]
    assert views.shape == (6, 4, 3, crop.get("size", 12), crop.get("size", 12))
    for row in range(6):
        for k in range(4):
            turned = np.rot90(views[row, 0].numpy(), k, axes=(1, 2))
            assert np.array_equal(views[row, k].numpy(), turned)  # so the inverse turn is exact, too
            assert torch.equal(views[row, k].flatten().sort().values, views[row, 0].flatten().sort().values)
    assert torch.equal(inputs["turn"], torch.arange(4).expand(6, 4))  # exactly uniform in every batch


@pytest.mark.parametrize("crop", [{"area": None, "flip": None}, {}, {"area": None, "size": 8}])
def test_all_frames_of_a_clip_are_cropped_and_turned_alike(crop):
    batch = tiny_batch(6, frames=4)
    task = create("rotation", tiny_encoders(), encoder="video", views=crop)
    assert task.needs == ("video",)
    views = task.transform(batch, Draws(0, 0, 6))["video"]
    assert views.shape == (6, 4, 4, 3, crop.get("size", 12), crop.get("size", 12))
    image = create("rotation", tiny_encoders(), views=crop)
    for frame in range(4):
        alone = image.transform({"image": batch["video"][:, frame]}, Draws(0, 0, 6))["image"]
        torch.testing.assert_close(views[:, :, frame], alone)
    inputs = task.transform(batch, Draws(0, 0, 6))
    losses = task(inputs)
    losses["loss"].backward()
    assert task.encoder("video").net.weight.grad.abs().sum() > 0
    assert all(cell.shape[0] == 4 for panel in task.preview(inputs, task.predict(inputs))[:4] for cell in panel.cells)


def test_without_crop_pixels_are_those_of_the_image_or_its_mirror():
    batch = tiny_batch(64)
    task = create("rotation", {"image": TinyImage()}, views={"area": None})
    upright = task.transform(batch, Draws(0, 0, 64))["image"][:, 0]
    same, mirrored = (
        (upright == batch["image"]).flatten(1).all(1),
        (upright == batch["image"].flip(-1)).flatten(1).all(1),
    )
    assert (same ^ mirrored).all()
    assert 16 < int(mirrored.sum()) < 48


def test_crops_are_isotropic():
    # A diagonal stripe pattern keeps its direction only where height and width shrink alike.
    ramp = torch.arange(32.0)[:, None].expand(32, 32)
    image = torch.stack([ramp, ramp.T, ramp]) / 31
    inputs = create("rotation", {"image": TinyImage()}).transform(
        {"image": image.expand(20, -1, -1, -1)}, Draws(0, 0, 20)
    )
    down, across = inputs["image"][:, 0, 0], inputs["image"][:, 0, 1]
    rise = (down[:, 20, 16] - down[:, 12, 16]).abs()
    torch.testing.assert_close(rise, (across[:, 16, 20] - across[:, 16, 12]).abs(), atol=1e-5, rtol=0)


def test_chance_is_the_loss_of_equal_logits():
    task = create("rotation", tiny_encoders())
    inputs = task.transform(tiny_batch(4), Draws(0, 0, 4))
    losses = task.loss({"logits": torch.zeros(4, 4, 4)}, inputs)
    chance = task.chance(4)
    assert math.isclose(losses["loss"], chance.loss, rel_tol=1e-6)
    assert math.isclose(losses["accuracy"], chance.metrics["accuracy"])
    assert task.loss({"logits": 50 * torch.eye(4).expand(4, 4, 4)}, inputs)["accuracy"] == 1


def test_refuses_what_it_cannot_turn():
    task = create("rotation", {"image": TinyImage()})
    with pytest.raises(RecipeError, match="square images, these are 12 x 16"):
        task.transform({"image": torch.zeros(2, 3, 12, 16)}, Draws(0, 0, 2))
    with pytest.raises(RecipeError, match="reads audio"):
        create("rotation", tiny_encoders(), encoder="audio")
    with pytest.raises(RecipeError, match=r"views: unknown key 'aera' \(did you mean 'area'"):
        create("rotation", tiny_encoders(), views={"aera": None})
    with pytest.raises(ValueError, match="needs an encoder named 'image'; the recipe has: text"):
        create("rotation", {"text": tiny_encoders()["text"]})


def test_preview_shows_each_turn_and_the_guess():
    task = create("rotation", tiny_encoders())
    inputs = task.transform(tiny_batch(3), Draws(0, 0, 3))
    panels = task.preview(inputs, task.predict(inputs))
    assert [panel.title for panel in panels] == ["0°", "90°", "180°", "270°", "prediction"]
    assert all(len(panel.cells) == 3 for panel in panels)
    logits = torch.eye(4)[[0, 3, 2, 2]].expand(3, 4, 4)
    assert task.preview(inputs, {"logits": logits})[-1].cells[0] == "✓ 0°  ✗ 270°  ✓ 180°  ✗ 180°"
