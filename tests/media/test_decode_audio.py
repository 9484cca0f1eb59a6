"""Sounds: right samples at the right place, at any rate, from any container; hostile bytes as one sentence."""

from fractions import Fraction
from pathlib import Path

import av
import iscc_samples
import numpy as np
import pytest
import torch
from scipy.signal import resample_poly

from mmssl.errors import DataError
from mmssl.media.audio import ArraySound, cancels, decode_audio, open_sound, resample
from mmssl.media.clip import write_clip

SAMPLES = sorted((Path(iscc_samples.__file__).parent / "files" / "audio").iterdir())


def tone(rate: int, seconds: float, pitch: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def loudness(sound: torch.Tensor) -> float:
    return float(sound.square().mean().sqrt())


@pytest.mark.quick(4)
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_every_sample_holds_the_same_music(path):
    sound, mask = decode_audio(path, 16_000, 2.0, window=0.5)
    assert sound.dtype == torch.float32
    assert sound.shape == mask.shape == (32_000,)
    if path.name == "short.wav":
        assert int(mask.sum()) == 21_654  # 64,961 samples at 48 kHz
        assert (sound[~mask] == 0).all()
    else:
        assert mask.all()
        reference = decode_audio(SAMPLES[0].parent / "demo.wav", 16_000, 2.0, window=0.5)[0]
        assert loudness(sound) == pytest.approx(loudness(reference), rel=0.02)


@pytest.mark.parametrize("source", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_resampling_keeps_a_tone_and_its_phase(source, rate):
    found, mask = decode_audio({"array": tone(source, 1.0), "sampling_rate": source}, rate, 1.0)
    assert mask.all()
    inside = slice(rate // 10, -rate // 10)
    assert np.abs(found.numpy() - tone(rate, 1.0))[inside].max() < 1e-4


def test_resampling_agrees_with_scipy():
    rng = np.random.default_rng(0)
    smooth = resample_poly(rng.normal(size=4_000), 12, 1)[:44_100].astype(np.float64)
    smooth /= 2 * np.abs(smooth).max()
    found = resample(smooth.astype(np.float32), 44_100, 16_000)
    expected = resample_poly(smooth, 160, 441, window=("kaiser", 12.0))
    assert len(found) == len(expected) == 16_000
    assert np.abs(found - expected)[500:-500].max() < 2e-3


def test_resampling_removes_what_the_new_rate_cannot_hold():
    found, _ = decode_audio({"array": tone(48_000, 1.0, 11_000.0), "sampling_rate": 48_000}, 16_000, 1.0)
    assert found[1_000:-1_000].abs().max() < 1e-3


@pytest.mark.parametrize("source", [44_100, 48_000, 22_050, 12_345])
def test_any_window_has_the_samples_of_the_whole(source):
    sound = ArraySound(np.random.default_rng(0).uniform(-0.5, 0.5, 3 * source), source)
    whole, _ = sound.read(0.0, 16_000, 3.0)
    for start in (0.0, 0.05, 0.77777, 1.9):
        first = round(start * 16_000)
        found, mask = sound.read(start, 16_000, 1.0)
        assert mask.all()
        assert torch.equal(found, whole[first : first + 16_000])


def test_window_goes_from_start_to_end():
    ramp = {"array": np.linspace(0, 1, 8_000, endpoint=False), "sampling_rate": 1_000}
    for window, first in ((0.0, 0.0), (0.5, 3.0), (0.999999, 6.0)):
        sound, mask = decode_audio(ramp, 1_000, 2.0, window)
        assert mask.all()
        assert float(sound[0]) == pytest.approx(first / 8, abs=1e-3)


def test_a_short_sound_is_padded_with_silence_whatever_the_window():
    for window in (0.0, 0.9):
        sound, mask = decode_audio({"array": np.ones(500), "sampling_rate": 1_000}, 1_000, 2.0, window)
        assert mask.tolist() == [True] * 500 + [False] * 1_500
        assert torch.equal(sound, mask.float())


def test_channels_are_averaged_and_integers_scaled():
    left, right = np.full(100, 0.5), np.full(100, -0.1)
    for array in (np.stack([left, right]), np.stack([left, right], 1)):
        assert decode_audio({"array": array, "sampling_rate": 100}, 100, 1.0)[0].allclose(torch.tensor(0.2))
    for array in (np.full(100, -(2**14), np.int16), np.full(100, -(2**30), np.int32), np.full(100, 64, np.uint8)):
        assert (decode_audio({"array": array, "sampling_rate": 100}, 100, 1.0)[0] == -0.5).all()


@pytest.mark.quick(3)
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "m4a", "aac"])
def test_written_sounds_come_back(suffix, tmp_path):
    codec = {"wav": "pcm_s16le", "flac": "flac", "ogg": "libopus", "mp3": "libmp3lame"}.get(suffix, "aac")
    path = tmp_path / f"a.{suffix}"
    write_clip(path, None, 25, tone(48_000, 3.0), 48_000, audio_codec=codec)
    for cell in (path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": "a"}, {"path": str(path)}):
        sound, mask = decode_audio(cell, 16_000, 1.0, 0.5)
        assert mask.all()
        assert loudness(sound) == pytest.approx(0.5**1.5, rel=0.07)
    if suffix in ("wav", "flac", "ogg", "m4a"):
        # MP3 and bare AAC have no field for the padding of their last packet.
        assert int(decode_audio(path, 16_000, 4.0)[1].sum()) == 48_000


@pytest.mark.quick(1)
@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "flac"), ("mp4", "aac"), ("mkv", "libmp3lame")])
def test_a_gap_in_the_sound_stays_a_gap(suffix, codec, tmp_path):
    """Two seconds of tone, one of nothing, a click two later: recorders that drop out write this."""
    rate = 48_000
    click = np.zeros(3 * rate, np.float32)
    click[2 * rate] = 0.9
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        for start, samples in ((0, tone(rate, 2.0)), (3, click)):
            for first in range(0, len(samples), stream.codec_context.frame_size or 1024):
                part = samples[first : first + (stream.codec_context.frame_size or 1024)]
                frame = av.AudioFrame.from_ndarray(part[None], format="fltp", layout="mono")
                frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), start * rate + first
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with open_sound(path) as sound:
        for seek in (True, False):
            found, _ = sound.read(4.5, 16_000, 1.0, seek)
            assert abs(int(found.abs().argmax()) - 8_000) <= 16
            quiet, _ = sound.read(2.2, 16_000, 0.6, seek)
            assert quiet.abs().max() < 0.01


def test_values_are_clipped():
    sound, _ = decode_audio({"array": np.full(100, 3.0), "sampling_rate": 100}, 100, 1.0)
    assert (sound == 1).all()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "the audio cell is empty"),
        (b"", "audio of 0 bytes is empty"),
        (b"fLaC\0\0\0\x22\x12\0\x12" + bytes(7) + b"\x0a\xc4\x40\xf0" + bytes(20), "it is cut short"),
        (b"RIFF" + bytes(50), "no sound or video of a format known here"),
        (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n", "no sound or video of a format known here"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "no sound or video of a format known here"),
        ("/nowhere/a.wav", "there is no audio file '/nowhere/a.wav'"),
        (np.zeros(100), "needs its sample rate"),
        ({"array": np.zeros(100), "sampling_rate": None}, "sampling_rate = None"),
        ({"array": np.zeros(100), "sampling_rate": 0}, "sampling_rate = 0"),
        ({"array": np.zeros(100), "sampling_rate": "8k"}, "sampling_rate = '8k'"),
        ({"array": np.zeros(0), "sampling_rate": 8_000}, "should be"),
        ({"array": np.zeros((2, 3, 4)), "sampling_rate": 8_000}, "should be"),
        ({"array": np.full(9_000, np.nan), "sampling_rate": 8_000}, "not finite"),
        (SAMPLES[0].parents[1] / "image" / "demo.jpg", "no sound or video of a format known here"),
        (SAMPLES[0].parents[1] / "video" / "demo.gif", "has no audio track; it holds video"),
    ],
    ids=range(16),
)
def test_what_cannot_be_read_is_one_sentence(cell, message):
    with pytest.raises(DataError, match=message) as caught:
        decode_audio(cell, 8_000, 1.0)
    assert "\n" not in str(caught.value)


def test_tags_in_other_encodings_do_not_matter():
    data = next(path for path in SAMPLES if path.name == "short.wav").read_bytes()
    tag = b"INFOINAM\x04\x00\x00\x00\xe9\xff\xfe\x00"
    data = data + b"LIST" + len(tag).to_bytes(4, "little") + tag
    data = data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8:]
    assert decode_audio(data, 16_000, 1.0)[1].all()


def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(1)
    for path in SAMPLES:
        data = path.read_bytes()[:60_000]
        for _ in range(4):
            damaged = bytearray(data[: rng.integers(1, len(data))])
            for at in rng.integers(0, len(damaged), 8):
                damaged[at] = rng.integers(256)
            try:
                sound, mask = decode_audio(bytes(damaged), 16_000, 0.5, 0.5)
            except DataError:
                continue
            assert sound.shape == mask.shape == (8_000,)


def test_floats_in_other_units_are_refused_and_overshoot_is_cut():
    wave = np.sin(np.arange(800) / 10)
    loud, _ = decode_audio({"array": wave * 1.5, "sampling_rate": 8000}, 8000, 0.1)
    assert loud.abs().max() == 1
    with pytest.raises(DataError, match=r"up to 327\d\d.*, where full scale is 1"):
        decode_audio({"array": wave * 32_767, "sampling_rate": 8000}, 8000, 0.1)


def stereo(path: Path, left: np.ndarray, right: np.ndarray) -> Path:
    write_clip(path, None, 25, np.stack([left, right]), 16_000, audio_codec="pcm_s16le")
    return path


def test_a_channel_is_heard_alone(tmp_path):
    left, right = tone(16_000, 1.0), tone(16_000, 1.0, pitch=660.0)
    path = stereo(tmp_path / "a.wav", left, right)
    for cell in (path, {"array": np.stack([left, right]), "sampling_rate": 16_000}):
        for channel, expected in (
            ("left", left),
            ("right", right),
            (0, left),
            (1, right),
            ("mean", (left + right) / 2),
        ):
            found, _ = decode_audio(cell, 16_000, 1.0, channel=channel)
            assert np.abs(found.numpy() - expected).max() < 1e-4
        with pytest.raises(DataError, match=r"has 2 channels, numbered from 0, and audio\.channel = 2 is none"):
            decode_audio(cell, 16_000, 1.0, channel=2)
    mono = {"array": left, "sampling_rate": 16_000}
    assert torch.equal(decode_audio(mono, 16_000, 1.0, channel="right")[0], decode_audio(mono, 16_000, 1.0)[0])


def test_channels_that_cancel_each_other_are_told_from_any_others(tmp_path):
    wave = tone(16_000, 1.0)
    loud = np.random.default_rng(0).normal(scale=0.1, size=(2, 16_000)).astype(np.float32)
    assert cancels(stereo(tmp_path / "a.wav", wave, -wave), 1.0)
    assert cancels(stereo(tmp_path / "b.wav", wave, -0.9 * wave), 1.0)
    assert decode_audio(tmp_path / "a.wav", 16_000, 1.0)[0].abs().max() < 1e-4
    assert loudness(decode_audio(tmp_path / "a.wav", 16_000, 1.0, channel="left")[0]) > 0.3
    for name, left, right in (
        ("same", wave, wave),
        ("one", wave, 0 * wave),
        ("none", 0 * wave, 0 * wave),
        ("two", *loud),
    ):
        assert not cancels(stereo(tmp_path / f"{name}.wav", left, right), 1.0)
    assert not cancels({"array": wave, "sampling_rate": 16_000}, 1.0)
