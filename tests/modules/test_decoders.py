"""The dense decoder: any grid to any size, row by row."""

from __future__ import annotations

import pytest
import torch

from mmssl.encoders import create
from mmssl.encoders.base import Features
from mmssl.errors import RecipeError
from mmssl.modules.decoders import DenseDecoder, feature_map

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 8},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2, "context_length": 12},
}


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (7, 7), (3, 5), (20, 20)])
@pytest.mark.parametrize("size", [(8, 8), (14, 22)])
def test_it_answers_in_any_size_and_rows_never_meet(grid, size):
    torch.manual_seed(0)
    decoder = DenseDecoder(6, 3, width=64).double()
    x = torch.randn(4, 6, *grid, dtype=torch.float64, requires_grad=True)
    answer = decoder(x, size)
    assert answer.shape == (4, 3, *size)
    torch.testing.assert_close(answer[1:2], decoder(x[1:2], size))
    answer[0].sum().backward()
    assert (x.grad[1:] == 0).all()
    assert x.grad[0].abs().sum() > 0
    assert all(p.grad is not None for p in decoder.parameters())


def test_a_flat_map_gives_no_checkerboard():
    # Away from the border all places see the same, so that they must be told the same.
    torch.manual_seed(0)
    decoder = DenseDecoder(6, 2, width=64).double()
    answer = decoder(torch.randn(1, 6, 1, 1, dtype=torch.float64).expand(1, 6, 16, 16), (64, 64))[..., 20:44, 20:44]
    assert (answer - answer[..., :1, :1]).abs().max() < 1e-10


def test_the_map_holds_each_token_at_its_place_and_the_pooled_vector_everywhere():
    tokens, pooled = torch.randn(2, 6, 5), torch.randn(2, 5)
    found = feature_map(Features(tokens, pooled, (2, 3)))
    assert found.shape == (2, 5, 2, 3)
    torch.testing.assert_close(found[1, :, 1, 0], tokens[1, 3] + pooled[1])


@pytest.mark.parametrize("grid", [(6,), (1, 6), (1, 2, 3), ()])
def test_tokens_without_a_grid_are_refused(grid):
    with pytest.raises(RecipeError, match="height and width"):
        feature_map(Features(torch.zeros(1, 6, 5), torch.zeros(1, 5), grid))


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("model", "arguments", "grid"),
    [
        ("timm/test_resnet", {}, (1, 1)),
        ("timm/test_vit", {"img_size": 32, "patch_size": 8}, (4, 4)),
        ("timm/vit_base_patch16_siglip_224", {**VIT, "img_size": 32}, (4, 4)),
        ("torchvision/resnet18", {}, (1, 1)),
        ("open_clip/ViT-B-32", CLIP, (4, 4)),
    ],
)
def test_any_image_encoder_carries_it_and_all_its_weights_learn(model, arguments, grid):
    encoder = create(model, "image", **arguments)
    features = encoder(torch.rand(2, 3, 32, 32))
    decoder = DenseDecoder(encoder.dim, 3, width=64)
    answer = decoder(feature_map(features), (8, 8))
    assert features.grid == grid
    assert answer.shape == (2, 3, 8, 8)
    answer.square().sum().backward()
    assert not [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
