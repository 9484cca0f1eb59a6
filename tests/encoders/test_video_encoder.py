"""Clips: spatio-temporal networks as torchvision has them, and image networks frame by frame."""

import torch
import torchvision

from mmssl.encoders import create

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def clip(frames=4, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, frames, 3, size, size), dtype=torch.uint8, generator=generator)


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
