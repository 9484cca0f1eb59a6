"""Autoencoder: the clean picture again, through a code."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import TinyImage, tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.reconstruction.autoencoder import Autoencoder
from mmssl.ops.draws import Draws

WHOLE = {"views": {"area": (1.0, 1.0), "flip": 0.0}, "width": 64}


def task_of(**hyper: object) -> Autoencoder:
    torch.manual_seed(0)
    return create("autoencoder", {"image": TinyImage()}, **{**WHOLE, **hyper})


def test_without_noise_the_target_is_the_input():
    batch = tiny_batch(3)
    inputs = task_of().transform(batch, Draws(0, 0, 3))
    torch.testing.assert_close(inputs["target"], batch["image"] / 255)
    assert torch.equal(inputs["image"], inputs["target"])
    cut = task_of(views={"area": (0.5, 0.5), "size": 8}).transform(batch, Draws(0, 0, 3))
    assert cut["image"].shape == cut["target"].shape == (3, 3, 8, 8)


def test_noise_has_the_stated_strength_and_spares_the_target():
    batch = {"image": torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)}
    inputs = task_of(noise=0.3).transform(batch, Draws(0, 0, 20))
    torch.testing.assert_close(inputs["target"], batch["image"] / 255)
    noise = inputs["image"] - inputs["target"]
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
    channels = noise.movedim(1, 0).flatten(1)
    torch.testing.assert_close(torch.corrcoef(channels), torch.eye(3), atol=0.03, rtol=0)
    assert inputs["image"].max() > 1  # a clipped white would tell where it is


def test_the_answer_is_compared_with_the_clean_picture():
    task = task_of(noise=0.3)
    inputs = task.transform(tiny_batch(5), Draws(0, 0, 5))
    assert task.loss({"image": inputs["target"]}, inputs)["loss"] == 0
    noisy = task.loss({"image": inputs["image"]}, inputs)["loss"]
    assert float(noisy) == pytest.approx(0.09, rel=0.1)


def test_chance_is_what_each_mean_color_scores():
    task = task_of()
    batch = tiny_batch(5)
    batch["image"][2] = batch["image"][2] // 4  # of less contrast: errors are summed before they are divided
    inputs = task.transform(batch, Draws(0, 0, 5))
    constant = inputs["target"].mean((2, 3), keepdim=True).expand_as(inputs["target"])
    losses = task.loss({"image": constant}, inputs)
    assert float(losses["relative_error"]) == pytest.approx(1)
    half = task.loss({"image": (constant + inputs["target"]) / 2}, inputs)
    assert float(half["relative_error"]) == pytest.approx(0.25)
    assert task.chance(5).loss is None
    assert task.chance(5).metrics == {"relative_error": 1.0}
    one_color = task.transform({"image": torch.full((2, 3, 12, 12), 9, dtype=torch.uint8)}, Draws(0, 0, 2))
    assert torch.isfinite(task(one_color)["relative_error"])


def test_the_picture_goes_through_the_code_alone():
    task = task_of(bottleneck=2)
    inputs = task.transform(tiny_batch(6), Draws(0, 0, 6))
    shapes = []
    task.code.register_forward_hook(lambda module, args, code: shapes.append(code.shape))
    painted = task.predict(inputs)["image"]
    assert shapes == [(6, 2)]
    assert painted.shape == inputs["target"].shape
    torch.nn.init.zeros_(task.code.weight)
    blind = task.predict(inputs)["image"]
    assert (blind - blind[:1]).abs().max() < 1e-6


def test_it_learns_to_paint_two_pictures():
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 12)
    batch = {"image": torch.stack([ramp.expand(3, 12, 12), ramp.flip(0).expand(3, 12, 12).mT])}
    task = task_of(bottleneck=4)
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    inputs = task.transform(batch, Draws(0, 0, 2))
    for _ in range(40):
        losses = task(inputs)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses["relative_error"] < 0.5


def test_refuses_what_it_cannot_paint():
    with pytest.raises(RecipeError, match="bottleneck = 0"):
        task_of(bottleneck=0)
    with pytest.raises(RecipeError, match="noise = -1"):
        task_of(noise=-1.0)
    with pytest.raises(RecipeError, match="reads audio"):
        create("autoencoder", tiny_encoders(), encoder="audio")
