"""Images: equal to the library's own forward, subsets of tokens, normalization, other sizes."""

import pytest
import torch
import torchvision
from torch.nn.functional import interpolate

from mmssl.encoders import create
from mmssl.encoders.image import Normalize

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 8},
    "text_cfg": {"layers": 1, "width": 16, "heads": 2, "context_length": 8, "vocab_size": 50},
}
VARIANTS = [
    {},
    {"class_token": False, "global_pool": "avg"},
    {"reg_tokens": 4},
    {"no_embed_class": True},
    {"reg_tokens": 2, "no_embed_class": True},
    {"class_token": False, "reg_tokens": 3, "global_pool": "avg", "no_embed_class": True},
    {"pos_embed": "none"},
    {"global_pool": "map", "class_token": False},
    {"pre_norm": True, "dynamic_img_size": False},
]


def pictures(size=32, rows=2):
    return torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def vit(**kwargs):
    encoder = create("timm/vit_tiny_patch16_224", "image", **VIT | kwargs).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.3)  # class token, biases and layer norms are constants at initialization
    return encoder


@pytest.mark.quick(2)
@pytest.mark.parametrize("kwargs", VARIANTS)
def test_vision_transformer_equals_timm(kwargs):
    encoder = vit(**kwargs)
    net = encoder.backbone.net
    for size in (32, 48) if kwargs.get("dynamic_img_size", True) else (32,):
        x = pictures(size)
        native = net.forward_features(encoder.normalize(x))
        features = encoder(x)
        torch.testing.assert_close(features.tokens, native[:, net.num_prefix_tokens :], rtol=0, atol=1e-9)
        torch.testing.assert_close(features.pooled, net.forward_head(native, pre_logits=True), rtol=0, atol=1e-9)
        assert features.grid == (size // 8, size // 8)
        torch.testing.assert_close(encoder.encode(encoder.embed(x)).tokens, features.tokens)
        depths = net.forward_intermediates(encoder.normalize(x), intermediates_only=True)
        assert list(encoder.layers(x)) == ["blocks.0", "blocks.1"]
        for mine, theirs in zip(encoder.layers(x).values(), depths, strict=True):
            torch.testing.assert_close(mine.tokens, theirs.flatten(2).mT)
            torch.testing.assert_close(mine.pooled, theirs.mean(dim=(2, 3)))
            assert mine.grid == theirs.shape[2:]


@pytest.mark.parametrize("kwargs", VARIANTS[:6])
def test_order_of_a_subset_permutes_its_tokens(kwargs):
    encoder = vit(**kwargs)
    tokens = encoder.embed(pictures())
    assert tokens.shape == (2, 16, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))[:7]
    straight, mixed = encoder.encode(tokens[:, order.sort().values]), encoder.encode(tokens[:, order])
    torch.testing.assert_close(mixed.tokens[:, order.argsort()], straight.tokens)
    torch.testing.assert_close(mixed.pooled, straight.pooled)
    assert straight.grid == ()
    # What is left out has no influence, and what is in has.
    others = tokens.clone()
    others[:, [i for i in range(16) if i not in order]] += 1
    torch.testing.assert_close(encoder.encode(others[:, order]).tokens, mixed.tokens)
    assert not torch.allclose(encoder.encode(tokens).pooled, mixed.pooled)


@pytest.mark.parametrize("kwargs", VARIANTS[:6])
def test_a_masked_token_is_as_good_as_left_out(kwargs):
    encoder = vit(**kwargs)
    tokens = encoder.embed(pictures())
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 3:9] = True
    masked, left_out = encoder.encode(tokens, mask), encoder.encode(tokens[:, 3:9])
    torch.testing.assert_close(masked.tokens[:, 3:9], left_out.tokens)
    torch.testing.assert_close(masked.pooled, left_out.pooled)
    # A row without any valid token counts as valid throughout.
    torch.testing.assert_close(encoder.encode(tokens, torch.zeros_like(mask)).pooled, encoder.encode(tokens).pooled)


@pytest.mark.parametrize("kwargs", VARIANTS[:7])
def test_a_mask_token_stands_in_for_a_patch_and_gets_its_position(kwargs):
    hidden_patches_are_unseen(vit(**kwargs))


def test_a_mask_token_of_open_clip_is_as_wide_as_its_transformer():
    encoder = create("open_clip/ViT-B-32", "image", **CLIP).double().eval()
    assert (encoder.width, encoder.dim) == (32, 16)
    hidden_patches_are_unseen(encoder)


def hidden_patches_are_unseen(encoder):
    x = pictures().double().div(255).requires_grad_()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :5] = mask[1, 9:] = True
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, encoder.width, generator=generator, dtype=torch.float64)
    tokens = encoder.embed(x, mask, first)
    assert tokens.shape == (2, 16, encoder.width)
    assert torch.equal(tokens[~mask], encoder.embed(x)[~mask])
    # A patch of a picture that is the same everywhere embeds as itself and its position; so does the token.
    blank = torch.full_like(x, 0.3)
    difference = tokens[mask] - encoder.embed(blank)[mask]
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))
    torch.testing.assert_close(encoder.embed(x, mask, second)[mask] - tokens[mask], (second - first).expand(12, -1))
    # Two images of 4 × 4 patches of 8 pixels: the gradient is 0 in the hidden ones, and nowhere else.
    (gradient,) = torch.autograd.grad((encoder.encode(tokens).tokens ** 3).sum(), x)
    reached = gradient.abs().sum(1).unfold(1, 8, 8).unfold(2, 8, 8).sum((3, 4)).flatten(1)
    assert torch.equal(reached == 0, mask)
    with pytest.raises(ValueError, match="hidden and mask_token come together"):
        encoder.embed(x, mask)


def test_convolutional_network_has_no_subsets():
    encoder = create("timm/resnet18", "image")
    assert not encoder.subsets
    assert encoder.patch_size is None
    assert encoder.width is None
    with pytest.raises(TypeError, match="timm/resnet18 has no tokens that can be left out"):
        encoder.embed(pictures())


def test_open_clip_tower_equals_open_clip():
    encoder = create("open_clip/ViT-B-32", "image", **CLIP).double().eval()
    net, x = encoder.backbone.net, encoder.normalize(pictures())
    features = encoder(pictures())
    torch.testing.assert_close(features.pooled, net(x), rtol=0, atol=1e-9)
    net.output_tokens = True
    torch.testing.assert_close(features.tokens, net(x)[1] @ net.proj, rtol=0, atol=1e-9)
    net.output_tokens = False
    assert features.grid == (4, 4)
    tokens = encoder.embed(pictures())
    order = torch.arange(15, -1, -1)
    torch.testing.assert_close(encoder.encode(tokens[:, order]).tokens[:, order], features.tokens)
    native = net.forward_intermediates(x, intermediates_only=True)["image_intermediates"]
    for mine, theirs in zip(encoder.layers(pictures()).values(), native, strict=True):
        torch.testing.assert_close(mine.tokens, theirs.flatten(2).mT)
        assert mine.grid == theirs.shape[2:]
    assert encoder(pictures(48)).grid == (6, 6)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("RN50", {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}}),
        ("ViT-B-16-SigLIP", {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"}, "embed_dim": 192}),
        ("convnext_base", {"vision_cfg": {"timm_model_name": "convnext_atto"}}),
        ("coca_ViT-B-32", {"vision_cfg": CLIP["vision_cfg"] | {"attn_pooler_heads": 4}, "embed_dim": 32}),
    ],
)
def test_other_open_clip_towers_pool_like_open_clip(name, kwargs):
    text = {"text_cfg": {"layers": 1, "width": 16, "heads": 2, "vocab_size": 50}}
    encoder = create(f"open_clip/{name}", "image", **kwargs | text).eval()
    size = {"RN50": 64, "coca_ViT-B-32": 32}.get(name, 224)
    features = encoder(pictures(size))
    native = encoder.backbone.net(encoder.normalize(pictures(size)))
    torch.testing.assert_close(features.pooled, native[0] if isinstance(native, tuple) else native)
    assert features.tokens.shape == (2, features.grid[0] * features.grid[1], encoder.dim)
    assert len(encoder.layers(pictures(size))) >= 2


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("efficientnet_b0", 64),
        ("resnet18", 64),
        ("convnext_tiny", 64),
        ("swin_t", 64),
        ("vit_b_16", 32),
        ("regnet_y_400mf", 64),
    ],
)
def test_torchvision_network_equals_torchvision(name, size):
    kwargs = {"image_size": 32} if name == "vit_b_16" else {}
    encoder = create(f"torchvision/{name}", "image", **kwargs).double().eval()
    x = encoder.normalize(pictures(size))
    features = encoder(pictures(size))
    torch.testing.assert_close(features.pooled, encoder.backbone.net(x))
    assert features.tokens.shape == (2, features.grid[0] * features.grid[1], encoder.dim)
    if name == "resnet18":
        net = torchvision.models.resnet18().double()
        net.fc = torch.nn.Identity()
        net.load_state_dict(encoder.backbone.net.state_dict())
        torch.testing.assert_close(net.eval()(x), features.pooled)
        last = net.layer4(net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x))))))))
        torch.testing.assert_close(features.tokens, last.flatten(2).transpose(1, 2))
        depths = encoder.layers(pictures(size))
        assert list(depths)[-4:] == ["layer1", "layer2", "layer3", "layer4"]
        torch.testing.assert_close(depths["bn1"].tokens, net.bn1(net.conv1(x)).flatten(2).mT)
        torch.testing.assert_close(depths["layer4"].tokens, features.tokens)


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5", "alexnet", "densenet121"])
def test_torchvision_network_pools_its_last_map(name):
    encoder = create(f"torchvision/{name}", "image").eval()
    features = encoder(pictures(64))
    torch.testing.assert_close(features.pooled, features.tokens.mean(dim=1))
    assert features.tokens.shape == (2, features.grid[0] * features.grid[1], encoder.dim)


@pytest.mark.long
def test_timm_networks_of_every_layout_equal_timm():
    for name, kwargs, size in [
        ("resnet18", {}, 64),
        ("convnext_atto", {}, 64),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24}, 64),
        ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}, 56),
        ("mobilenetv3_small_050", {}, 64),
    ]:
        encoder = create(f"timm/{name}", "image", **kwargs).eval()
        net, x = encoder.backbone.net, pictures(size)
        features = encoder(x)
        torch.testing.assert_close(features.pooled, net(encoder.normalize(x)))
        assert features.tokens.shape == (2, features.grid[0] * features.grid[1], encoder.dim)
        native = net.forward_features(encoder.normalize(x))
        corner = native[:, 0, 0] if name.startswith("swin") else native[..., 0, 0] if native.ndim == 4 else native[:, 1]
        if name.startswith("mobilenet"):
            corner = net.forward_head(native[:, :, :1, :1], pre_logits=True)
        torch.testing.assert_close(features.tokens[:, 0], corner)


def test_normalization_of_integers_and_floats():
    x = pictures()
    constants = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.3)}
    encoder = create("timm/vit_tiny_patch16_224", "image", **VIT, **constants).eval()
    expected = (x.double() / 255 - torch.tensor([0.2, 0.4, 0.6]).double()[:, None, None]) / torch.tensor(
        [0.1, 0.2, 0.3]
    ).double()[:, None, None]
    torch.testing.assert_close(encoder.normalize(x), expected.float())
    torch.testing.assert_close(encoder(x).pooled, encoder(x.float() / 255).pooled)
    assert {"normalize.mean", "normalize.std"} <= encoder.state_dict().keys()
    assert "normalize.mean" not in dict(encoder.named_parameters())
    assert Normalize((0.5,), (0.5,)).half()(x[:, :1]).dtype == torch.float16


def test_constants_are_those_of_the_library():
    assert create("timm/resnet18", "image").spec["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert create("timm/vit_tiny_patch16_224", "image", **VIT).spec["mean"] == [0.5, 0.5, 0.5]
    assert create("open_clip/ViT-B-32", "image", **CLIP).spec["std"] == pytest.approx(
        [0.26862954, 0.26130258, 0.27577711]
    )


def test_one_encoder_takes_several_sizes():
    encoder = vit()
    large = pictures(64)
    small = interpolate(large.float(), scale_factor=0.5).to(torch.uint8)
    assert (encoder(large).grid, encoder(small).grid) == ((8, 8), (4, 4))
    assert encoder(large[..., :24]).grid == (8, 3)
