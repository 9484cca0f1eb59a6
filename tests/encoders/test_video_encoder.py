"""Clips: spatio-temporal networks as torchvision has them, and image networks frame by frame."""

import pytest
import torch
import torchvision

import mmssl
from mmssl.encoders import create
from mmssl.hub.space import pooled_lines

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def clip(frames=4, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, frames, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.long
def test_r3d_18_equals_torchvision():
    torch.manual_seed(0)
    encoder = create("torchvision/r3d_18", "video").eval()
    net = torchvision.models.video.r3d_18()
    net.fc = torch.nn.Identity()
    net.load_state_dict(encoder.backbone.net.state_dict())
    mean, std = torch.tensor([0.43216, 0.394666, 0.37645]), torch.tensor([0.22803, 0.22145, 0.216989])
    x = (clip(8).float() / 255 - mean[:, None, None]) / std[:, None, None]
    features = encoder(clip(8))
    torch.testing.assert_close(features.pooled, net.eval()(x.transpose(1, 2)))
    assert features.grid == (1, 2, 2)
    assert features.tokens.shape == (2, 4, 512)
    torch.testing.assert_close(encoder(clip(8).float() / 255).pooled, features.pooled)
    depths = encoder.layers(clip(8))
    assert list(depths) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    torch.testing.assert_close(depths["layer4"].pooled, features.pooled)
    assert not torch.allclose(encoder(clip(8).flip(1)).pooled, features.pooled)


def test_frames_are_seen_one_by_one():
    torch.manual_seed(0)
    mean = create("timm/vit_tiny_patch16_224", "video", **VIT).double().eval()
    largest = create("timm/vit_tiny_patch16_224", "video", temporal="max", **VIT).double().eval()
    image = create("timm/vit_tiny_patch16_224", "image", **VIT).double().eval()
    largest.load_state_dict(mean.state_dict())
    image.backbone.load_state_dict(mean.backbone.native.state_dict())
    frames = torch.stack([image(frame).pooled for frame in clip().unbind(1)], dim=1)
    features = mean(clip())
    torch.testing.assert_close(features.pooled, frames.mean(dim=1))
    torch.testing.assert_close(largest(clip()).pooled, frames.amax(dim=1))
    assert features.grid == (4, 4, 4)
    places = features.tokens.unflatten(1, features.grid)
    torch.testing.assert_close(places[:, 2].flatten(1, 2), image(clip()[:, 2]).tokens)
    for name, value in mean.layers(clip()).items():
        apart = [image.layers(frame)[name].tokens for frame in clip().unbind(1)]
        torch.testing.assert_close(value.tokens, torch.cat(apart, dim=1))
        assert value.grid == (4, 4, 4)
    assert mean(clip(6)).grid == (6, 4, 4)


def test_the_lines_of_a_model_card_see_what_changed_too():
    torch.manual_seed(0)
    encoder = create("timm/test_resnet", "video", difference=True).eval()
    given, lines, pooled = pooled_lines(encoder, "model")
    names = {"torch": torch, "model": encoder.backbone.native.net, given: encoder.normalize(clip())}
    exec("\n".join([*lines, f"pooled = {pooled}"]), names)
    torch.testing.assert_close(names["pooled"], encoder(clip()).pooled)


def test_differences_are_what_changed_since_the_frame_before():
    torch.manual_seed(0)
    frames = create("timm/vit_tiny_patch16_224", "video", **VIT).double().eval()
    changes = create("timm/vit_tiny_patch16_224", "video", difference=True, **VIT).double().eval()
    changes.load_state_dict(frames.state_dict())
    x = clip().double() / 255
    before = torch.cat([x[:, :1], x[:, :-1]], dim=1)
    # A frame that equals the mean is 0 to the network, so a difference is what a frame of mean + difference would be.
    shifted = x - before + changes.normalize.mean[:, None, None]
    torch.testing.assert_close(changes(x).tokens, frames(shifted).tokens)
    torch.testing.assert_close(changes.layers(x)["blocks.1"].pooled, frames.layers(shifted)["blocks.1"].pooled)
    frozen = changes(x[:, :1].expand(-1, 4, -1, -1, -1)).pooled
    torch.testing.assert_close(frozen[0], frozen[1])  # nothing of a clip that stands still
    assert changes.spec["difference"] is True
    assert "each frame minus the one before" in changes.preprocessing()["input"]
    torch.testing.assert_close(create(**changes.spec).double().eval().normalize.mean, changes.normalize.mean)


CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"layers": 2, "width": 16, "head_width": 8, "image_size": 32, "patch_size": 8},
    "text_cfg": {"layers": 1, "width": 16, "heads": 2, "vocab_size": 50},
}
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
FRAMES = [
    ("timm/vit_tiny_patch16_224", VIT),
    ("timm/vit_tiny_patch16_224", VIT | {"global_pool": "avg", "class_token": False}),
    ("open_clip/ViT-B-32", CLIP),
    ("open_clip/ViT-B-32", CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"pool_type": "avg"}}),
    ("transformers/vit", DINO | {"intermediate_size": 24}),
    ("transformers/siglip_vision_model", DINO | {"intermediate_size": 24}),
]


@pytest.mark.quick(4)
@pytest.mark.parametrize("temporal", ["mean", "max"])
@pytest.mark.parametrize(("model", "kwargs"), FRAMES)
def test_tokens_of_single_frames_can_be_left_out(model, kwargs, temporal):
    torch.manual_seed(0)
    video = create(model, "video", temporal=temporal, **kwargs).double().eval()
    image = create(model, "image", **kwargs).double().eval()
    image.backbone.load_state_dict(video.backbone.native.state_dict())
    assert video.subsets
    assert video.patch_size == (1, 8, 8)
    x = clip()
    tokens, features = video.embed(x), video(x)
    assert tokens.shape[:2] == (2, 4 * 16)
    torch.testing.assert_close(video.encode(tokens).tokens, features.tokens)
    torch.testing.assert_close(video.encode(tokens).pooled, features.pooled)
    # Another number of places in each frame and row, and none in the last: each frame is what it is alone.
    kept = [[[3, 7], [0, 1, 2, 9, 15], [4], []], [[8], [5, 6, 7, 10], [11, 0, 1], []]]
    index = torch.tensor([[16 * t + place for t, frame in enumerate(row) for place in frame] for row in kept])
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    index = index[:, order]
    seen = video.encode(tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2])))
    for row, frames in enumerate(kept):
        alone = [image.encode(image.embed(x[row, t : t + 1])[:, places]) for t, places in enumerate(frames) if places]
        expected = torch.cat([each.tokens for each in alone], dim=1)[0]
        torch.testing.assert_close(seen.tokens[row], expected[order])
        pooled = torch.stack([each.pooled[0] for each in alone])
        torch.testing.assert_close(seen.pooled[row], pooled.mean(0) if temporal == "mean" else pooled.amax(0))


@pytest.mark.parametrize(("model", "kwargs"), FRAMES)
def test_hidden_places_of_frames_show_the_mask_token(model, kwargs):
    torch.manual_seed(0)
    video = create(model, "video", **kwargs).double().eval()
    hidden = torch.rand(2, 64) < 0.5
    token = torch.randn(video.width, dtype=torch.float64)
    shown, other = video.embed(clip(), hidden, token), video.embed(255 - clip(), hidden, token)
    assert torch.equal((shown - other).abs().sum(2) == 0, hidden)
    # Not being valid is as good as being left out.
    tokens = video.embed(clip())
    rest = torch.arange(64).remainder(3) > 0
    masked = video.encode(tokens, rest.expand(2, -1))
    left_out = video.encode(tokens[:, rest])
    torch.testing.assert_close(masked.pooled, left_out.pooled)
    torch.testing.assert_close(masked.tokens[:, rest], left_out.tokens)
    assert video.encode(tokens, torch.zeros(2, 64, dtype=torch.bool)).pooled.isfinite().all()


@pytest.mark.long
def test_a_run_whose_task_sees_more_frames_than_its_network_is_monitored_and_probed(tmp_path):
    """Playback speed takes four of sixteen frames, and the network is built for four."""
    run = mmssl.run("playback_speed_toy", set={"training.steps": 2}, out=tmp_path / "run", quiet=True)
    assert run.decoding("video").video.frames == 4
    assert run.encoders["video"].reading().video.frames == 4
    table = mmssl.adapt(run, label="motion", probe="knn", k=[3], limit=16)
    assert table.row("pretrained").metrics["accuracy"] >= 0
