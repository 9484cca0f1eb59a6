"""A transformer over frames sees the order of what a network of pictures saw alone."""

import math

import pytest
import torch
from torch import nn

from mmssl.encoders import create, reinitialized
from mmssl.encoders.backbones._temporal import TemporalTransformer
from mmssl.errors import RecipeError
from mmssl.hub.export_classifier import leaves_whole
from mmssl.hub.space import pooled_lines
from mmssl.objectives import create as create_task
from mmssl.ops.draws import Draws

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
OVER_TIME = {"temporal": "transformer", "temporal_depth": 2, "temporal_num_heads": 4}


def clip(frames=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, frames, 3, 32, 32), dtype=torch.uint8, generator=generator)


def network(**kwargs):
    torch.manual_seed(0)
    return create("timm/vit_tiny_patch16_224", "video", **VIT, **kwargs).double().eval()


def torch_layer(block):
    """The same block of torch's own."""
    layer = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    names = {
        "self_attn.in_proj_weight": "attn.qkv.weight",
        "self_attn.in_proj_bias": "attn.qkv.bias",
        "self_attn.out_proj.weight": "attn.proj.weight",
        "self_attn.out_proj.bias": "attn.proj.bias",
    }
    for norm, linear in (("norm1", "fc1"), ("norm2", "fc2")):
        names |= {f"{norm}.{key}": f"{norm}.{key}" for key in ("weight", "bias")}
        names |= {f"linear{norm[-1]}.{key}": f"mlp.{linear}.{key}" for key in ("weight", "bias")}
    given = block.state_dict()
    layer.load_state_dict({own: given[other] for own, other in names.items()})
    return layer.eval()


@torch.no_grad()
def test_it_is_a_pre_norm_transformer_at_sinusoidal_positions():
    encoder = network(**OVER_TIME)
    for parameter in encoder.backbone.temporal.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    single = network()
    single.backbone.frame.load_state_dict(encoder.backbone.frame.state_dict())
    frames = torch.stack([single(clip()[:, t : t + 1]).pooled for t in range(4)], dim=1)
    x = frames.clone()
    for t in range(4):
        for i in range(8):
            x[:, t, i] += math.sin(t / 10_000 ** (i / 8))
            x[:, t, 8 + i] += math.cos(t / 10_000 ** (i / 8))
    depths = encoder.layers(clip())
    assert list(depths)[-3:] == ["temporal.blocks.0", "temporal.blocks.1", "temporal.norm"]
    for number, block in enumerate(encoder.backbone.temporal.blocks):
        x = torch_layer(block)(x)
        torch.testing.assert_close(depths[f"temporal.blocks.{number}"].tokens, x, rtol=1e-5, atol=1e-6)
    x = encoder.backbone.temporal.norm(x)
    features = encoder(clip())
    torch.testing.assert_close(features.pooled, x.mean(1), rtol=1e-5, atol=1e-6)
    assert depths["temporal.norm"].grid == (4, 1, 1)
    torch.testing.assert_close(depths["temporal.norm"].pooled, features.pooled)
    # What a single frame is, is not its business.
    assert torch.equal(features.tokens, single(clip()).tokens)
    torch.testing.assert_close(depths["blocks.1"].pooled, single.layers(clip())["blocks.1"].pooled)
    torch.testing.assert_close(encoder.encode(encoder.embed(clip())).pooled, features.pooled)
    assert encoder(clip(7)).grid == (7, 4, 4)


@torch.no_grad()
def test_it_sees_the_order_of_frames_and_their_mean_does_not():
    shuffled = clip()[:, [2, 0, 3, 1]]
    blind, seeing = network(), network(**OVER_TIME)
    torch.testing.assert_close(blind(shuffled).pooled, blind(clip()).pooled)
    for other in (shuffled, clip().flip(1)):
        assert (seeing(other).pooled - seeing(clip()).pooled).abs().max() > 1e-4
    assert (blind.sees_order, seeing.sees_order) == (False, True)


@pytest.mark.long
def test_a_task_about_order_takes_it_and_teaches_it():
    with pytest.raises(RecipeError, match="take temporal: transformer"):
        create_task("arrow_of_time", {"video": network()}, frames=4)
    encoders = {"video": network(**OVER_TIME).float().train()}
    task = create_task("arrow_of_time", encoders, frames=4, views={"flip": None, "area": None})
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    # Frames brighten with time, from another level in each row.
    light = torch.linspace(0, 150, 4)[None] + torch.linspace(0, 60, 16)[:, None]
    video = light[:, :, None, None, None].expand(-1, -1, 3, 32, 32).to(torch.uint8)
    for step in range(40):
        inputs = task.transform({"video": video}, Draws(0, step, 16))
        losses = task.loss(task.predict(inputs), inputs)
        optimizer.zero_grad()
        losses["loss"].backward()
        if step == 0:
            backbone = task.encoder("video").backbone
            assert all(parameter.grad.abs().max() > 0 for parameter in backbone.temporal.parameters())
            assert backbone.frame.net.patch_embed.proj.weight.grad.abs().max() > 0
        optimizer.step()
    assert losses["accuracy"] == 1


def test_frames_that_are_left_out_have_no_influence():
    encoder = network(**OVER_TIME)
    tokens = encoder.embed(clip()).detach().requires_grad_()
    valid = torch.ones(2, 4, 16, dtype=torch.bool)
    valid[:, 2] = False
    valid[1, 3, 5:] = False
    features = encoder.encode(tokens, valid.flatten(1))
    features.pooled.square().sum().backward()
    assert not tokens.grad[~valid.flatten(1)].any()
    assert tokens.grad[..., :-1].abs().amax(2)[valid.flatten(1)].min() > 0
    other = clip()
    other[:, 2] = 255 - other[:, 2]
    torch.testing.assert_close(encoder.encode(encoder.embed(other), valid.flatten(1)).pooled, features.pooled)
    # As good as left out, and the frame after it keeps its place in time.
    rest = torch.arange(64) // 16 != 2
    left = encoder.encode(encoder.embed(clip())[:, rest])
    torch.testing.assert_close(left.pooled[0], features.pooled[0])
    gone = encoder(clip()[:, [0, 1, 3]]).pooled
    assert (gone[0] - features.pooled[0]).abs().max() > 1e-4
    assert encoder.encode(tokens, torch.zeros(2, 64, dtype=torch.bool)).pooled.isfinite().all()


@pytest.mark.parametrize("width", [1, 7])
def test_it_takes_odd_widths(width):
    frames = torch.zeros(1, 3, width)
    assert TemporalTransformer(width, 1, 1)(frames).shape == (1, 3, width)


def test_what_is_built_again_and_what_leaves(tmp_path):
    encoder = network(temporal="transformer", difference=True)
    assert (encoder.spec["temporal_depth"], encoder.spec["temporal_num_heads"]) == (1, 1)
    again = reinitialized(encoder, 3).double()
    assert again.spec == encoder.spec
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again(clip()).pooled, encoder(clip()).pooled)
    encoder.float().export(tmp_path)
    alone = create("timm/vit_tiny_patch16_224", "image", pretrained=f"local-dir:{tmp_path}").eval()
    assert alone.backbone.net.state_dict().keys() == encoder.backbone.frame.net.state_dict().keys()
    said = "each frame alone; the transformer over them, which pools, is not in these files"
    assert said in (tmp_path / "preprocessing.json").read_text(encoding="utf-8")
    assert pooled_lines(encoder, "model")[0] == "pooled"
    assert not leaves_whole(encoder)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"temporal_depth": 2}, "'temporal_depth' is for temporal: transformer"),
        ({"temporal": "max", "temporal_num_heads": 2}, "'temporal_num_heads' is for temporal: transformer"),
        ({"temporal": "transformer", "temporal_num_heads": 3}, "temporal_num_heads = 3 does not divide its width, 16"),
        ({"temporal": "transformer", "temporal_depth": 0}, "temporal_depth"),
        ({"temporal": "lstm"}, "temporal = 'lstm' should be"),
    ],
)
def test_mistakes_are_told(kwargs, sentence):
    with pytest.raises(RecipeError, match=sentence):
        network(**kwargs)
