"""Colorization: colors of a gray picture, with rare ones weighed up in the gradient alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.color import rgb2lab
from tiny_encoders import TinyImage, tiny_batch, tiny_encoders
from torch import Tensor

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.reconstruction import colorization as module
from mmssl.objectives.reconstruction.colorization import Colorization
from mmssl.ops.draws import Draws
from mmssl.training.step import ForwardPass, accumulated_backward

WHOLE = {"views": {"area": (1.0, 1.0), "flip": 0.0}, "width": 64}
FORMS = pytest.mark.parametrize("form", ["classes", "regression"])


pytestmark = pytest.mark.usefixtures("double")


def task_of(**hyper: object) -> Colorization:
    torch.manual_seed(0)
    return create("colorization", {"image": TinyImage()}, **{**WHOLE, **hyper})


def pictures(rows: int, gray: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Pictures of a few colors each, some of none."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (rows, 3, 3, 3), generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images[list(gray)] = images[list(gray), :1]
    return {"image": images.to(torch.uint8)}


def dense_code(inputs: dict[str, Tensor]) -> Tensor:
    """The soft targets written out, (B, 313, h, w)."""
    rows, _, height, width = inputs["bins"].shape
    return torch.zeros(rows, 313, height, width).scatter(1, inputs["bins"], inputs["share"])


@FORMS
def test_lightness_goes_in_and_every_fourth_pixel_has_a_target(form):
    batch = tiny_batch(3)
    inputs = task_of(form=form).transform(batch, Draws(0, 0, 3))
    lab = rgb2lab(batch["image"].numpy() / 255, channel_axis=1)
    for channel in range(3):
        np.testing.assert_allclose(inputs["image"][:, channel].numpy(), lab[:, 0] / 100, atol=1e-9)
    np.testing.assert_allclose(inputs["ab"].numpy(), lab[:, 1:, ::4, ::4], atol=1e-9)
    assert set(inputs) - {"image", "ab", "weight", "colored_pixels", "constant_error"} == (
        {"bins", "share"} if form == "classes" else set()
    )


def test_the_default_crop_is_that_of_the_paper():
    task = create("colorization", {"image": TinyImage()}, views={"size": 176})
    image = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    seen = task.transform({"image": image}, Draws(0, 0, 2))["image"][:, 0]
    light = torch.tensor(rgb2lab(image.numpy() / 255, channel_axis=1)[:, 0] / 100)
    # One of the pixels of the picture, not a mixture of several: it was cut and not resized.
    for row in range(2):
        assert torch.isclose(seen[row, 88, 88], light[row], atol=1e-8, rtol=0).any()
        assert any(
            torch.allclose(seen[row], view[y : y + 176, x : x + 176], atol=1e-8)
            for view in (light[row], light[row].flip(-1))
            for y, x in torch.isclose(view, seen[row, 0, 0], atol=1e-8, rtol=0).nonzero().tolist()
            if y <= 80 and x <= 80
        )


def test_weights_are_those_of_the_paper():
    task = task_of()
    assert torch.allclose(task.weights(), torch.ones(313))
    p = torch.rand(313).pow(8)
    p /= p.sum()
    task.mean_target[0] = p
    w = task.weights()
    assert float((p * w).sum()) == pytest.approx(1)
    torch.testing.assert_close(w / w[0], ((p[0] + 1 / 313) / (p + 1 / 313)))
    task.rebalance = 1.0
    assert torch.allclose(task.weights(), torch.ones(313))


def test_the_loss_is_cross_entropy_and_its_gradient_is_weighted():
    task = task_of()
    task.mean_target[0] = torch.rand(313).softmax(0)
    inputs = task.transform(pictures(6, gray=(1, 4)), Draws(0, 0, 6))
    logits = torch.randn(6, 313, 3, 3, requires_grad=True)
    losses = task.loss({"answer": logits}, inputs)
    code = dense_code(inputs)
    colored = [0, 2, 3, 5]
    torch.testing.assert_close(losses["loss"], F.cross_entropy(logits[colored], code[colored]))
    (gradient,) = torch.autograd.grad(losses["loss"], logits)
    weight = task.weights()[code.argmax(1)]
    expected = weight[:, None] * (logits.softmax(1) - code) / (4 * 9)
    torch.testing.assert_close(gradient[colored], expected[colored])
    assert weight.std() > 0.01
    assert (gradient[[1, 4]] == 0).all()


def test_the_regression_is_squared_distance():
    task = task_of(form="regression")
    inputs = task.transform(pictures(6, gray=(1, 4)), Draws(0, 0, 6))
    answer = torch.randn(6, 2, 3, 3)
    colored = [0, 2, 3, 5]
    expected = (answer - inputs["ab"] / 110)[colored].square().sum(1).mean()
    torch.testing.assert_close(task.loss({"answer": answer}, inputs)["loss"], expected)


@pytest.mark.quick(1)
@FORMS
def test_chance_is_what_the_best_constant_scores(form):
    task = task_of(form=form)
    # Two frequent colors of several: after many steps with the same pictures their average is known.
    batch = pictures(8, gray=(3,))
    batch["image"][:, :, 4:] = torch.tensor([200, 30, 90], dtype=torch.uint8)[:, None, None]
    for step in range(60):
        inputs = task.transform(batch, Draws(0, step, 8))
        task.after_step(0.0)
    best = task.mean_target[1].log() if form == "classes" else task.mean_target[1]
    constant = best[None, :, None, None].requires_grad_()
    losses = task.loss({"answer": constant.expand(8, -1, 3, 3)}, inputs)
    assert losses["relative_error"].item() == pytest.approx(1, abs=0.01)
    assert task.chance(8).metrics == {"relative_error": 1.0}
    (pull,) = torch.autograd.grad(losses["loss"], constant)
    start = torch.zeros_like(constant).requires_grad_()
    (first,) = torch.autograd.grad(task.loss({"answer": start.expand(8, -1, 3, 3)}, inputs)["loss"], start)
    assert pull.norm() < 0.1 * first.norm()  # no constant is better
    if form == "classes":
        flat = task.loss({"answer": torch.zeros(8, 313, 3, 3)}, inputs)
        assert math.isclose(flat["loss"], task.chance(8).loss, rel_tol=1e-9)
        assert flat["relative_error"] > 1.2
    else:
        assert task.chance(8).loss is None


@pytest.mark.quick(1)
@FORMS
def test_the_average_is_that_of_all_colored_pictures_and_one_to_begin_with(form):
    task = task_of(form=form)
    before = task.mean_target.clone()
    codes = []
    for step in range(3):
        inputs = task.transform(pictures(5, gray=(2, step)), Draws(0, step, 5))
        codes.append(dense_code(inputs) if form == "classes" else inputs["ab"] / 110)
        codes[-1] = codes[-1][(inputs["weight"] > 0).flatten(1).any(1)].mean((2, 3))
        assert torch.equal(task.mean_target, before) == (step == 0)  # a step's loss does not see its own colors
        task.after_step(0.0)
    everything = torch.cat([before[:1], *codes])
    assert len(everything) == 1 + 3 + 3 + 4
    torch.testing.assert_close(task.mean_target[0], everything.mean(0), atol=1e-6, rtol=0)
    assert {"mean_target", "pictures"} <= set(task.state_dict())
    counted = task.recent.clone()
    task.eval().transform(pictures(7), Draws(0, 9, 7))
    assert torch.equal(task.recent, counted)


@pytest.mark.quick(1)
@FORMS
def test_processes_agree_on_the_average(form, monkeypatch):
    task, batch = task_of(form=form), pictures(6, gray=(1, 4, 5))
    task.transform(batch, Draws(0, 0, 6))
    whole, colored = task.recent.clone(), task.recent_pictures.clone()
    halves = []
    for part in range(2):
        task.transform({"image": batch["image"][3 * part : 3 * part + 3]}, Draws(0, 0, 3, share=part, shares=2))
        halves.append((task.recent.clone(), task.recent_pictures.clone()))
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole)
    assert halves[0][1] + halves[1][1] == colored == 3
    # What goes into the buffers is the average over processes, and nothing else.
    monkeypatch.setattr(module, "average", lambda value: torch.full_like(value, 7.0))
    task.transform(batch, Draws(0, 0, 6))
    assert (task.recent == 7).all()
    assert task.recent_pictures == 7


@pytest.mark.quick(1)
@FORMS
def test_micro_batches_weigh_pictures_as_the_whole_batch_does(form):
    def gradients(parts: int) -> list[Tensor]:
        task = task_of(form=form)
        if form == "classes":
            task.mean_target[0] = torch.rand(313, generator=torch.Generator().manual_seed(5)).mul(6).softmax(0)
        inputs = task.transform(pictures(8, gray=(0, 1, 6)), Draws(0, 0, 8))
        logs = accumulated_backward(ForwardPass(task), inputs, parts)
        return [*(p.grad for p in task.parameters()), logs["loss"], logs["relative_error"]]

    for found, expected in zip(gradients(4), gradients(1), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.quick(1)
@FORMS
def test_the_right_answer_paints_the_picture(form):
    task = task_of(form=form)
    # Colors that change slowly, since their targets lie four pixels apart.
    line = torch.linspace(0.3, 0.7, 12)
    image = torch.stack([line.expand(12, 12), line.expand(12, 12).T, torch.full((12, 12), 0.5)])
    inputs = task.transform({"image": image.expand(2, -1, -1, -1)}, Draws(0, 0, 2))
    answer = dense_code(inputs).log() if form == "classes" else inputs["ab"] / 110
    gray, target, prediction = task.preview(inputs, {"answer": answer})
    assert [panel.title for panel in (gray, target, prediction)] == ["input", "target", "prediction"]
    assert (target.cells[0] - image).abs().mean() < 0.1
    assert (prediction.cells[0] - target.cells[0]).abs().max() < 0.03
    assert gray.cells[0].shape == (3, 12, 12)


def test_pictures_without_color_alone_are_no_division_by_zero():
    task = task_of()
    inputs = task.transform(pictures(3, gray=(0, 1, 2)), Draws(0, 0, 3))
    losses = task(inputs)
    assert losses["loss"] == losses["relative_error"] == 0
    task.after_step(0.0)
    assert torch.allclose(task.mean_target, torch.full((2, 313), 1 / 313))


def test_refuses_what_it_cannot_paint():
    with pytest.raises(RecipeError, match="stride = 5 does not divide the crop of 12"):
        task_of(stride=5).transform(tiny_batch(2), Draws(0, 0, 2))
    with pytest.raises(RecipeError, match="rebalance = 0"):
        task_of(rebalance=0.0)
    with pytest.raises(RecipeError, match="reads audio"):
        create("colorization", tiny_encoders(), encoder="audio")
