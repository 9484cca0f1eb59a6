"""Masked autoencoding: MAE as in transformers, value and gradient; SimMIM likewise; nothing seen of what is hidden."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from tiny_encoders import TinyImage, tiny_encoders
from torch.nn.functional import l1_loss
from transformers import ViTConfig, ViTForMaskedImageModeling, ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.ops.patches import patchify, standardize, unpatchify

ROWS, PIXELS = 3, 3 * 4 * 4
VIT = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
SMALL = {"decoder_depth": 2, "decoder_width": 16, "decoder_heads": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "image_size": 24, "patch_size": 4},
    "text_cfg": {"layers": 1, "width": 16, "heads": 2, "context_length": 8, "vocab_size": 50},
}


pytestmark = pytest.mark.usefixtures("double")


def pictures(seed=0, size=24):
    return torch.rand(ROWS, 3, size, size, generator=torch.Generator().manual_seed(seed))


def sounds():
    audio = torch.randn(ROWS, 4800, generator=torch.Generator().manual_seed(0)) * 0.1
    return {"audio": audio, "audio_mask": torch.arange(4800) < torch.tensor([[4800], [3000], [1000]])}


def task(model="timm/vit_tiny_patch16_224", arguments=None, **hyper):
    torch.manual_seed(0)
    image = create_encoder(model, "image", **(arguments or VIT))
    built = create("masked_autoencoder", {"image": image}, views={"area": None, "flip": 0.0}, **hyper)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # mask and class tokens, biases and norms are constants
    return built


def hearing(**hyper):
    torch.manual_seed(0)
    vit = VIT | {"img_size": [32, 32], "patch_size": 16}
    audio = create_encoder("timm/vit_tiny_patch16_224", "audio", mels=32, **vit)
    return create("masked_autoencoder", {"audio": audio}, encoder="audio", norm_pix=False, **SMALL, **hyper)


# (name in transformers, name here); a list holds what transformers keeps in pieces.
BLOCK = [
    *((f"layernorm_{place}", f"norm{number}") for place, number in (("before", 1), ("after", 2))),
    *((f"mlp.{name}", f"mlp.{name}") for name in ("fc1", "fc2")),
    (["attention.q_proj", "attention.k_proj", "attention.v_proj"], "attn.qkv"),
    ("attention.o_proj", "attn.proj"),
]


def blocks(theirs, ours, depth=2):
    for i in range(depth):
        for their, our in BLOCK:
            pieces = their if isinstance(their, list) else [their]
            for kind in ("weight", "bias"):
                yield [f"{theirs}.{i}.{piece}.{kind}" for piece in pieces], f"{ours}.{i}.{our}.{kind}"


def pairs(theirs, ours):
    for kind in ("weight", "bias"):
        yield [f"{theirs}.{kind}"], f"{ours}.{kind}"


NET = "encoders.image.backbone.net"


def embedding_of(model):
    yield [f"{model}.embeddings.cls_token"], f"{NET}.cls_token"
    yield [f"{model}.embeddings.position_embeddings"], f"{NET}.pos_embed"
    yield from pairs(f"{model}.embeddings.patch_embeddings.projection", f"{NET}.patch_embed.proj")
    yield from blocks(f"{model}.layers", f"{NET}.blocks")
    yield from pairs(f"{model}.layernorm", f"{NET}.norm")


def copy_weights(built, other, names):
    own, state = built.state_dict(), other.state_dict()
    with torch.no_grad():
        for theirs, ours in names:
            for name, piece in zip(theirs, own[ours].chunk(len(theirs)), strict=True):
                state[name].copy_(piece.view_as(state[name]))


def compare_gradients(built, other, names, fixed=()):
    mine, theirs = dict(built.named_parameters()), dict(other.named_parameters())
    assert set(mine) == {ours for _, ours in names} | set(fixed)
    for pieces, ours in names:
        assert mine[ours].grad.abs().max() > 1e-6
        expected = torch.cat([theirs[name].grad.view(-1, *mine[ours].shape[1:]) for name in pieces])
        torch.testing.assert_close(mine[ours].grad, expected.view_as(mine[ours]), rtol=1e-9, atol=1e-12, msg=ours)


@pytest.mark.parametrize(("ratio", "norm_pix"), [(0.75, True), (0.6, False), (0.9, True)])
def test_mae_is_that_of_transformers_in_value_and_gradient(ratio, norm_pix):
    built = task(mask_ratio=ratio, norm_pix=norm_pix, **SMALL)
    config = ViTMAEConfig(
        **SIZES,
        image_size=24,
        patch_size=4,
        layer_norm_eps=1e-6,
        mask_ratio=ratio,
        norm_pix_loss=norm_pix,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        attn_implementation="sdpa",  # the eager one rounds to single precision
    )
    other = ViTMAEForPreTraining(config).double()
    # A fresh model of transformers 5.23 has no positions in its decoder: `_init_weights` sets them to 0.
    positions = build_sincos2d_pos_embed([6, 6], 16, interleave_sin_cos=True, dtype=torch.float64)
    expected = build_2d_sinusoidal_position_embedding(6, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(positions, expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        other.decoder.decoder_pos_embed[0, 1:] = positions  # and not `expected`, which is not rounded on the way
    other.vit.embeddings.position_embeddings.requires_grad_(True)
    names = [
        *embedding_of("vit"),
        (["decoder.mask_token"], "decoder.mask_token"),
        *pairs("decoder.decoder_embed", "decoder.embed"),
        *blocks("decoder.decoder_layers", "decoder.blocks"),
        *pairs("decoder.decoder_norm", "decoder.norm"),
        *pairs("decoder.decoder_pred", "decoder.head"),
    ]
    copy_weights(built, other, names)

    inputs = built.transform({"image": pictures()}, Draws(3, 7, ROWS))
    noise = Draws(3, 7, ROWS)
    noise.chance(0.0)  # of mirroring
    theirs = other(pixel_values=built.encoder("image").normalize(pictures()), noise=noise.uniform(36))
    losses = built(inputs)
    mask = torch.zeros(ROWS, 36).scatter(1, inputs["hidden"], 1)
    assert torch.equal(mask, theirs.mask)
    assert inputs["seen"].shape[1] == int(36 * (1 - ratio))
    assert torch.equal(
        torch.cat([inputs["seen"], inputs["hidden"]], 1).sort().values, torch.arange(36).expand(ROWS, -1)
    )
    torch.testing.assert_close(losses["loss"], theirs.loss, rtol=0, atol=1e-14)
    losses["loss"].backward()
    theirs.loss.backward()
    compare_gradients(built, other, names)


def test_simmim_is_that_of_transformers_in_value_and_gradient():
    built = task(form="simmim", block=8)
    config = ViTConfig(**SIZES, image_size=24, patch_size=4, encoder_stride=4, layer_norm_eps=1e-6)
    other = ViTForMaskedImageModeling(config).double().eval()
    names = [
        (["vit.embeddings.mask_token"], "mask_token"),
        *embedding_of("vit"),
        *pairs("decoder.0", "head"),
    ]
    copy_weights(built, other, names)
    # A pixel shuffle reads channels first, then rows and columns of a patch.
    order = torch.arange(PIXELS).view(4, 4, 3).permute(2, 0, 1).flatten()
    with torch.no_grad():
        other.decoder[0].weight.copy_(other.decoder[0].weight[order])
        other.decoder[0].bias.copy_(other.decoder[0].bias[order])
    inputs = built.transform({"image": pictures()}, Draws(3, 7, ROWS))
    mask = torch.zeros(ROWS, 36, dtype=torch.bool).scatter(1, inputs["hidden"], True)
    target = built.encoder("image").normalize(pictures())
    theirs = other(pixel_values=target, bool_masked_pos=mask)
    # Their loss divides by the number of hidden pixels + 1e-5.
    hidden = mask.view(ROWS, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(target)
    expected = l1_loss(theirs.reconstruction[hidden], target[hidden])
    assert theirs.loss.item() == pytest.approx(expected.item(), rel=1e-7)
    losses = built(inputs)
    torch.testing.assert_close(losses["loss"], expected, rtol=0, atol=1e-14)
    losses["loss"].backward()
    expected.backward()
    for parameter in (other.decoder[0].weight, other.decoder[0].bias):
        parameter.grad = parameter.grad[order.argsort()]
    compare_gradients(built, other, names)


def test_simmim_hides_whole_blocks_and_rounds_their_number_up():
    built = task(form="simmim", block=8, mask_ratio=0.5)
    inputs = built.transform({"image": pictures()}, Draws(0, 0, ROWS))
    mask = torch.zeros(ROWS, 36, dtype=torch.bool).scatter(1, inputs["hidden"], True).view(ROWS, 3, 2, 3, 2)
    hidden = mask.any(4).any(2)
    assert torch.equal(hidden, mask.all(4).all(2))
    assert hidden.flatten(1).sum(1).tolist() == [5] * ROWS  # ceil(9 * 0.5)
    assert len({tuple(row.flatten().tolist()) for row in hidden}) > 1
    # The published setting: 30 of the 49 blocks of 32 pixels.
    imagenet = create_encoder("timm/vit_tiny_patch16_224", "image", depth=1, embed_dim=16, num_heads=1)
    built = create("masked_autoencoder", {"image": imagenet}, form="simmim")
    inputs = built.transform({"image": torch.rand(1, 3, 224, 224)}, Draws(0, 0, 1))
    assert (inputs["hidden"].shape[1], inputs["seen"].shape[1]) == (4 * 30, 4 * 19)


@pytest.mark.parametrize("form", ["mae", "simmim"])
@pytest.mark.parametrize(("model", "arguments"), [("timm/vit_tiny_patch16_224", VIT), ("open_clip/ViT-B-32", CLIP)])
def test_no_prediction_depends_on_a_hidden_pixel(form, model, arguments):
    built = task(model, arguments, form=form, block=4, **SMALL)
    inputs = built.transform({"image": pictures()}, Draws(0, 0, ROWS))
    image = inputs["image"].clone().requires_grad_()
    pixels = built.predict(inputs | {"image": image})["pixels"]
    (gradient,) = torch.autograd.grad((pixels**3).sum(), image)
    reached = patchify(gradient, (4, 4)).abs().sum(2)
    assert torch.equal(reached.gather(1, inputs["hidden"]), torch.zeros_like(inputs["hidden"]).double())
    assert (reached.gather(1, inputs["seen"]) > 0).all()


@pytest.mark.parametrize("patch", [(4, 4), (2, 8)])
def test_patches_and_back(patch):
    image = pictures()
    patches = patchify(image, patch)
    assert torch.equal(unpatchify(patches, patch, (24, 24)), image)
    rows = [
        image[:, :, y : y + patch[0], x : x + patch[1]].permute(0, 2, 3, 1).flatten(1)
        for y in range(0, 24, patch[0])
        for x in range(0, 24, patch[1])
    ]
    assert torch.equal(patches, torch.stack(rows, dim=1))


def test_level_of_the_mean():
    built = task(**SMALL)
    inputs = built.transform({"image": pictures()}, Draws(0, 0, ROWS))
    zeros = built.loss({"pixels": torch.zeros_like(inputs["target"])}, inputs)
    assert float(zeros["loss"]) == pytest.approx((PIXELS - 1) / PIXELS, rel=1e-4)
    assert float(zeros["relative_error"]) == pytest.approx(built.chance(1).metrics["relative_error"], rel=1e-12)
    assert inputs["target"].mean(2).abs().max() < 1e-12
    assert built.loss({"pixels": inputs["target"]}, inputs)["loss"] == 0
    one_color = standardize(torch.full((1, 1, PIXELS), 0.3))
    assert one_color.abs().max() < 1e-9
    for form in ("mae", "simmim"):
        built = task(form=form, block=4, norm_pix=False, **SMALL)
        inputs = built.transform({"image": pictures()}, Draws(0, 0, ROWS))
        mean = inputs["target"].mean(1, keepdim=True).expand_as(inputs["target"])
        assert float(built.loss({"pixels": mean}, inputs)["relative_error"]) == pytest.approx(1, rel=1e-12)
        error = (inputs["target"] - mean).abs()
        expected = (error**2 if form == "mae" else error).mean()
        assert float(built.loss({"pixels": mean}, inputs)["loss"]) == pytest.approx(float(expected), rel=1e-12)


def test_targets_are_the_pixels_that_the_network_would_see():
    built = task(norm_pix=False, **SMALL)
    inputs = built.transform({"image": (pictures() * 255).to(torch.uint8)}, Draws(0, 0, ROWS))
    seen = built.encoder("image").normalize((pictures() * 255).to(torch.uint8))
    for row in range(ROWS):
        place = int(inputs["hidden"][row, 2])
        y, x = 4 * (place // 6), 4 * (place % 6)
        corner = seen[row, :, y : y + 4, x : x + 4]
        assert torch.equal(inputs["target"][row, 2].view(4, 4, 3), corner.permute(1, 2, 0))


def test_padding_of_a_sound_is_never_scored():
    built = hearing(mask_ratio=0.5)
    inputs = built.transform(sounds(), Draws(0, 0, ROWS))
    # 31, 19 and 7 frames in patches of 16, two bands each.
    columns = torch.tensor([2, 2, 1])
    assert inputs["audio"].shape == (ROWS, 32, 32)
    assert torch.equal(inputs["scored"], inputs["hidden"] % 2 < columns[:, None])
    assert not inputs["scored"].all()
    assert inputs["scored_patches"] == inputs["scored"].sum()
    outputs = built.predict(inputs)
    wrong = {"pixels": torch.where(inputs["scored"][:, :, None], outputs["pixels"], 1e3)}
    assert built.loss(wrong, inputs) == built.loss(outputs, inputs)
    mean = [row[scored].mean(0) for row, scored in zip(inputs["target"], inputs["scored"], strict=True) if scored.any()]
    assert len(mean) == ROWS
    constant = torch.stack(mean)[:, None].expand_as(inputs["target"])
    assert float(built.loss({"pixels": constant}, inputs)["relative_error"]) == pytest.approx(1, rel=1e-12)
    # One channel, whatever the network reads: patches of 16 × 16 levels.
    assert inputs["target"].shape[2] == 256
    assert torch.equal(patchify(inputs["audio"][:, None], (16, 16))[0, inputs["hidden"][0, 0]], inputs["target"][0, 0])
    without = built.transform({"audio": sounds()["audio"]}, Draws(0, 0, ROWS))
    assert without["scored"].all()


def test_any_size_of_whole_patches_goes_through():
    built = task(**SMALL)
    inputs = built.transform({"image": pictures(size=32)[..., :16]}, Draws(0, 0, ROWS))
    assert built.predict(inputs)["pixels"].shape == (ROWS, 32 - 8, PIXELS)
    torch.manual_seed(0)
    cropped = create("masked_autoencoder", dict(built.encoders), views={"size": 16}, **SMALL)
    assert cropped.transform({"image": pictures()}, Draws(0, 0, ROWS))["image"].shape == (ROWS, 3, 16, 16)


def test_pictures_are_scaled_back_by_nothing_that_the_network_was_not_told():
    built = task(**SMALL)
    inputs = built.transform({"image": pictures()}, Draws(0, 0, ROWS))
    titles = {panel.title: torch.stack(panel.cells) for panel in built.preview(inputs, {"pixels": inputs["target"]})}
    assert list(titles) == ["input", "normalized prediction", "normalized target", "original"]
    torch.testing.assert_close(titles["normalized prediction"], titles["normalized target"])
    patches = patchify(built.encoder("image").normalize(pictures()), (4, 4))
    torch.testing.assert_close(patchify(titles["normalized target"], (4, 4)), 0.5 + 0.2 * standardize(patches))
    blank = patchify(titles["input"], (4, 4))
    assert (blank.var(2) < 1e-20).sum() == inputs["hidden"].numel()
    built = task(norm_pix=False, **SMALL)
    inputs = built.transform({"image": pictures()}, Draws(0, 0, ROWS))
    titles = {panel.title: torch.stack(panel.cells) for panel in built.preview(inputs, {"pixels": inputs["target"]})}
    torch.testing.assert_close(titles["prediction"], pictures())
    assert list(titles) == ["input", "prediction", "target"]
    built = hearing()
    inputs = built.transform(sounds(), Draws(0, 0, ROWS))
    panels = built.preview(inputs, {"pixels": inputs["target"]})
    assert torch.equal(torch.stack(panels[1].cells), torch.stack(panels[2].cells))
    assert torch.equal(torch.stack(panels[2].cells), inputs["audio"])


def test_refuses_what_hides_no_patches():
    resnet = CLIP | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}}
    for model, arguments in (("timm/test_resnet", {}), ("torchvision/squeezenet1_1", {}), ("open_clip/RN50", resnet)):
        with pytest.raises(RecipeError, match=rf"{model} does not read patch by patch, .*; take a plain vision transf"):
            create("masked_autoencoder", {"image": create_encoder(model, "image", **arguments)})
    with pytest.raises(RecipeError, match="the encoder 'text' reads text"):
        create("masked_autoencoder", tiny_encoders(), encoder="text")
    with pytest.raises(ValueError, match="needs an encoder named 'image'"):
        create("masked_autoencoder", {"picture": TinyImage()})
    with pytest.raises(RecipeError, match="block = 6 pixels is not a multiple of the patch"):
        task(block=6)
    with pytest.raises(RecipeError, match="decoder_width = 18"):
        task(decoder_width=18)
    with pytest.raises(RecipeError, match=r"ratio = 0\.99 leaves 0 of 36 blocks visible"):
        task(mask_ratio=0.99, **SMALL).transform({"image": pictures()}, Draws(0, 0, ROWS))
    with pytest.raises(RecipeError, match="24 x 24 pixels cannot be cut into blocks of 16 x 16"):
        task(block=16, **SMALL).transform({"image": pictures()}, Draws(0, 0, ROWS))


def test_chance_needs_no_data():
    levels = task(**SMALL).chance(4)
    assert levels.loss is None
    assert math.isclose(levels.metrics["relative_error"], 1)
