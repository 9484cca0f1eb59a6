"""Weights and positions that published transformers start from."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from torch import nn

from mmssl.encoders import create, reinitialized
from mmssl.encoders.backbones._timm_start import sines_and_cosines
from mmssl.errors import RecipeError

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 4}


def vit(start: str, **arguments):
    torch.manual_seed(0)
    return create("timm/vit_tiny_patch16_224", "image", weight_init=start, **VIT | arguments)


def assert_uniform(weight: torch.Tensor, bound: float) -> None:
    values = weight.detach()
    assert bound * 0.99 < float(values.abs().max()) <= bound
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("start", ["mae", "moco_v3"])
def test_weights_are_xavier_and_the_patch_embedding_is_a_linear_layer(start):
    """MAE, appendix A.1: "We use xavier_uniform to initialize all Transformer blocks"; its code and v3's the rest."""
    net = vit(start).backbone.net
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            fan_out = module.out_features // 3 if start == "moco_v3" and name.endswith("qkv") else module.out_features
            assert_uniform(module.weight, math.sqrt(6 / (fan_out + module.in_features)))
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert module.weight.eq(1).all()
            assert not module.bias.any()
    assert_uniform(net.patch_embed.proj.weight, math.sqrt(6 / (3 * 8 * 8 + 96)))
    assert net.cls_token.std().item() == pytest.approx(0.02 if start == "mae" else 1e-6, rel=0.3)


@pytest.mark.parametrize("start", ["mae", "moco_v3"])
def test_positions_are_mae_s_and_do_not_learn(start):
    expected = torch.zeros(1, 17, 96)  # the class token has none
    for row, column, k in itertools.product(range(4), range(4), range(24)):
        for half, place in ((0, column), (48, row)):
            angle = place / 10_000 ** (k / 24)
            expected[0, 1 + 4 * row + column, half + k] = math.sin(angle)
            expected[0, 1 + 4 * row + column, half + 24 + k] = math.cos(angle)
    net = vit(start).backbone.net
    torch.testing.assert_close(net.pos_embed.detach(), expected)
    assert {name for name, parameter in net.named_parameters() if not parameter.requires_grad} == {"pos_embed"}


def test_rows_and_columns_of_a_grid_that_is_no_square_are_told_apart():
    grid = sines_and_cosines(3, 5, 8).unflatten(0, (3, 5))
    columns, rows = grid[..., :4], grid[..., 4:]
    assert torch.equal(columns, columns[:1].expand_as(columns))
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    torch.testing.assert_close(columns[0, :, 0], torch.arange(5).sin())
    torch.testing.assert_close(rows[:, 0, 2], torch.arange(3).cos())


def test_it_is_built_again_so_and_leaves_as_timm_s_own(tmp_path):
    encoder = vit("mae")
    other = reinitialized(encoder, seed=1)
    assert torch.equal(other.backbone.net.pos_embed, encoder.backbone.net.pos_embed)
    weights = [e.backbone.net.blocks[0].mlp.fc1.weight for e in (encoder, other)]
    assert not torch.equal(*weights)
    assert_uniform(weights[1], math.sqrt(6 / (96 + 384)))
    encoder.export(tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(loaded.blocks[0].mlp.fc1.weight, weights[0])
    again = create("timm/vit_tiny_patch16_224", "image", weight_init="mae", pretrained=f"local-dir:{tmp_path}")
    assert torch.equal(again.backbone.net.blocks[0].mlp.fc1.weight, weights[0])


@pytest.mark.quick(1)
@pytest.mark.parametrize("model", ["timm/test_resnet", "timm/swin_tiny_patch4_window7_224"])
def test_other_networks_are_refused(model):
    with pytest.raises(RecipeError, match="weight_init = 'mae' is for a plain vision transformer"):
        create(model, "image", weight_init="mae")
