"""VideoMAE: value and gradient are those of transformers, whose targets and decoder differ from MAE's."""

from __future__ import annotations

import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from transformers.models.videomae import modeling_videomae

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.ops.patches import patchify, standardize_colors

pytestmark = pytest.mark.usefixtures("double")

ROWS, DEPTH = 3, 2
SIZES = {
    **{"image_size": 24, "patch_size": 4, "num_frames": 4, "tubelet_size": 2, "hidden_size": 32},
    **{"num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 64, "layer_norm_eps": 1e-6},
    **{"use_mean_pooling": False},
}
SMALL = {"decoder_depth": DEPTH, "decoder_width": 16, "decoder_heads": 2}


def clips():
    return {"video": torch.rand(ROWS, 4, 3, 24, 24, generator=torch.Generator().manual_seed(0))}


def task(**hyper):
    torch.manual_seed(0)
    video = create_encoder("transformers/videomae", "video", **SIZES)
    given = {"form": "videomae", "views": {"area": None, "flip": 0.0}, **SMALL} | hyper
    built = create("masked_autoencoder", {"video": video}, encoder="video", **given)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases, norms and the mask token are constants
    return built


def names():
    """(names in transformers, name here) of the decoder; a list of several holds what is in pieces there."""
    yield ["mask_token"], "mask_token"
    yield ["encoder_to_decoder.weight"], "embed.weight"
    for i in range(DEPTH):
        layer, block = f"decoder.decoder_layers.{i}", f"blocks.{i}"
        yield (
            [f"{layer}.attention.attention.{name}.weight" for name in ("query", "key", "value")],
            f"{block}.attn.qkv.weight",
        )
        for kind in ("weight", "bias"):
            yield [f"{layer}.attention.output.dense.{kind}"], f"{block}.attn.proj.{kind}"
            yield [f"{layer}.layernorm_before.{kind}"], f"{block}.norm1.{kind}"
            yield [f"{layer}.layernorm_after.{kind}"], f"{block}.norm2.{kind}"
            yield [f"{layer}.intermediate.dense.{kind}"], f"{block}.mlp.fc1.{kind}"
            yield [f"{layer}.output.dense.{kind}"], f"{block}.mlp.fc2.{kind}"
    for kind in ("weight", "bias"):
        yield [f"decoder.norm.{kind}"], f"norm.{kind}"
        yield [f"decoder.head.{kind}"], f"head.{kind}"


@pytest.mark.parametrize("norm_pix", [True, False])
def test_it_is_that_of_transformers_in_value_and_gradient(monkeypatch, norm_pix):
    built = task(norm_pix=norm_pix)
    decoder = built.decoder
    config = VideoMAEConfig(
        **SIZES,
        norm_pix_loss=norm_pix,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=DEPTH,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        attn_implementation="sdpa",
    )
    # Targets are pixels as the network sees them; there they are scaled back first, which changes the 1e-6 alone.
    monkeypatch.setattr(modeling_videomae, "IMAGENET_DEFAULT_MEAN", [0.0] * 3)
    monkeypatch.setattr(modeling_videomae, "IMAGENET_DEFAULT_STD", [1.0] * 3)
    other = VideoMAEForPreTraining(config).double()
    other.decoder.norm.eps = 1e-6  # as published: the library leaves it at 1e-5
    net = built.encoder("video").backbone.net
    other.videomae.load_state_dict(net.state_dict())
    state, own = other.state_dict(), decoder.state_dict()
    with torch.no_grad():
        decoder.embed.bias.zero_()  # which is not there in theirs
        for pieces, ours in names():
            for name, piece in zip(pieces, own[ours].chunk(len(pieces)), strict=True):
                state[name].copy_(piece.view_as(state[name]))
        for i in range(DEPTH):
            query, key, value = own[f"blocks.{i}.attn.qkv.bias"].chunk(3)
            key.zero_()  # likewise
            state[f"decoder.decoder_layers.{i}.attention.attention.query.bias"].copy_(query)
            state[f"decoder.decoder_layers.{i}.attention.attention.value.bias"].copy_(value)
    positions = decoder._positions((2, 6, 6), torch.zeros(1, 1, 16))
    torch.testing.assert_close(positions.float(), other.position_embeddings[0].float(), rtol=0, atol=1e-6)
    other.position_embeddings = positions[None]  # theirs are rounded to single precision

    inputs = built.transform(clips(), Draws(3, 7, ROWS))
    mask = torch.zeros(ROWS, 72, dtype=torch.bool).scatter(1, inputs["hidden"], True)
    assert mask.sum(1).tolist() == [2 * 32] * ROWS  # of 36 places 90 %, rounded down
    assert torch.equal(mask[:, :36], mask[:, 36:])
    losses = built(inputs)
    seen = built.encoder("video").normalize(clips()["video"])
    expected = other(pixel_values=seen, bool_masked_pos=mask).loss
    torch.testing.assert_close(losses["loss"], expected, rtol=0, atol=1e-14)
    losses["loss"].backward()
    expected.backward()

    theirs = dict(other.named_parameters())
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[f"videomae.{name}"].grad, rtol=1e-9, atol=1e-12, msg=lambda text, at=name: at + text
        )
    mine = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    for pieces, ours in names():
        grad = torch.cat([theirs[name].grad.view(-1, *mine[ours].shape[1:]) for name in pieces])
        assert grad.abs().max() > 1e-9
        torch.testing.assert_close(mine.pop(ours), grad.view_as(own[ours]), rtol=1e-9, atol=1e-12)
    for i in range(DEPTH):
        query, key, value = mine.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        layer = f"decoder.decoder_layers.{i}.attention.attention"
        torch.testing.assert_close(query, theirs[f"{layer}.query.bias"].grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(value, theirs[f"{layer}.value.bias"].grad, rtol=1e-9, atol=1e-12)
        assert key.abs().max() < 1e-12  # attention does not change by it
    assert list(mine) == ["embed.bias"]


def test_each_color_of_a_tube_has_a_mean_and_a_deviation_of_its_own():
    pixels = torch.rand(2, 3, 4, 8, 8)
    patches = standardize_colors(patchify(pixels, (2, 4, 4)))
    cut = pixels[:, :, 2:, 4:, :4]  # the place at 1, 1, 0
    expected = (cut - cut.mean((2, 3, 4), keepdim=True)) / (cut.std((2, 3, 4), keepdim=True) + 1e-6)
    torch.testing.assert_close(patches[:, 6], expected.permute(0, 2, 3, 4, 1).flatten(1))
    one_color = standardize_colors(torch.tensor([0.2, 0.5, 0.9]).repeat(1, 32))
    assert one_color.abs().max() < 1e-9


def test_the_level_of_the_mean_is_that_of_a_color():
    built = task()
    inputs = built.transform(clips(), Draws(0, 0, ROWS))
    zeros = built.loss({"pixels": torch.zeros_like(inputs["target"])}, inputs)
    assert float(zeros["loss"]) == pytest.approx(31 / 32, rel=1e-4)  # 2 x 4 x 4 pixels; 511 / 512 of patches of 16
    assert float(zeros["relative_error"]) == pytest.approx(1, rel=1e-12)


def test_published_numbers_of_places():
    """16 frames of 224 pixels: 160 patches are seen, 20 in each of 8 layers."""
    video = create_encoder(
        "transformers/videomae", "video", hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    built = create("masked_autoencoder", {"video": video}, encoder="video", form="videomae", **SMALL)
    inputs = built.transform({"video": torch.zeros(1, 16, 3, 224, 224, dtype=torch.uint8)}, Draws(0, 0, 1))
    assert (inputs["seen"].shape[1], inputs["hidden"].shape[1]) == (160, 1408)


def test_it_is_for_clips():
    image = create_encoder("timm/vit_tiny_patch16_224", "image", depth=1, embed_dim=16, num_heads=1)
    with pytest.raises(RecipeError, match="tube is for clips, whose frames hide the same places, and so is videomae"):
        create("masked_autoencoder", {"image": image}, form="videomae")
