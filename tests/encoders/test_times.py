"""Where a token says that it is in time, there an impulse changes it."""

import pytest
import torch

from mmssl.encoders import create

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
LAYER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
WAVES = {"conv_dim": [8, 8], "conv_stride": [10, 8], "conv_kernel": [20, 8], "num_feat_extract_layers": 2}
WAVES |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
RATE = 16_000


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("timm/vit_tiny_patch16_224", VIT | {"img_size": [64, 48], "mels": 64}),
        ("timm/test_resnet", {"mels": 32}),
        ("transformers/wav2vec2", LAYER | WAVES | {"normalize": False}),
        ("transformers/audio-spectrogram-transformer", LAYER | {"max_length": 400}),
    ],
)
@torch.no_grad()
def test_a_click_is_in_the_tokens_of_its_second(model, kwargs):
    torch.manual_seed(0)
    encoder = create(model, "audio", **kwargs).eval()
    silence = torch.zeros(1, 2 * RATE)
    seen = encoder.layers(silence)
    # The first depths look no further than their own moment.
    depth = next(name for name, value in seen.items() if len(value.grid) == 2 and "norm" not in name)
    for second in (0.333, 1.0, 1.667):
        click = silence.clone()
        click[0, round(second * RATE) : round(second * RATE) + 40] = 0.9
        changed = (encoder.layers(click)[depth].tokens - seen[depth].tokens).abs().sum(2)[0]
        times = encoder.times(click, seen[depth].grid)
        assert times.shape == (len(changed), 2)
        start, end = times[changed.argmax()].tolist()
        assert start - 0.026 <= second <= end + 0.026  # a window of the spectrogram
    features = encoder(silence)
    times = encoder.times(silence, features.grid)
    moments = times.unflatten(0, features.grid)
    assert torch.equal(moments[0, 0], moments[-1, 0])  # all bands at once
    assert moments[0, 0, 0] == 0
    torch.testing.assert_close(moments[0, 1:, 0], moments[0, :-1, 1])
    if "spectrogram" in model:
        assert moments[0, -1, 1] == pytest.approx(4.0)  # of which two are filled up
    elif encoder.has_spectrogram:
        torch.testing.assert_close(encoder.times(encoder.spectrogram(silence), features.grid), times)


@pytest.mark.parametrize(
    ("model", "kwargs", "frames"),
    [
        ("timm/vit_tiny_patch16_224", VIT, 4),
        ("transformers/videomae", LAYER | {"image_size": 32, "patch_size": 16, "num_frames": 8}, 8),
    ],
)
@torch.no_grad()
def test_a_flash_is_in_the_tokens_of_its_second(model, kwargs, frames):
    torch.manual_seed(0)
    encoder = create(model, "video", **kwargs).eval()
    dark = torch.zeros(1, frames, 3, 32, 32)
    grid = encoder(dark).grid
    for frame in range(frames):
        flash = dark.clone()
        flash[:, frame] = 1
        changed = (encoder.embed(flash) - encoder.embed(dark)).abs().sum(2)[0] > 0
        start, end = encoder.times(flash, grid, fps=25)[changed].unique(dim=0)[0].tolist()
        assert start <= frame / 25 < end
        assert changed.sum() == len(changed) // grid[0]
    assert encoder.times(dark, grid).max().item() == pytest.approx(frames / 12.5)


def test_what_is_in_no_time_says_so():
    image = create("timm/test_resnet", "image")
    with pytest.raises(TypeError, match=r"tokens of image with a grid \(2, 2\) have no seconds"):
        image.times(torch.zeros(1, 3, 64, 64), (2, 2))
    video = create("timm/vit_tiny_patch16_224", "video", **VIT)
    with pytest.raises(TypeError, match=r"grid \(\) have no seconds"):
        video.times(torch.zeros(1, 4, 3, 32, 32), ())
