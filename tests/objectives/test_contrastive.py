"""Contrastive pairs: what reaches the loss, chance, the scale."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws


def test_start_values_are_the_papers():
    clip, siglip = (create("contrastive", tiny_encoders(), form=form) for form in ("clip", "siglip"))
    assert math.isclose(clip.logit_scale, math.log(1 / 0.07), rel_tol=1e-6)
    assert math.isclose(siglip.logit_scale, math.log(10), rel_tol=1e-6)
    assert siglip.logit_bias == -10
    assert "logit_bias" not in dict(clip.named_parameters())


def test_scale_is_clamped_after_the_step():
    task = create("contrastive", tiny_encoders())
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        task.logit_scale.data.fill_(value)
        task.after_step(0.5)
        assert math.isclose(task.logit_scale, expected, rel_tol=1e-6)


@pytest.mark.parametrize("pair", [("image", "text"), ("audio", "text"), ("video", "audio")])
def test_both_sides_and_their_masks_arrive(pair):
    a, b = pair
    task = create("contrastive", tiny_encoders(), a=a, b=b, width=7)
    assert task.needs == pair
    batch = tiny_batch(4)
    inputs = task.transform(batch, Draws(0, 0, 4))
    for side, name in (("a", a), ("b", b)):
        assert (f"{side}_mask" in inputs) == (f"{name}_mask" in batch)
    outputs = task.predict(inputs)
    assert outputs["a"].shape == outputs["b"].shape == (4, 7)
    losses = task.loss(outputs, inputs)
    assert {f"accuracy_{a}_to_{b}", f"accuracy_{b}_to_{a}", "scale", "loss"} == losses.keys()
    assert len(task.preview(inputs, outputs)) == 3
    # Whatever stands behind the mask has no say.
    for key in (key for key in ("text", "audio") if key in pair):
        batch[key] = torch.where(batch[f"{key}_mask"], batch[key], 7)
    again = task.predict(task.transform(batch, Draws(0, 0, 4)))
    if "audio" not in pair:  # the tiny sound encoder sees frames that begin valid and end behind the mask
        torch.testing.assert_close(again, outputs)


def test_images_are_cropped_lightly_or_not_at_all():
    batch = tiny_batch(4)
    whole = create("contrastive", tiny_encoders(), area=None).transform(batch, Draws(0, 0, 4))["a"]
    assert whole is batch["image"]
    cropped = create("contrastive", tiny_encoders()).transform(batch, Draws(0, 0, 4))["a"]
    assert cropped.shape == whole.shape
    assert cropped.is_floating_point()


@pytest.mark.parametrize("rows", [2, 9])
def test_chance_is_the_loss_of_the_best_constant(rows):
    same = torch.zeros(rows, 4, dtype=torch.float64)
    outputs = {"a": same, "b": same}
    clip, siglip = (create("contrastive", tiny_encoders(), form=form).double() for form in ("clip", "siglip"))
    assert math.isclose(clip.loss(outputs, {})["loss"], clip.chance(rows).loss, rel_tol=1e-9)

    def constant(bias: float) -> float:
        siglip.logit_bias.data.fill_(bias)
        return float(siglip.loss(outputs, {})["loss"])

    best = minimize_scalar(constant, bounds=(-8, 8), method="bounded")
    assert math.isclose(best.fun, siglip.chance(rows).loss, rel_tol=1e-6)
    assert siglip.chance(rows).metrics["accuracy_text_to_image"] == 1 / rows


def test_refuses_one_encoder_for_both_sides():
    with pytest.raises(RecipeError, match="two encoders"):
        create("contrastive", tiny_encoders(), a="image", b="image")
    with pytest.raises(RecipeError, match="form = 'clup'"):
        create("contrastive", tiny_encoders(), form="clup")
