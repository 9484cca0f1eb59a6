"""Networks of torchvision over clips give what torchvision's own do, at every depth and in every place."""

import re

import pytest
import torch
import torchvision
from torch import nn

from mmssl.adaptation.probes.finetune import Supervised
from mmssl.adaptation.targets.classes import Classes
from mmssl.encoders import create
from mmssl.errors import RecipeError
from mmssl.hub import export_classifier
from mmssl.hub.classifier import Classifier
from mmssl.recipe import Data

# Depth, tokens and window of these networks are part of their names; MViT's stride of patches is not.
COARSE = {"patch_embed_stride": [4, 14, 28]}
KINETICS = ([0.43216, 0.394666, 0.37645], [0.22803, 0.22145, 0.216989])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
GRAY = ([0.45] * 3, [0.225] * 3)


def clip(frames, height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, frames, 3, height, width), dtype=torch.uint8, generator=generator)


def normalized(x, constants):
    mean, std = (torch.tensor(values)[:, None, None] for values in constants)
    return ((x.float() / 255 - mean) / std).transpose(1, 2)


def own(encoder, name, head, **kwargs):
    """Torchvision's network with the encoder's weights, its classifier left out."""
    net = torchvision.models.get_model(name, **kwargs)
    net.load_state_dict(encoder.backbone.net.state_dict(), strict=False)
    setattr(net, head, nn.Identity())
    return net.eval()


@pytest.mark.long
@torch.no_grad()
def test_s3d():
    torch.manual_seed(0)
    encoder = create("torchvision/s3d", "video").eval()
    assert (encoder.spec["mean"], encoder.spec["std"]) == tuple(pytest.approx(values) for values in KINETICS)
    net, frames = own(encoder, "s3d", "classifier"), clip(24, 48, 64)
    x = normalized(frames, KINETICS)
    features, last = encoder(frames), net.features(x)
    assert features.grid == last.shape[2:] == (3, 1, 2)
    torch.testing.assert_close(features.tokens, last.flatten(2).mT)
    torch.testing.assert_close(features.pooled, last.mean((2, 3, 4)))
    depths = encoder.layers(frames)
    assert list(depths) == [f"features.{i}" for i in range(16)]
    torch.testing.assert_close(depths["features.4"].tokens, net.features[:5](x).flatten(2).mT)
    assert depths["features.4"].grid == (12, 6, 8)
    # As many places as torchvision's windows take: the middle of three counts twice, as it does there.
    encoder.backbone.net.avgpool.kernel_size = net.avgpool.kernel_size = (2, 1, 2)
    middle = last.mean((3, 4)) @ torch.tensor([0.25, 0.5, 0.25])
    torch.testing.assert_close(encoder(frames).pooled, net(x))
    torch.testing.assert_close(encoder(frames).pooled, middle)
    assert not torch.allclose(encoder(frames.flip(1)).pooled, features.pooled)
    assert encoder(clip(5, 17, 17)).grid == (1, 1, 1)
    for shape, given in (((4, 17, 17), "4 of 17 x 17"), ((5, 16, 17), "5 of 16 x 17")):
        with pytest.raises(RecipeError, match=f"s3d reads clips from 5 of 17 x 17 pixels on, got {given}"):
            encoder(clip(*shape))


@pytest.mark.long
def test_what_is_padding_has_no_part_in_what_s3d_pools():
    torch.manual_seed(0)
    encoder = create("torchvision/s3d", "video").eval()
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[1, 32:] = False
    features = encoder(clip(5, 32, 64), valid)
    assert features.valid.tolist() == [[True, True], [True, False]]
    torch.testing.assert_close(features.pooled[0], features.tokens[0].mean(0))
    torch.testing.assert_close(features.pooled[1], features.tokens[1, 0])


@pytest.mark.long
def test_s3d_says_which_clips_torchvision_refuses():
    backbone = create("torchvision/s3d", "video").backbone
    net = torchvision.models.video.s3d().to("meta")
    for frames, size in ((13, 209), (12, 209), (13, 208)):
        clips = torch.zeros(1, 3, frames, size, size, device="meta")
        if backbone.pooling(frames, size):
            with pytest.raises(RuntimeError, match="smaller than kernel size"):
                net(clips)
        else:
            assert net(clips).shape == (1, 400)


@pytest.mark.long
@pytest.mark.parametrize(("name", "whole"), [("s3d", False), ("swin3d_t", True)])
def test_classifiers_leave_with_lines_that_give_the_same(name, whole, tmp_path, monkeypatch):
    torch.manual_seed(0)
    encoder = create(f"torchvision/{name}", "video").eval()
    encoder.decoding = Data(source="files", video={"size": 32, "frames": 8})
    objective = Supervised(encoder, Classes(["a", "b", "c"]), (torch.zeros(3), torch.ones(3))).eval()
    nn.init.normal_(objective.head.weight)
    objective.center.normal_()
    objective.spread.fill_(0.5)
    out = export_classifier(Classifier(objective, encoder.decoding, "label", None), tmp_path / "native")
    text = (out / "README.md").read_text(encoding="utf-8")
    assert ("the classifier of torchvision's S3D is not one linear layer" in text) == (not whole)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert ("model.avgpool = torch.nn.AdaptiveAvgPool3d(1)" in program) == (not whole)
    names, rows = {}, clip(8, 32, 32)
    monkeypatch.chdir(out)
    exec(program, names)
    with torch.no_grad():
        expected = objective.predict({"video": rows})["outputs"]
    torch.testing.assert_close(names["outputs"](rows), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("swin3d_t", marks=pytest.mark.long),
        pytest.param("swin3d_s", marks=pytest.mark.slow),
        pytest.param("swin3d_b", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_swin3d(name):
    torch.manual_seed(0)
    encoder = create(f"torchvision/{name}", "video").eval()
    assert (encoder.spec["mean"], encoder.spec["std"]) == IMAGENET
    net, frames = own(encoder, name, "head"), clip(5, 64, 80)
    x = normalized(frames, IMAGENET)
    features = encoder(frames)
    torch.testing.assert_close(features.pooled, net(x))
    last = net.norm(net.features(net.patch_embed(x)))  # (B, t, h, w, D)
    assert features.grid == last.shape[1:4] == (3, 2, 3)
    torch.testing.assert_close(features.tokens, last.flatten(1, 3))
    depths = encoder.layers(frames)
    assert list(depths) == ["patch_embed", *(f"features.{i}" for i in range(7)), "norm"]
    torch.testing.assert_close(depths["features.0"].tokens, net.features[0](net.patch_embed(x)).flatten(1, 3))
    assert (depths["features.0"].grid, depths["features.1"].grid) == ((3, 16, 20), (3, 8, 10))
    torch.testing.assert_close(depths["norm"].pooled, features.pooled)
    assert not torch.allclose(encoder(frames.flip(1)).pooled, features.pooled)
    assert encoder(clip(1, 4, 4)).grid == (1, 1, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", ["mvit_v1_b", "mvit_v2_s"])
@torch.no_grad()
def test_mvit(name):
    torch.manual_seed(0)
    encoder = create(f"torchvision/{name}", "video", **COARSE).eval()
    assert (encoder.spec["mean"], encoder.spec["std"]) == GRAY
    assert encoder.built_for() == {"size": 224, "frames": 16}
    net, frames = own(encoder, name, "head", **COARSE), clip(16, 224, 224)
    x = normalized(frames, GRAY)
    features, depths = encoder(frames), encoder.layers(frames)
    torch.testing.assert_close(features.pooled, net(x))  # the class token
    assert list(depths) == ["conv_proj", "pos_encoding", *(f"blocks.{i}" for i in range(16)), "norm"]
    maps = net.conv_proj(x)
    torch.testing.assert_close(depths["conv_proj"].tokens, maps.flatten(2).mT)
    tokens, grid = net.pos_encoding(maps.flatten(2).mT), tuple(maps.shape[2:])
    assert depths["conv_proj"].grid == depths["pos_encoding"].grid == grid == (4, 16, 8)
    torch.testing.assert_close(depths["pos_encoding"].tokens, tokens[:, 1:])
    for i, block in enumerate(net.blocks):
        tokens, grid = block(tokens, grid)
        torch.testing.assert_close(depths[f"blocks.{i}"].tokens, tokens[:, 1:])
        assert depths[f"blocks.{i}"].grid == grid
    assert features.grid == depths["norm"].grid == grid == (4, 2, 1)
    torch.testing.assert_close(features.tokens, net.norm(tokens)[:, 1:])
    torch.testing.assert_close(depths["norm"].pooled, features.tokens.mean(1))
    assert not torch.allclose(encoder(frames.flip(1)).pooled, features.pooled)
    with pytest.raises(RecipeError, match="reads clips of 16 frames of 224 x 224 pixels, got 8 of 224 x 224"):
        encoder(clip(8, 224, 224))
    with pytest.raises(RecipeError, match=r"got 16 of 112 x 224: change data\.video$"):
        encoder.layers(clip(16, 112, 224))


@pytest.mark.parametrize(
    ("name", "kwargs", "sentence"),
    [
        ("mvit_v1_b", {"temporal_size": 8}, "'temporal_size' cannot be chosen: it is a part of what the name says"),
        ("swin3d_t", {"depths": [1, 1]}, "'depths' cannot be chosen"),
        ("swin3d_t", {"mlp_ration": 2.0}, "unknown key 'mlp_ration'.*did you mean 'mlp_ratio'"),
        ("swin3d_m", {}, "no such classification network.*did you mean 'swin3d_"),
    ],
)
def test_mistakes_in_networks_of_clips_are_one_sentence(name, kwargs, sentence):
    with pytest.raises(RecipeError, match=sentence):
        create(f"torchvision/{name}", "video", **kwargs)
