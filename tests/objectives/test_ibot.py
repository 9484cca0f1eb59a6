"""iBOT and DINOv2: the loss against loops over crops and patches, Sinkhorn and KoLeo by their definitions, masks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoders import tiny_encoders, tiny_patches

from mmssl.audit.gradients import leaks
from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.invariance.ibot import IBOT
from mmssl.ops.clustering import balanced_assignment
from mmssl.ops.draws import Draws
from mmssl.ops.losses import koleo
from mmssl.training.step import ForwardPass, accumulated_backward

K, ROWS, SLOTS = 11, 4, 5
SMALL = {"prototypes": K, "hidden": 9, "bottleneck": 5, "local_crops": 2, "freeze_last": 0.0}
VIT = {"img_size": 24, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
DINOV2 = {"shared_head": False, "centering": "sinkhorn", "koleo": 0.1}


def task(**hyper: Any) -> IBOT:
    torch.manual_seed(0)
    encoder = create_encoder("timm/vit_tiny_patch16_224", "image", **VIT)
    return create("ibot", {"image": encoder}, **(SMALL | hyper))


def pictures(rows: int = ROWS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (rows, 3, 24, 24), generator=generator, dtype=torch.uint8)}


def made(crops: int = 4) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs and inputs by lot."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"student": (crops, K), "teacher": (2, K), "told": (SLOTS, K), "taught": (SLOTS, K), "pooled": (2, 6)}
    outputs = {
        key: torch.randn(ROWS, *size, generator=generator, dtype=torch.float64) / 5 for key, size in sizes.items()
    }
    outputs["z"] = torch.randn(ROWS, 2, 5, generator=generator)
    chosen = torch.arange(SLOTS) < torch.tensor([[5], [1], [3], [2]])
    return outputs, {"chosen": chosen}


def by_hand(outputs: dict, chosen: torch.Tensor, centers: tuple, colds: tuple[float, float]) -> torch.Tensor:
    """Loops over pairs of crops and over patches, as the published code of iBOT counts them."""
    crops, patches = [], []
    for i in range(2):
        wanted = torch.softmax((outputs["teacher"][:, i] - centers[0]) / colds[0], -1)
        for j in range(outputs["student"].shape[1]):
            if i != j:
                crops.append(-(wanted * torch.log_softmax(outputs["student"][:, j] / 0.1, -1)).sum(-1).mean())
    for row in range(ROWS):
        each = []
        for slot in range(SLOTS):
            if chosen[row, slot]:
                wanted = torch.softmax((outputs["taught"][row, slot] - centers[1]) / colds[1], -1)
                each.append(-(wanted * torch.log_softmax(outputs["told"][row, slot] / 0.1, -1)).sum())
        patches += [sum(each) / len(each), 0.0]  # of its two large crops one has hidden patches
    return sum(crops) / len(crops) + sum(patches) / len(patches)


def test_loss_and_gradient_are_those_of_crops_and_patches():
    built = task(teacher_temperature=(0.04, 0.07), patch_temperature=(0.05, 0.06), temperature_warmup=0.5)
    built = built.double().eval()
    built.progress.fill_(0.25)
    built.center.copy_(torch.linspace(-0.1, 0.1, K))
    built.patch_center.copy_(torch.linspace(0.1, -0.2, K))
    (outputs, inputs), (again, _) = made(), made()
    for key in ("student", "told"):
        outputs[key].requires_grad_()
        again[key].requires_grad_()
    losses = built.loss(outputs, inputs)
    expected = by_hand(again, inputs["chosen"], (built.center, built.patch_center), (0.055, 0.055))
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    expected.backward()
    for key in ("student", "told"):
        assert again[key].grad.abs().max() > 1e-3
        torch.testing.assert_close(outputs[key].grad, again[key].grad)


def test_alike_answers_have_their_level_and_one_prototype_for_all_shows():
    built = task(patches=0.6).double().eval()
    outputs, inputs = made()
    outputs = {key: torch.ones_like(value) for key, value in outputs.items()}
    assert built.loss(outputs, inputs)["loss"].item() == pytest.approx(1.3 * math.log(K))
    assert built.chance(ROWS).loss == pytest.approx(1.3 * math.log(K))
    one = torch.zeros(K, dtype=torch.float64)
    one[3] = 5.0
    outputs |= {key: one.expand_as(outputs[key]) for key in ("student", "teacher", "told", "taught")}
    losses = built.loss(outputs, inputs)
    assert losses["loss"] < 1e-12
    assert losses["spread"] < 1e-6


def test_sinkhorn_is_that_of_dinov2():
    scores = 3 * torch.randn(12, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counted = torch.arange(12) % 4 > 0
    shares = np.exp(scores[counted].numpy()).T
    shares /= shares.sum()
    for _ in range(3):
        shares /= shares.sum(1, keepdims=True) * K
        shares /= shares.sum(0, keepdims=True) * int(counted.sum())
    found = balanced_assignment(scores, counted).exp()
    np.testing.assert_allclose(found[counted].numpy(), (shares * int(counted.sum())).T, rtol=1e-10)
    assert found.isfinite().all()
    assert balanced_assignment(scores, torch.zeros(12, dtype=torch.bool)).isfinite().all()
    many = balanced_assignment(scores, iterations=200).exp()
    torch.testing.assert_close(many.sum(0), torch.full((K,), 12 / K, dtype=torch.float64))


def test_koleo_is_minus_the_log_of_the_distance_to_the_nearest():
    z = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, again = z.clone().requires_grad_(), z.clone().requires_grad_()
    unit = again / again.norm(dim=1, keepdim=True)
    distances = []
    for row in range(7):
        others = [(unit[row] - unit[other]).norm() for other in range(7) if other != row]
        distances.append(torch.stack(others).min())
    expected = -torch.stack(distances).log().mean()
    found = koleo(first)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found.backward()
    expected.backward()
    torch.testing.assert_close(first.grad, again.grad, rtol=1e-5, atol=1e-7)


def test_dinov2_adds_up_its_terms():
    built = task(**DINOV2).double().eval()
    assert built.meets == "loss"
    assert built.chance(ROWS).loss is None
    outputs, inputs = made()
    losses = built.loss(outputs, inputs)
    wanted = balanced_assignment((outputs["teacher"] / 0.04).flatten(0, 1)).exp().unflatten(0, (ROWS, 2))
    answered = (outputs["student"] / 0.1).log_softmax(-1)
    crops = [
        -(wanted[:, i] * answered[:, j]).sum(-1).mean() for i in range(2) for j in range(answered.shape[1]) if i != j
    ]
    torch.testing.assert_close(losses["crop_loss"], sum(crops) / len(crops))
    apart = koleo(outputs["pooled"][:, 0]) + koleo(outputs["pooled"][:, 1])
    torch.testing.assert_close(losses["loss"], losses["crop_loss"] + losses["patch_loss"] + 0.1 * apart)


def test_one_of_two_large_crops_has_a_tenth_to_a_half_of_its_patches_hidden():
    built = task()
    inputs = built.transform(pictures(200), Draws(0, 0, 200))
    share = inputs["hidden"].double().mean(1)
    assert 1 / 36 <= share.min() < 0.15
    assert 0.4 < share.max() <= 0.5
    assert 0.2 < share.mean() < 0.35
    assert inputs["which"].double().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(inputs["chosen"].sum(1), inputs["hidden"].sum(1))
    assert inputs["hidden"].gather(1, inputs["places"])[inputs["chosen"]].all()


@pytest.mark.parametrize("hyper", [{}, DINOV2], ids=["ibot", "dinov2"])
def test_the_student_sees_no_hidden_patch_and_the_teacher_all(hyper):
    built = task(**hyper).eval()
    found = {leak.what: leak for leak in leaks(built, pictures())}
    assert not [leak for leak in found.values() if leak.leaks]
    assert "what is hidden" in found
    inputs = built.transform(pictures(), Draws(0, 0, ROWS))
    mask = built._pixels(inputs)
    assert torch.equal(mask.flatten(2).any(2), torch.stack([inputs["which"] == i for i in range(2)], dim=1))
    other = inputs | {"views": torch.where(mask, 1 - inputs["views"], inputs["views"])}
    first, second = built.predict(inputs), built.predict(other)
    torch.testing.assert_close(first["told"], second["told"])
    torch.testing.assert_close(first["student"], second["student"])
    assert (first["taught"] - second["taught"]).abs().max() > 1e-4
    assert first["student"].shape == (ROWS, 4, K)
    assert not first["taught"].requires_grad


def test_heads_are_one_or_two_and_the_teacher_follows_them():
    assert task().patch_head is None
    built = task(**DINOV2, momentum=0.9)
    before = built.teacher["patch_head"].prototypes.weight.clone()
    with torch.no_grad():
        built.patch_head.prototypes.weight.add_(1.0)
    built.after_step(0.5)  # momentum 0.95
    torch.testing.assert_close(built.teacher["patch_head"].prototypes.weight, before + 0.05)


def test_micro_batches_move_both_centers_as_one_batch_does():
    centers = []
    for parts in (1, 4):
        built = task()
        inputs = built.transform(pictures(8), Draws(0, 0, 8))
        accumulated_backward(ForwardPass(built), inputs, parts)
        built.after_step(0.5)
        centers.append(torch.stack([built.center, built.patch_center]))
        assert built.patches_count == 0
    assert centers[0].abs().amax(1).min() > 1e-3
    torch.testing.assert_close(*centers)


def test_preview():
    built = task()
    inputs = built.transform(pictures(), Draws(0, 0, ROWS))
    with torch.no_grad():
        panels = built.preview(inputs, built.predict(inputs))
    assert [panel.title for panel in panels][-3:] == ["teacher looks at", "student sees", "and tells"]
    assert all(len(panel.cells) == ROWS for panel in panels)


def test_what_cannot_be_is_said():
    with pytest.raises(RecipeError, match="does not read patch by patch"):
        create("ibot", {"image": create_encoder("timm/test_resnet", "image")}, **SMALL)
    with pytest.raises(RecipeError, match="ibot reads image, and the encoder 'audio' reads audio"):
        create("ibot", {"audio": tiny_patches()["audio"]}, encoder="audio", **SMALL)
    with pytest.raises(RecipeError, match="reads text"):
        create("ibot", tiny_encoders(), encoder="text", **SMALL)
    with pytest.raises(RecipeError, match="smaller share"):
        task(mask_ratio=(0.5, 0.1))
    with pytest.raises(RecipeError, match="cannot be cut into patches"):
        task().transform({"image": pictures()["image"][..., :22, :22]}, Draws(0, 0, ROWS))
