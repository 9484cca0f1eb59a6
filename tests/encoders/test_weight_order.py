"""Weights of convolutional networks have their channels last in memory, and nothing but the speed shows it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mmssl


@pytest.mark.quick(2)
@pytest.mark.parametrize("model", ["timm/test_resnet", "timm/test_efficientnet", "torchvision/squeezenet1_1"])
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_outputs_and_gradients_are_those_of_the_usual_order(model, modality):
    torch.manual_seed(0)
    encoder = mmssl.encoder(model, modality=modality).double().eval()
    assert any(not p.is_contiguous() for p in encoder.parameters())
    usual = copy.deepcopy(encoder).to(memory_format=torch.contiguous_format)
    assert all(p.is_contiguous() for p in usual.parameters())
    x = torch.rand(2, 3, 48, 48).double() if modality == "image" else torch.rand(2, 8000).double()
    found, expected = encoder(x), usual(x)
    torch.testing.assert_close(found.tokens, expected.tokens)
    torch.testing.assert_close(found.pooled, expected.pooled)
    found.pooled.square().sum().backward()
    expected.pooled.square().sum().backward()
    for (name, a), b in zip(encoder.named_parameters(), usual.parameters(), strict=True):
        assert a.stride() == a.grad.stride(), f"{name}: a fused optimizer would pair wrong places"
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_a_teacher_has_the_order_of_its_student():
    student = mmssl.encoder("timm/test_resnet", modality="image")
    pairs = zip(student.parameters(), copy.deepcopy(student).double().parameters(), strict=True)
    assert all(a.stride() == b.stride() for a, b in pairs)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("model", "modality"),
    [("timm/test_vit", "image"), ("timm/test_convnext", "image"), ("torchvision/mc3_18", "video")],
)
def test_transformers_and_convolutions_over_clips_keep_the_usual_order(model, modality):
    encoder = mmssl.encoder(model, modality=modality)
    assert all(
        module.weight.is_contiguous() for module in encoder.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)
    )
