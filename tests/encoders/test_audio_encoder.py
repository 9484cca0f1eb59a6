"""Sounds: the spectrogram is torchaudio's, padding is masked, spectrograms go in directly."""

import math

import numpy as np
import pytest
import torch
import torchaudio

from mmssl.encoders import create

VIT = {"img_size": [64, 48], "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}


def sound(samples=8000, rows=2):
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(0)) * 0.1


def vit(**kwargs):
    torch.manual_seed(0)
    return create("timm/vit_tiny_patch16_224", "audio", **VIT | kwargs).double().eval()


def melspectrogram(sounds, rate, n_fft, hop, mels, low, high):
    """Written out, as librosa's `melspectrogram(htk=True, norm=None, pad_mode="reflect")` of power is documented.

    O'Shaughnessy's mels, 2595 log10(1 + f / 700); triangles in Hz between neighbors that are evenly spaced in mels; a
    periodic Hann window; frames around every hop-th sample; (B, S) -> (B, M, T) in double precision.
    """
    edges = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + np.array([low, high]) / 700)), mels + 2) / 2595) - 1)
    frequency = np.arange(n_fft // 2 + 1) * rate / n_fft
    bank = np.zeros((mels, len(frequency)))
    for band, (left, middle, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        for k, f in enumerate(frequency):
            bank[band, k] = max(0.0, min((f - left) / (middle - left), (right - f) / (right - middle)))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    padded = np.pad(sounds, ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
    starts = range(0, padded.shape[1] - n_fft + 1, hop)
    power = np.stack([np.abs(np.fft.rfft(window * padded[:, t : t + n_fft])) ** 2 for t in starts], axis=2)
    return bank @ power


@pytest.mark.parametrize("settings", [(8000, 256, 80, 32, 50.0, 3500.0), (16000, 400, 160, 40, 0.0, 8000.0)])
def test_spectrogram_is_the_one_written_out(settings):
    rate, n_fft, hop, mels, low, high = settings
    encoder = create(
        "timm/test_resnet", "audio", rate=rate, n_fft=n_fft, hop=hop, mels=mels, f_min=low, f_max=high, mean=0, std=1
    ).double()
    heard = sound(2000).double() + torch.linspace(0, 1, 2000)  # one that does not end where it began
    expected = np.log(melspectrogram(heard.numpy(), *settings) + 1e-6)
    # The filter bank was rounded to single precision before it became double.
    torch.testing.assert_close(encoder.spectrogram(heard), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_spectrogram_is_that_of_torchaudio():
    settings = {"rate": 8000, "n_fft": 256, "hop": 80, "mels": 32, "f_min": 50.0, "f_max": 3500.0}
    native = torchaudio.transforms.MelSpectrogram(
        8000, n_fft=256, hop_length=80, n_mels=32, f_min=50.0, f_max=3500.0
    ).double()
    power = native(sound().double())
    for log, expected in [
        ("ln", (torch.log(power + 1e-5) + 3) / 2),
        ("db", (10 * torch.log10(power + 1e-5) + 3) / 2),
    ]:
        encoder = create("timm/resnet18", "audio", **settings, log=log, eps=1e-5, mean=-3.0, std=2.0).double().eval()
        spectrogram = encoder.spectrogram(sound())
        assert spectrogram.shape == (2, 32, 8000 // 80 + 1)
        # The filter bank was rounded to single precision before it became double.
        torch.testing.assert_close(spectrogram, expected, rtol=1e-5, atol=1e-5)
    assert {"mean", "std", "mel.mel_scale.fb", "mel.spectrogram.window"} <= encoder.front.state_dict().keys()


def test_default_normalization_divides_by_two_standard_deviations():
    encoder = create("timm/resnet18", "audio")
    silence = encoder.spectrogram(torch.zeros(1, 1600))
    expected = (math.log(1e-6) + 4.2677) / (2 * 4.569)
    torch.testing.assert_close(silence, torch.full_like(silence, expected))


@pytest.mark.quick(1)
@pytest.mark.parametrize("model", ["timm/vit_tiny_patch16_224", "timm/resnet18", "torchvision/shufflenet_v2_x0_5"])
def test_a_spectrogram_is_as_good_as_its_sound(model):
    encoder = vit() if "vit" in model else create(model, "audio").eval()
    whole = encoder(sound())
    torch.testing.assert_close(encoder(encoder.spectrogram(sound())).pooled, whole.pooled)
    for name, value in encoder.layers(encoder.spectrogram(sound())).items():
        torch.testing.assert_close(value.tokens, encoder.layers(sound())[name].tokens)
    assert encoder(sound(12000)).grid[1] > whole.grid[1]
    assert encoder(sound(12000)).grid[0] == whole.grid[0]


def test_patches_cover_every_frame_and_silence_fills_the_last():
    encoder = vit()
    spectrogram = encoder.spectrogram(sound(8000))  # 51 frames
    assert spectrogram.shape == (2, 64, 64)
    silence = encoder.spectrogram(torch.zeros(1, 8000))[0, 0, 0]
    torch.testing.assert_close(spectrogram[:, :, 51:], silence.expand(2, 64, 13))
    features = encoder(sound(8000))
    assert features.grid == (4, 4)
    assert encoder.embed(sound(8000)).shape == (2, 16, 16)
    assert encoder.patch_size == (16, 16)
    torch.testing.assert_close(encoder.encode(encoder.embed(sound())).tokens, features.tokens)
    # Tokens go row by row from the lowest band: a change of the highest bands is seen by the last row alone.
    higher = spectrogram.clone()
    higher[:, 48:] += 1
    changed = (encoder.embed(higher) - encoder.embed(spectrogram)).abs().sum(dim=2) > 1e-9
    assert torch.equal(changed, torch.arange(16).expand(2, 16) >= 12)


def test_a_mask_token_hides_a_patch_of_the_spectrogram():
    encoder = vit()
    mask = torch.arange(16).expand(2, -1) % 3 == 0
    token = torch.ones(encoder.width).double()
    hidden, seen = encoder.embed(sound(), mask, token), encoder.embed(sound())
    assert torch.equal(hidden[~mask], seen[~mask])
    louder = encoder.embed(2 * sound(), mask, token)
    assert torch.equal(hidden[mask], louder[mask])
    assert not torch.equal(hidden[~mask], louder[~mask])


def test_mask_is_true_where_a_sample_is_near():
    encoder = create("timm/resnet18", "audio", hop=100, n_fft=400)
    mask = torch.arange(1000).expand(1, -1) < 430
    frames = encoder.valid_frames(mask)
    assert frames.shape == (1, encoder.spectrogram(sound(1000, 1)).shape[2])
    assert frames[0].tolist() == [True] * 5 + [False] * 6  # frame 4 is centered on 400, frame 5 on 500
    assert encoder.valid_frames(torch.ones(1, 1000, dtype=torch.bool)).all()
    assert not encoder.valid_frames(torch.zeros(1, 1000, dtype=torch.bool)).any()


def test_tokens_behind_the_end_of_a_sound_have_no_influence():
    encoder = vit(class_token=False, global_pool="avg")
    x = sound(32_000)
    mask = torch.ones(2, 32_000, dtype=torch.bool)
    mask[1, 10_000:] = False
    features = encoder(x, mask)
    assert features.valid.sum(dim=1).tolist() == [13 * 4, 4 * 4]  # 201 and 63 frames in patches of 16
    spectrogram = encoder.spectrogram(x)
    spectrogram[1, :, 64:] = 3.0
    changed = encoder(spectrogram, encoder.valid_frames(mask))
    torch.testing.assert_close(changed.pooled, features.pooled)
    torch.testing.assert_close(changed.tokens[features.valid], features.tokens[features.valid])
    for name, value in encoder.layers(spectrogram, encoder.valid_frames(mask)).items():
        torch.testing.assert_close(value.pooled, encoder.layers(x, mask)[name].pooled)
        assert torch.equal(value.valid, features.valid)
    full = torch.ones_like(mask)
    torch.testing.assert_close(encoder(x, full).pooled, encoder(x).pooled)


@pytest.mark.quick(1)
@pytest.mark.parametrize("model", ["torchvision/shufflenet_v2_x0_5", "timm/resnet18", "timm/convnext_atto"])
def test_convolutional_network_pools_the_valid_places(model):
    encoder = create(model, "audio").double().eval()
    x = sound(32_000)
    mask = torch.ones(2, 32_000, dtype=torch.bool)
    mask[1, 16_000:] = False
    features, plain = encoder(x, mask), encoder(x)
    assert features.valid.all(dim=1).tolist() == [True, False]
    torch.testing.assert_close(features.pooled[0], plain.pooled[0])
    assert not torch.allclose(features.pooled[1], plain.pooled[1])
    if "convnext" not in model:
        valid = plain.tokens[1][features.valid[1]].mean(dim=0)
        torch.testing.assert_close(features.pooled[1], valid)
    nothing = encoder(x, torch.zeros_like(mask))
    torch.testing.assert_close(nothing.pooled, plain.pooled)


def test_a_vision_transformer_of_clip_heeds_no_padding():
    clip = {
        "embed_dim": 12,
        "vision_cfg": {"layers": 2, "width": 16, "head_width": 8, "image_size": 32, "patch_size": 16},
        "text_cfg": {"layers": 1, "width": 16, "heads": 2, "vocab_size": 50},
    }
    encoder = create("open_clip/ViT-B-32", "audio", mels=32, **clip).double().eval()
    x, valid = sound(8000), torch.arange(8000).expand(2, -1) < 3000
    spectrogram, frames = encoder.spectrogram(x), encoder.valid_frames(valid)
    features = encoder(spectrogram, frames)
    assert features.valid.sum(1).tolist() == [2 * 2] * 2  # 19 frames, in patches of 16
    noisy = spectrogram.clone()
    noisy[:, :, 32:] = 5.0
    torch.testing.assert_close(encoder(noisy, frames).pooled, features.pooled)
    assert not torch.allclose(encoder(noisy).pooled, features.pooled)
    for name, value in encoder.layers(noisy, frames).items():
        torch.testing.assert_close(value.pooled, encoder.layers(spectrogram, frames)[name].pooled)


def test_axes_of_a_picture_are_those_of_the_spectrogram():
    encoder = create("timm/test_resnet", "audio", rate=8000, n_fft=4096, hop=80, mels=32, f_min=50.0, f_max=3500.0)
    scale = encoder.scale(encoder.spectrogram(sound(8000))[0])
    assert scale.seconds == pytest.approx(1.0, abs=0.011)
    heaviest = encoder.front.mel.mel_scale.fb.argmax(0) * 8000 / 4096
    assert list(scale.bands) == pytest.approx(heaviest.tolist(), abs=8000 / 4096)
    assert encoder.scale(sound(8000)[0]) == (1.0, ())
    tone = torch.sin(torch.arange(8000) * 2 * math.pi * scale.bands[20] / 8000)
    assert encoder.spectrogram(tone[None])[0, :, 50].argmax() == 20


def test_half_precision_leaves_the_front_end_alone():
    encoder = create("timm/vit_tiny_patch16_224", "audio", **VIT).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encoder.spectrogram(sound())
        assert encoder(sound()).pooled.isfinite().all()
    torch.testing.assert_close(inside, encoder.spectrogram(sound()))
