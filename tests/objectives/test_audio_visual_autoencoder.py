"""Audio-visual autoencoder: blocks of timm, MAE's errors, the contrast written out, no leak."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from tiny_encoders import tiny_batch, tiny_patches

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.modules.joint import TOGETHER, JointLayers
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.ops.patches import patchify

ROWS = 4
SMALL = {"joint_heads": 2, "decoder_depth": 2, "decoder_width": 8, "decoder_heads": 2}
KEYS = ("visual", "audio")

pytestmark = pytest.mark.usefixtures("double")


def task(**hyper):
    torch.manual_seed(0)
    encoders = tiny_patches()
    del encoders["video"]
    built = create("audio_visual_autoencoder", encoders, **SMALL | hyper)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases and norms are constants
    return built


def case(**hyper):
    """Task and inputs; the sounds are of full length."""
    built, batch = task(**hyper), tiny_batch(ROWS)
    del batch["audio_mask"]
    batch["image"] = batch["image"] / 255
    return built, built.transform(batch, Draws(0, 0, ROWS))


def reached(built, inputs, output, key, name):
    """By how much an output depends on each patch of a picture or spectrogram."""
    picture = inputs[f"{key}/{name}"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad((built.predict(inputs | {f"{key}/{name}": picture})[output] ** 3).sum(), picture)
    return patchify(gradient if key == "visual" else gradient[:, None], (4, 4)).abs().sum(2)


@pytest.mark.parametrize("output", ["visual/pixels", "audio/pixels", "visual", "audio"])
def test_all_that_is_seen_is_read_and_nothing_of_what_is_hidden(output):
    built, inputs = case()
    for key, name in (("visual", "image"), ("audio", "audio")):
        if output in KEYS and output != key:
            continue  # an embedding is of one modality alone; below
        reach = reached(built, inputs, output, key, name)
        assert torch.equal(reach.gather(1, inputs[f"{key}/hidden"]), torch.zeros_like(inputs[f"{key}/target"][..., 0]))
        assert (reach.gather(1, inputs[f"{key}/seen"]) > 0).all()


def test_what_is_contrasted_is_of_one_modality_alone():
    built, inputs = case()
    other = inputs | {"audio/audio": torch.randn_like(inputs["audio/audio"])}
    before, after = built.predict(inputs), built.predict(other)
    assert torch.equal(before["visual"], after["visual"])
    assert not torch.equal(before["audio"], after["audio"])
    assert not torch.equal(before["visual/pixels"], after["visual/pixels"])


def test_joint_layers_are_those_of_timm_with_the_norms_of_a_kind_one_after_the_other():
    torch.manual_seed(0)
    layers, x = JointLayers(8, 3, 2, (TOGETHER, *KEYS)), torch.randn(2, 5, 8)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    valid = torch.tensor([[True, True, True, False, False], [True] * 5])
    made = {}
    for kind in (TOGETHER, *KEYS):
        expected, masked = x, x
        for ours in layers.blocks:
            theirs = Block(8, 2, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
            for name in ("attn", "mlp"):
                getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
            for name in ("norm1", "norm2"):
                getattr(theirs, name).load_state_dict(getattr(ours, name)[kind].state_dict())
            expected = theirs(expected)
            masked = theirs(masked, attn_mask=valid[:, None, None, :])
        last = layers.norm[kind]
        made[kind] = layers(x, kind)
        torch.testing.assert_close(made[kind], F.layer_norm(expected, (8,), last.weight, last.bias, 1e-6))
        torch.testing.assert_close(layers(x, kind, valid), F.layer_norm(masked, (8,), last.weight, last.bias, 1e-6))
    assert (made["visual"] - made["audio"]).abs().max() > 0.01


def test_the_decoder_reads_mask_tokens_at_their_places_among_the_visible_ones_of_both():
    built, inputs = case()
    decoder, grids = built.decoder, {"visual": (3, 3), "audio": (2, 4)}
    tokens = [
        built._features(key, {k[len(key) + 1 :]: v for k, v in inputs.items() if k.startswith(key)}).tokens
        for key in KEYS
    ]
    visible = dict(zip(KEYS, built.joint(torch.cat(tokens, 1), TOGETHER).split([2, 2], 1), strict=True))
    whole = []
    for key in KEYS:  # in the order of the picture, as MAE's code has it
        full = decoder.mask_token.repeat(ROWS, math.prod(grids[key]), 1)
        for row in range(ROWS):
            full[row, inputs[f"{key}/seen"][row]] = decoder.embed(visible[key][row])
        positions = build_sincos2d_pos_embed(list(grids[key]), 8, interleave_sin_cos=True, dtype=full.dtype)
        whole.append(full + positions + decoder.modality[key])
    x = torch.nn.Sequential(*decoder.blocks)(torch.cat(whole, 1))
    outputs = built.predict(inputs)
    for key, part in zip(KEYS, decoder.norm(x).split([9, 8], 1), strict=True):
        answers = decoder.heads[key](part)
        expected = torch.stack([answers[row, inputs[f"{key}/hidden"][row]] for row in range(ROWS)])
        torch.testing.assert_close(outputs[f"{key}/pixels"], expected)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_targets_and_errors_are_those_of_masked_autoencoders(norm_pix):
    built, batch = task(contrastive=0.0, norm_pix=norm_pix), tiny_batch(ROWS)
    inputs = built.transform(batch, Draws(0, 0, ROWS))
    outputs = built.predict(inputs)
    assert set(outputs) == {"visual/pixels", "audio/pixels"}
    losses, total = built.loss(outputs, inputs), 0.0
    draws = Draws(0, 0, ROWS)
    for key, name in (("visual", "image"), ("audio", "audio")):
        alone = create(
            "masked_autoencoder",
            {name: built.encoder(name)},
            encoder=name,
            norm_pix=norm_pix,
            views={"area": None, "flip": 0.0},
            decoder_depth=1,
            decoder_width=8,
            decoder_heads=2,
        )
        own = alone.transform(batch, draws)  # goes on where the picture's have ended
        assert all(torch.equal(value, inputs[f"{key}/{entry}"]) for entry, value in own.items())
        expected = alone.loss({"pixels": outputs[f"{key}/pixels"]}, own)
        assert {entry: losses[f"{name}/{entry}"] for entry in expected} == expected
        total += expected["loss"]
    assert losses["loss"] == total


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_contrast_is_a_softmax_over_sounds_of_each_picture(symmetric):
    built, inputs = case(symmetric=symmetric, contrastive=0.3)
    outputs = built.predict(inputs)
    losses = {key: value.item() for key, value in built.loss(outputs, inputs).items()}
    seen, heard = (outputs[key].detach().numpy() for key in KEYS)
    terms, back = [], []
    for i in range(ROWS):
        logits = [float(seen[i] @ heard[j]) / 0.05 for j in range(ROWS)]
        terms.append(math.log(sum(map(math.exp, logits))) - logits[i])
        logits = [float(seen[j] @ heard[i]) / 0.05 for j in range(ROWS)]
        back.append(math.log(sum(map(math.exp, logits))) - logits[i])
    expected = sum(terms) / ROWS
    if symmetric:
        expected = (expected + sum(back) / ROWS) / 2
    assert losses["contrastive"] == pytest.approx(expected, rel=1e-12)
    reconstruction = losses["image/loss"] + losses["audio/loss"]
    assert losses["loss"] == pytest.approx(reconstruction + 0.3 * expected, rel=1e-12)


def test_what_is_contrasted_is_the_mean_of_the_joint_layer_and_what_retrieval_asks_for():
    built, batch = task(), tiny_batch(ROWS)
    (pair,) = built.pairs
    assert (pair.a, pair.b) == ("image", "audio")
    features = built.encoder("audio")(batch["audio"], batch["audio_mask"])
    tokens = built.joint(features.tokens, "audio", features.valid)
    mean = torch.stack([row[valid].mean(0) for row, valid in zip(tokens, features.valid, strict=True)])
    assert not features.valid.all()
    torch.testing.assert_close(pair.embed[1](features), mean / mean.norm(dim=1, keepdim=True))
    assert not task(contrastive=0.0).pairs


def test_visible_padding_is_read_by_none():
    built, batch = task(), tiny_batch(ROWS)
    inputs = built.transform(batch, Draws(0, 1, ROWS))
    padding = ~inputs["audio/valid"]
    assert padding.any()
    assert not padding.all(1).all()
    some = ~padding.all(1)  # a row of padding alone is read as it is
    before = built.predict(inputs)
    for output in ("visual/pixels", "audio/pixels", "audio"):
        reach = reached(built, inputs, output, "audio", "audio").gather(1, inputs["audio/seen"])
        assert (reach[some] > 0).equal(inputs["audio/valid"][some])
    wrong = inputs["audio/scored"][..., None].logical_not() * 1e3
    after = built.loss(before | {"audio/pixels": before["audio/pixels"] + wrong}, inputs)
    assert after == built.loss(before, inputs)


def test_level_of_the_mean():
    built, inputs = case()
    zeros = {key: torch.zeros_like(value) for key, value in built.predict(inputs).items()}
    losses, levels = built.loss(zeros, inputs), built.chance(ROWS).levels
    assert float(losses["image/loss"]) == pytest.approx(47 / 48, rel=1e-4)
    assert set(levels) == set(losses) - {"loss", "image/loss", "audio/loss"}
    for name in ("image/relative_error", "audio/relative_error", "contrastive"):
        assert float(losses[name]) == pytest.approx(levels[name], rel=1e-12)


def test_a_frame_is_one_of_the_clip_of_its_row():
    built, batch = task(frame=True), tiny_batch(ROWS)
    assert built.needs == ("video", "audio")
    found = set()
    for step in range(4):
        frames = built.transform(batch, Draws(0, step, ROWS))["visual/image"]
        same = (batch["video"] == frames[:, None]).flatten(2).all(2)
        assert (same.sum(1) == 1).all()
        found |= set(same.long().argmax(1).tolist())
    assert len(found) > 4


def test_refuses_what_it_cannot_join():
    encoders, vit = tiny_patches(), {"img_size": 12, "patch_size": 4, "depth": 1, "num_heads": 2}
    wide = encoders | {"image": create_encoder("timm/vit_tiny_patch16_224", "image", embed_dim=16, **vit)}
    with pytest.raises(RecipeError, match="'image' has 16 and 'audio' 8; give them one"):
        create("audio_visual_autoencoder", wide, **SMALL)
    with pytest.raises(RecipeError, match="width of the encoders, 8, is no multiple of joint_heads = 3"):
        create("audio_visual_autoencoder", encoders, **SMALL | {"joint_heads": 3})
    with pytest.raises(RecipeError, match="decoder_width = 6 should be a multiple of 4"):
        create("audio_visual_autoencoder", encoders, **SMALL | {"decoder_width": 6})
    with pytest.raises(RecipeError, match="does not read patch by patch"):
        create("audio_visual_autoencoder", encoders | {"image": create_encoder("timm/test_resnet", "image")}, **SMALL)
    with pytest.raises(RecipeError, match="reads image, and the encoder 'video' reads video"):
        create("audio_visual_autoencoder", encoders, visual="video", **SMALL)


@pytest.mark.long
def test_it_learns_what_picture_and_sound_have_in_common():
    """Where a picture is brighter says the pitch, one of eight; tones have any phase."""
    torch.manual_seed(0)
    vit = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    sound = {"rate": 100, "n_fft": 16, "hop": 8, "mels": 8, "img_size": [8, 16], "std": 4.5}
    encoders = {
        "image": create_encoder("timm/vit_tiny_patch16_224", "image", img_size=12, **vit),
        "audio": create_encoder("timm/vit_tiny_patch16_224", "audio", **sound, **vit),
    }
    sizes = {"decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2, "joint_heads": 2}
    built = create("audio_visual_autoencoder", encoders, mask_ratio=0.5, contrastive=0.1, norm_pix=False, **sizes)
    optimizer, kinds = torch.optim.AdamW(built.parameters(), lr=5e-3), torch.arange(8)[:, None]
    angle, place = kinds[..., None] * math.pi / 4, torch.arange(12) - 5.5
    slope = (angle.cos() * place + angle.sin() * place[:, None]) / 16 + 0.5
    found = []
    for step in range(150):
        phase = torch.rand(8, 1) * 2 * math.pi
        audio = (torch.arange(120) * 2 * math.pi * (5 + 5 * kinds) / 100 + phase).sin() * 0.5
        batch = {"image": slope[:, None].expand(-1, 3, -1, -1), "audio": audio}
        losses = built(built.transform(batch, Draws(0, step, 8)))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        found.append({key: value.item() for key, value in losses.items()})
    late = {key: sum(one[key] for one in found[-20:]) / 20 for key in found[0]}
    assert late["image/relative_error"] < 0.6
    assert late["audio/relative_error"] < 0.3
    assert min(late["accuracy_image_to_audio"], late["accuracy_audio_to_image"]) > 0.6
