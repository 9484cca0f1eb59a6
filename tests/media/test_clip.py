"""One clock: a click and a flash of one instant land on one instant of the batch, however stored and read."""

import gc

import av
import numpy as np
import pytest
import torch

from mmssl.decode_settings import AudioDecode, VideoDecode
from mmssl.errors import DataError
from mmssl.media import audio as audio_module
from mmssl.media.clip import codecs, decode_clip, write_clip
from mmssl.media.track import Track

RATE, FPS, SECONDS = 48_000, 25, 5
AUDIO = AudioDecode(rate=16_000, seconds=1.0)
VIDEO = VideoDecode(size=16, fps=FPS, frames=25)
CONTAINERS = [(suffix, codec) for suffix in ("mp4", "mkv") for codec in ("aac", "flac", "libopus")]
STARTS = [(0.0, 0.0), (0.36, 0.0), (0.0, 0.36), (0.24, 0.76)]


def write_event(path, codec: str, at: float, audio_start: float, video_start: float, rate: int = RATE) -> None:
    """A clip of black and silence but for a click and a flash at `at` seconds on its clock."""
    samples = np.zeros(rate * SECONDS, np.float32)
    samples[round((at - audio_start) * rate)] = 0.9
    frames = np.zeros((FPS * SECONDS, 32, 32, 3), np.uint8)
    frames[round((at - video_start) * FPS)] = 255
    write_clip(path, frames, FPS, samples, rate, audio_codec=codec, audio_start=audio_start, video_start=video_start)


def find_event(sound: torch.Tensor, video: torch.Tensor) -> tuple[int, int]:
    """Sample of the click, frame of the flash."""
    brightness = video.float().mean(dim=(1, 2, 3))
    assert float(sound.abs().max()) > 0.1
    assert float(brightness.max()) > 128
    return int(sound.abs().argmax()), int(brightness.argmax())


@pytest.mark.quick(6)
@pytest.mark.parametrize(("audio_start", "video_start"), STARTS)
@pytest.mark.parametrize(("suffix", "codec"), CONTAINERS)
def test_click_and_flash_are_one_instant(suffix, codec, audio_start, video_start, tmp_path, monkeypatch):
    path = tmp_path / f"a.{suffix}"
    at = 3.6
    write_event(path, codec, at, audio_start, video_start)

    # From the start, whose place is known: both are exact, to one sample and one frame.
    whole = {"audio": AudioDecode(rate=16_000, seconds=4.0), "video": VideoDecode(size=16, fps=FPS, frames=100)}
    sound, _, video = decode_clip(path, window=0.0, **whole)
    sample, frame = find_event(sound, video)
    start = max(audio_start, video_start)
    if (suffix, codec) == ("mp4", "aac") and audio_start > video_start:
        start -= 1024 / RATE  # the encoder's delay counts as sound: the file does not say that it is none
        assert abs(frame - (at - start) * FPS) < 1
    else:
        assert frame == round((at - start) * FPS)
    assert abs(sample - (at - start) * 16_000) <= 1

    # From anywhere, by a seek and straight: both move together, and the two ways agree.
    # AAC is decoded straight in its first two minutes; here it must seek too.
    monkeypatch.setattr(audio_module, "AAC_STRAIGHT", 0.0)
    found = []
    for straight in (False, True):
        if straight:
            monkeypatch.setattr(Track, "seek", lambda self, time: self.straight())
        sound, mask, video = decode_clip(path, audio=AUDIO, video=VIDEO, window=0.75)
        sample, frame = find_event(sound, video)
        found.append((sample, frame))
        assert mask.all()
        # The flash begins somewhere in the frame that shows it; Matroska's clock ticks in milliseconds.
        delay = frame / FPS - sample / AUDIO.rate
        assert -1 / AUDIO.rate - (0.0005 if suffix == "mkv" else 0) <= delay <= 1 / FPS
    assert found[0] == found[1]


@pytest.mark.quick(4)
@pytest.mark.parametrize("rate", [44_100, 48_000])
@pytest.mark.parametrize(
    ("suffix", "codec"), [*CONTAINERS, ("mp4", "libmp3lame"), ("mkv", "libmp3lame"), ("mkv", "pcm_s16le")]
)
def test_seeking_and_decoding_straight_give_the_same_sound(suffix, codec, rate, tmp_path, monkeypatch):
    if codec == "libopus":
        rate = 48_000
    rng = np.random.default_rng(0)
    samples = (0.1 * rng.normal(size=rate * SECONDS)).astype(np.float32)
    path = tmp_path / f"a.{suffix}"
    write_clip(path, np.zeros((FPS * SECONDS, 32, 32, 3), np.uint8), FPS, samples, rate, audio_codec=codec)
    with audio_module.open_sound(path) as sound:
        starts = (1.9, 2.50001, 3.333, 4.5)
        straight = [sound.read(start, 16_000, 1.0, seek=False) for start in starts]
    if codec not in ("aac", "pcm_s16le"):  # which are decoded straight, so that this holds
        monkeypatch.setattr(Track, "straight", lambda self: pytest.fail("did not seek"))
    for start, (expected, valid) in zip(starts, straight, strict=True):
        with audio_module.open_sound(path) as sound:  # anew, for a window is read on from where the last one ended
            found, mask = sound.read(start, 16_000, 1.0)
        assert torch.equal(found, expected)
        assert torch.equal(mask, valid)


@pytest.mark.parametrize(("suffix", "codec"), CONTAINERS)
def test_the_encoders_padding_is_no_sound(suffix, codec, tmp_path):
    path = tmp_path / f"a.{suffix}"
    write_clip(path, None, FPS, np.full(48_000, 0.1, np.float32), 48_000, audio_codec=codec)
    sound, mask, _ = decode_clip(path, audio=AudioDecode(rate=48_000, seconds=1.5))
    # Matroska rounds durations to milliseconds.
    assert abs(int(mask.sum()) - 48_000) <= (48 if suffix == "mkv" else 0)
    assert (sound[~mask] == 0).all()


def test_the_window_is_the_same_for_sound_and_pictures_of_other_lengths(tmp_path):
    path = tmp_path / "a.mkv"
    write_event(path, "flac", 2.0, 0.0, 0.0)
    short = AudioDecode(rate=16_000, seconds=0.5)
    long = VideoDecode(size=16, fps=FPS, frames=100)
    sound, _, video = decode_clip(path, audio=short, video=long, window=0.0)
    assert int(video.float().mean(dim=(1, 2, 3)).argmax()) == 50
    assert sound.shape == (8_000,)
    # 5 s - 4 s of pictures leave 1 s: the window starts at 0.75 s.
    _, _, video = decode_clip(path, audio=short, video=long, window=0.75)
    assert int(video.float().mean(dim=(1, 2, 3)).argmax()) == 32


def test_decoded_tracks_share_a_clock():
    samples, frames = np.zeros(32_000, np.float32), np.zeros((50, 16, 16, 3), np.uint8)
    samples[16_000] = 1
    frames[25] = 255
    cell = {"audio": {"array": samples, "sampling_rate": 16_000}, "video": {"frames": frames, "fps": 25}}
    sound, _, video = decode_clip(cell, audio=AUDIO, video=VIDEO, window=0.5)
    assert find_event(sound, video) == (8_000, 13)  # frame 12 still shows what began before
    video = VideoDecode(size=16, fps=FPS, frames=20)
    sound, _, video = decode_clip(cell, audio=AudioDecode(rate=16_000, seconds=0.8), video=video, window=0.5)
    assert find_event(sound, video) == (6_400, 10)


def test_one_track_is_the_same_with_and_without_the_other(tmp_path):
    path = tmp_path / "a.mp4"
    write_event(path, "aac", 2.0, 0.0, 0.0)
    both = decode_clip(path, audio=AUDIO, video=VIDEO, window=0.4)
    sound, mask, none = decode_clip(path.read_bytes(), audio=AUDIO, window=0.4)
    assert none is None
    assert torch.equal(sound, both[0])
    assert torch.equal(mask, both[1])
    assert torch.equal(decode_clip({"bytes": None, "path": str(path)}, video=VIDEO, window=0.4)[2], both[2])


def test_a_missing_track_is_named(tmp_path):
    silent, blind = tmp_path / "silent.mp4", tmp_path / "blind.m4a"
    write_clip(silent, np.zeros((25, 32, 32, 3), np.uint8), FPS, None, RATE)
    write_clip(blind, None, FPS, np.zeros(RATE, np.float32), RATE)
    with pytest.raises(DataError, match=r"silent\.mp4' has no audio track; it holds video"):
        decode_clip(silent, audio=AUDIO, video=VIDEO)
    with pytest.raises(DataError, match=r"blind\.m4a' has no video track; it holds audio"):
        decode_clip(blind, audio=AUDIO, video=VIDEO)


def test_tracks_that_do_not_overlap(tmp_path):
    path = tmp_path / "a.mkv"
    write_clip(path, np.zeros((25, 32, 32, 3), np.uint8), FPS, np.zeros(RATE, np.float32), RATE, video_start=3.0)
    with pytest.raises(DataError, match="do not overlap in time"):
        decode_clip(path, audio=AUDIO, video=VIDEO)


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    sound = np.zeros(RATE, np.float32)
    for path, frames, codec in (
        (tmp_path / "a.mp4", np.zeros((5, 31, 31, 3), np.uint8), "aac"),
        (tmp_path / "a.xyz", None, "aac"),
        (tmp_path / "a.mp4", None, "no_such_codec"),
        (tmp_path / "a.webm", None, "aac"),
    ):
        with pytest.raises(DataError, match="cannot write"):
            write_clip(path, frames, FPS, sound, RATE, audio_codec=codec)
    with pytest.raises(DataError, match="neither frames nor samples"):
        write_clip(tmp_path / "a.mp4", None, FPS, None, RATE)


def test_every_codec_of_the_wheel_works():
    found = codecs()
    assert {"mp4 h264+aac", "mkv h264+flac", "mkv h264+opus", "png", "jpeg"} <= found.keys()
    assert all(found.values()), found


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("kind", ["audio", "video"])
def test_one_track_is_decoded_without_reading_the_other(suffix, kind, tmp_path, monkeypatch):
    path = tmp_path / f"a.{suffix}"
    write_event(path, "flac", 2.0, 0.0, 0.0)
    with Track(path, kind) as track:
        decoded = sum(1 for _ in track.straight())
        container = track._container
        container.seek(0)
        read = {packet.stream.type for packet in container.demux() if packet.size}
    assert read == {kind}
    with av.open(str(path)) as container:
        assert decoded == sum(1 for _ in container.decode(**{kind: 0}))


@pytest.mark.long
def test_a_clip_that_was_read_is_freed_without_waiting_for_garbage(tmp_path):
    """Decoders and frames that hold on to each other pile up: 14 KiB a window of 160 x 160 pixels, it was."""
    path = tmp_path / "a.mp4"
    write_event(path, "aac", 2.0, 0.0, 0.0)
    decode_clip(path, audio=AUDIO, video=VIDEO, window=0.4)  # imports what it needs
    gc.collect()
    gc.disable()
    try:
        for window in (0.4, [0.0, 1.0]):
            decode_clip(path, audio=AUDIO, video=VIDEO, window=window)
        assert gc.collect() <= 12  # the first frame of each, whose side data hold on to it; it was hundreds
    finally:
        gc.enable()
