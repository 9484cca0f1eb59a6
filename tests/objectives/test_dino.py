"""DINO: multi-crop, the loss against loops over pairs, the teacher, the center, the schedules."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.layers import DropPath
from tiny_encoders import tiny_batch, tiny_encoders
from torch import nn

import mmssl
from mmssl.batch import split_rows
from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.modules.prototypes import PrototypeHead
from mmssl.objectives import create
from mmssl.objectives.invariance.dino import _focus
from mmssl.ops.draws import Draws
from mmssl.registry import ROOT
from mmssl.training.step import ForwardPass, accumulated_backward

K, ROWS = 11, 4
SMALL = {"prototypes": K, "hidden": 9, "bottleneck": 5, "local_crops": 2, "local_views": {"size": 8}}
VIT = {"img_size": 32, "patch_size": 8}


def _task(**hyper):
    torch.manual_seed(0)
    return create("dino", tiny_encoders(), **(SMALL | hyper))


def _audio(**hyper):
    return _task(encoder="audio", local_views=None, **hyper)


def _logits(crops: int = 10, rows: int = ROWS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, crops, K, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(rows, 2, K, generator=generator, dtype=torch.float64) / 5
    return {"student": student, "teacher": teacher, "z": torch.randn(rows, 2, 5, generator=generator)}


def _inputs(task, rows: int = ROWS, step: int = 0):
    return task.transform(tiny_batch(rows), Draws(0, step, rows))


def _by_hand(student, teacher, center, cold: float, warm: float):
    """Loops over pairs of crops, as equation 3 of the paper and the published code count them."""
    terms = []
    for i in range(2):
        wanted = torch.softmax((teacher[:, i] - center) / cold, -1)
        for j in range(student.shape[1]):
            if i != j:
                terms.append(torch.sum(-wanted * torch.log_softmax(student[:, j] / warm, -1), -1).mean())
    return terms


def test_loss_and_gradient_are_those_of_eighteen_pairs():
    task = _task().double().eval()
    task.center.copy_(torch.linspace(-0.1, 0.1, K))
    outputs = _logits()
    losses = task.loss(outputs, {})
    again = outputs["student"].detach().requires_grad_()
    terms = _by_hand(again, outputs["teacher"], task.center, 0.04, 0.1)
    assert len(terms) == 18
    expected = sum(terms) / 18
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    expected.backward()
    assert again.grad.abs().max() > 1e-3
    torch.testing.assert_close(outputs["student"].grad, again.grad)


def test_alike_answers_cost_ln_k_and_one_prototype_for_all_nothing():
    task = _task().double().eval()
    outputs = {key: torch.ones_like(value) for key, value in _logits().items()}
    losses = task.loss(outputs, {})
    assert losses["loss"] == pytest.approx(math.log(K))
    assert losses["teacher_entropy"] == pytest.approx(math.log(K))
    assert task.chance(ROWS).loss == pytest.approx(math.log(K))
    one = torch.zeros(K, dtype=torch.float64)
    one[3] = 5.0
    outputs |= {"student": one.expand(ROWS, 10, K), "teacher": one.expand(ROWS, 2, K)}
    losses = task.loss(outputs, {})
    assert losses["loss"] < 1e-12
    assert losses["spread"] < 1e-6


@pytest.mark.parametrize("make", [_task, _audio])
def test_the_student_sees_all_crops_and_the_teacher_the_large_ones(make):
    task = make()
    inputs = _inputs(task)
    assert inputs["views"].shape[:2] == inputs["local"].shape[:2] == (ROWS, 2)
    assert inputs["local"].shape[-1] < inputs["views"].shape[-1]
    seen: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    for who, encoder in (("student", task.encoder(task.name)), ("teacher", task.teacher["encoder"])):
        encoder.register_forward_pre_hook(lambda module, given, who=who: seen[who].append(given[0]))
    outputs = task.predict(inputs)
    large, small = inputs["views"].flatten(0, 1), inputs["local"].flatten(0, 1)
    assert [torch.equal(a, b) for a, b in zip(seen["student"], (large, small), strict=True)] == [True, True]
    assert [torch.equal(a, b) for a, b in zip(seen["teacher"], (large,), strict=True)] == [True]
    assert outputs["student"].shape == (ROWS, 4, K)
    assert outputs["teacher"].shape == (ROWS, 2, K)
    assert not outputs["teacher"].requires_grad
    # At the start the teacher is a copy; large crops come first.
    torch.testing.assert_close(outputs["student"][:, :2], outputs["teacher"])


def test_published_settings_of_the_crops():
    task = create("dino", {"image": create_encoder("timm/test_vit", "image")}, prototypes=8, hidden=8)
    first, second = task.views.settings
    assert (first.area, first.blur, first.solarize) == ((0.4, 1.0), 1.0, 0.0)
    assert (second.area, second.blur, second.solarize) == ((0.4, 1.0), 0.1, 0.2)
    assert [view.area for view in task.local_views.settings] == [(0.05, 0.4)] * 8
    image = {"image": torch.zeros(1, 3, 224, 224, dtype=torch.uint8)}
    inputs = task.transform(image, Draws(0, 0, 1))
    assert inputs["views"].shape == (1, 2, 3, 224, 224)
    assert inputs["local"].shape == (1, 8, 3, 96, 96)
    image = {"image": torch.zeros(1, 3, 100, 100, dtype=torch.uint8)}
    assert task.transform(image, Draws(0, 0, 1))["local"].shape[-1] == 48  # 43 pixels, in whole patches of 16


def test_without_small_crops_two_pairs_are_left():
    task = _task(local_crops=0)
    inputs = _inputs(task)
    assert set(inputs) == {"views"}
    outputs = task.predict(inputs)
    assert outputs["student"].shape == (ROWS, 2, K)
    terms = _by_hand(outputs["student"], outputs["teacher"], task.center, 0.04, 0.1)
    torch.testing.assert_close(task.loss(outputs, inputs)["loss"], sum(terms) / 2)


def test_the_head_is_published_weight_norm_with_its_gain_frozen_at_one():
    head = PrototypeHead(6, 9, 5, K, batch_norm=False).double()
    pooled = torch.randn(3, 4, 6, dtype=torch.float64)
    layer = nn.Linear(5, K, bias=False).double()
    layer.weight.data.copy_(head.prototypes.weight.data)
    normed = nn.utils.parametrizations.weight_norm(layer)
    normed.parametrizations.weight.original0.data.fill_(1)
    z, logits = head(pooled)
    torch.testing.assert_close(z, nn.functional.normalize(head.mlp(pooled), dim=-1))
    expected = normed(z)
    torch.testing.assert_close(logits, expected)
    (logits**3).sum().backward(retain_graph=True)
    (expected**3).sum().backward()
    torch.testing.assert_close(head.prototypes.weight.grad, normed.parametrizations.weight.original1.grad)
    assert not [m for m in head.modules() if isinstance(m, nn.BatchNorm1d)]
    assert len([m for m in PrototypeHead(6, 9, 5, K, True).modules() if isinstance(m, nn.BatchNorm1d)]) == 2


def test_prototypes_are_frozen_at_first_with_a_gradient_of_zero():
    task = _task(freeze_last=0.1)
    inputs = _inputs(task)
    for progress, frozen in ((0.0, True), (0.09, True), (0.1, False), (0.5, False)):
        if progress:
            task.after_step(progress)
        task.zero_grad()
        task(inputs)["loss"].backward()
        gradient = task.head.prototypes.weight.grad
        assert (gradient.abs().max() == 0) == frozen
        assert task.head.mlp[0].weight.grad.abs().max() > 0
    task = _task(freeze_last=0.0)
    task(inputs)["loss"].backward()
    assert task.head.prototypes.weight.grad.abs().max() > 0


def test_the_center_moves_after_the_step_by_what_the_loss_saw():
    task = _task().double()
    outputs = _logits()
    mean = outputs["teacher"].mean((0, 1))
    first = task.loss(outputs, {})["loss"]
    assert task.center.abs().max() == 0
    torch.testing.assert_close(first, task.loss(outputs, {})["loss"])
    task.after_step(0.1)
    torch.testing.assert_close(task.center, 0.1 * mean)
    assert (task.loss(outputs, {})["loss"] - first).abs() > 1e-4
    task.after_step(0.2)
    torch.testing.assert_close(task.center, 0.9 * 0.1 * mean + 0.1 * mean)
    center = task.center.clone()
    task.eval().loss(outputs, {})
    task.after_step(0.3)
    assert torch.equal(task.center, center)


def test_micro_batches_move_the_center_as_one_batch_does():
    centers = []
    for parts in (1, 4):
        task = _task()
        accumulated_backward(ForwardPass(task), _inputs(task, 8), parts)
        task.after_step(0.5)
        centers.append(task.center)
    assert centers[0].abs().max() > 1e-3
    torch.testing.assert_close(centers[0], centers[1])


def test_the_teacher_is_another_object_that_follows():
    task = _task(momentum=0.9)
    student = {"encoder": task.encoder("image"), "head": task.head}
    assert task.teacher["encoder"] is not student["encoder"]
    own = dict(task.teacher.named_parameters())
    pairs = [(own[f"{part}.{name}"], p) for part, m in student.items() for name, p in m.named_parameters()]
    assert len(pairs) == len(own)
    assert all(a.data_ptr() != b.data_ptr() and not a.requires_grad and b.requires_grad for a, b in pairs)
    before = [a.clone() for a, _ in pairs]
    with torch.no_grad():
        for _, b in pairs:
            b.add_(1.0)
    assert all(torch.equal(a, old) for (a, _), old in zip(pairs, before, strict=True))
    task.after_step(0.5)  # momentum 0.95
    for (a, b), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(a, 0.95 * old + 0.05 * b)
    task.after_step(1.0)
    still = [a.clone() for a, _ in pairs]
    task.after_step(1.0)
    assert all(torch.equal(a, old) for (a, _), old in zip(pairs, still, strict=True))


def test_the_teacher_is_in_training_mode_without_dropout():
    encoder = create_encoder("timm/test_vit", "image", drop_path_rate=0.5, proj_drop_rate=0.5, **VIT)
    task = create("dino", {"image": encoder}, prototypes=K, hidden=9, local_crops=0).train()
    assert task.teacher.training
    rates = {name: [m.drop_prob for m in part.modules() if isinstance(m, DropPath)] for name, part in
             (("student", encoder), ("teacher", task.teacher))}  # fmt: skip
    assert max(rates["student"]) == 0.5
    assert set(rates["teacher"]) == {0.0}
    inputs = task.transform({"image": torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8)}, Draws(0, 0, ROWS))
    one, two = task.predict(inputs), task.predict(inputs)
    assert torch.equal(one["teacher"], two["teacher"])
    assert not torch.equal(one["student"], two["student"])


def test_the_temperature_of_the_teacher_warms_up():
    task = _task(teacher_temperature=(0.04, 0.07), temperature_warmup=0.3).double().eval()
    outputs = _logits()
    for progress, cold in ((0.0, 0.04), (0.1, 0.05), (0.3, 0.07), (0.9, 0.07)):
        task.progress.fill_(progress)
        terms = _by_hand(outputs["student"], outputs["teacher"], task.center, cold, 0.1)
        torch.testing.assert_close(task.loss(outputs, {})["loss"], sum(terms) / 18)


@pytest.mark.long
def test_the_teacher_leaves_the_run(tmp_path):
    recipe = ROOT.parent / "recipes" / "invariance" / "dino_toy.yaml"
    few = {"training.steps": 3, "training.batch_size": 4, "data.limit": 8, "training.optimizer.lr": 0.01}
    run = mmssl.run(recipe, few, out=tmp_path / "run", quiet=True)
    task, encoder = run.objective, run.encoders["image"]
    assert encoder is task.teacher["encoder"]
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        taught, learned = encoder(image).pooled, task.encoders["image"](image).pooled
        assert (taught - learned).abs().max() > 1e-4
        torch.testing.assert_close(mmssl.load(tmp_path / "run").encoders["image"](image).pooled, taught)
        encoder.export(tmp_path / "native")
        net = timm.create_model(f"local-dir:{tmp_path / 'native'}", pretrained=True).eval()
        torch.testing.assert_close(net(encoder.normalize(image)), taught)


def test_focus_is_the_attention_of_the_class_token():
    encoder = create_encoder("timm/test_vit", "image", **VIT).eval()
    image = torch.rand(3, 3, 32, 32)
    attention = encoder.backbone.net.blocks[-1].attn
    seen: list[torch.Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        found = _focus(encoder, image, None)
        hook.remove()
        queries, keys, _ = attention.qkv(seen[0]).reshape(3, 17, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        weight = (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:].mean(1).view(3, 1, 4, 4)
        expected = nn.functional.interpolate(weight, (32, 32), mode="bilinear")[:, 0]
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(found, (expected - low) / (high - low))
    assert (
        attention.fused_attn == create_encoder("timm/test_vit", "image", **VIT).backbone.net.blocks[-1].attn.fused_attn
    )


@pytest.mark.parametrize("make", [_task, _audio])
def test_preview(make):
    task = make()
    inputs = _inputs(task)
    with torch.no_grad():
        panels = task.preview(inputs, task.predict(inputs))
    assert [panel.title for panel in panels][-2:] == ["prototypes of 1 and 2", "teacher looks at"]
    assert all(len(panel.cells) == ROWS for panel in panels)
    looks = panels[-1].cells[0]
    assert looks.shape == inputs["views"][0, 0].shape
    assert 0 <= looks.min() <= looks.max() <= 1


MODELS = {
    "timm/test_resnet": {},
    "timm/test_vit": VIT,
    "torchvision/shufflenet_v2_x0_5": {},
    "open_clip/ViT-B-32": {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "image_size": 64, "patch_size": 16},
        "text_cfg": {"layers": 1, "width": 32, "heads": 2},
    },
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("model", MODELS)
def test_any_image_encoder(model):
    encoder = create_encoder(model, "image", **MODELS[model])
    task = create("dino", {"image": encoder}, prototypes=K, hidden=9, bottleneck=5, local_crops=2)
    inputs = task.transform({"image": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)}, Draws(0, 0, 2))
    outputs = task.predict(inputs)
    losses = task.loss(outputs, inputs)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    with torch.no_grad():
        assert len(task.preview(inputs, outputs)) == 5
    assert len(split_rows(outputs, 2)) == 2


def test_refuses_other_modalities():
    with pytest.raises(RecipeError, match="reads text"):
        _task(encoder="text")
