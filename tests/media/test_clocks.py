"""Time stamps in every container: where an event was written is where it comes back."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from mmssl import doctor
from mmssl.media import clocks as module
from mmssl.media.audio import ContainerSound, open_sound
from mmssl.media.clocks import AUDIO, CONTAINERS, NO_PICTURES, VIDEO, Clock, clocks
from mmssl.media.track import Track
from mmssl.media.video import open_pictures


def the(container: str, video: str, audio: str) -> Clock:
    (found,) = clocks((container,), (video,), (audio,))
    return found


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("container", "video", "audio"),
    [
        ("mp4", "H.264", "AAC"),
        ("mp4", "MPEG-4", "MP3"),
        ("mkv", "H.264", "Vorbis"),
        ("webm", "VP9", "Opus"),
        ("mov", "H.264", "PCM"),
        ("ogg", NO_PICTURES, "FLAC"),
        ("ogg", NO_PICTURES, "Vorbis"),
    ],
)
def test_an_event_comes_back_in_its_place(container, video, audio):
    found = the(container, video, audio)
    assert found.verdict == "exact", found
    assert len(found.samples) == 2 * len(module.STARTS)
    assert len(found.frames) == (0 if video == NO_PICTURES else len(found.samples))


def test_what_a_container_does_not_take_and_what_it_loses_is_told():
    assert the("mov", "VP9", "AAC").verdict == "refused"
    assert the("webm", "VP9", "AAC").verdict == "refused"
    assert not the("webm", "VP9", "AAC").fault
    lost = the("avi", "MPEG-4", "PCM")
    assert lost.verdict == "at zero"
    assert lost.fault == "sound in place, 17,280 samples early where a stream starts late"


@pytest.mark.long
def test_every_container_but_avi_is_exact_with_every_pair_of_codecs_that_it_takes():
    found = list(clocks())
    assert len(found) == len(CONTAINERS) * len(VIDEO) * len(AUDIO)
    taken = [clock for clock in found if not clock.refused and clock.container != "avi"]
    assert len(taken) >= 75
    assert [clock for clock in taken if not clock.exact] == []
    for clock in found:
        if clock.container == "avi" and clock.audio in ("PCM", "FLAC"):
            assert clock.verdict == "at zero", clock


def test_the_table_names_every_fault_once(monkeypatch):
    some = [the("mp4", "MPEG-4", "PCM"), the("avi", "MPEG-4", "PCM"), the("avi", NO_PICTURES, "PCM")]
    monkeypatch.setattr(module, "clocks", lambda: some)
    text = doctor.media()
    assert "mp4 MPEG-4        exact" in text
    assert "avi MPEG-4        at zero" in text
    assert text.count("17,280 samples early") == 1
    assert "avi, PCM with MPEG-4, sound alone: sound in place" in text


def test_the_proof_sees_a_clock_that_is_wrong(monkeypatch):
    take = ContainerSound.take
    monkeypatch.setattr(ContainerSound, "take", lambda self, first, last, seek: take(self, first - 5, last - 5, seek))
    assert the("mp4", NO_PICTURES, "PCM").samples == (5,) * 8


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("suffix", "codec", "mark"),
    [
        ("mp4", "aac", 1_016),
        ("mp4", "libmp3lame", 2_663),
        ("mkv", "libmp3lame", 2_663),
        ("mkv", "libopus", 12_213),
        ("mkv", "vorbis", 1_024),
        ("mp4", "flac", 0),
        ("mkv", "flac", 0),
    ],
)
def test_what_a_seek_leaves_in_a_decoder_is_over_before_the_window(suffix, codec, mark, tmp_path, monkeypatch):
    """`mark` samples were measured to differ after a seek; the least pre-roll, half of the usual one, is longer."""
    rate = 48_000
    noise = (0.1 * np.random.default_rng(0).normal(size=(2, 4 * rate))).astype(np.float32)
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        # Noise that AAC codes as its level alone is drawn anew by every decoder, so here it is coded in full.
        options = {"aac": {"aac_pns": "0"}, "vorbis": {"strict": "experimental"}}.get(codec, {})
        stream = container.add_stream(codec, rate=rate, layout="stereo", options=options)
        frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="stereo")
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with ContainerSound(path) as sound:
        starts = (1.9, 2.50001, 2.987)
        straight = [sound.read(start, rate, 1.0, seek=False)[0] for start in starts]
    monkeypatch.setattr(Track, "straight", lambda self: pytest.fail("did not seek"))
    for start, expected in zip(starts, straight, strict=True):
        with ContainerSound(path) as sound:  # anew, for a window is read on from where the last one ended
            sound.straight_for = 0.0
            assert torch.equal(sound.read(start, rate, 1.0)[0], expected)
    assert mark < rate / 2


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_frames_of_uneven_length_are_shown_as_long_as_they_last(suffix, tmp_path, monkeypatch):
    """Variable frame rate, as phones and screen recorders write it: each instant shows the last picture before it."""
    path = tmp_path / f"a.{suffix}"
    lengths = np.random.default_rng(3).integers(20, 300, 40) / 1000
    times = np.concatenate([[0], np.cumsum(lengths)])[:40].round(3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=32, height=32, pix_fmt="yuv420p")
        stream.codec_context.time_base, stream.codec_context.gop_size = Fraction(1, 1000), 5
        for k, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 6 * k, np.uint8), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), round(time * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with open_pictures(path) as pictures:
        for start in (0.0, 2.0, 3.5005):
            due = start + np.arange(20) / 30
            assert np.abs(due[:, None] - times)[1:].min() > 0.0001
            expected = np.searchsorted(times, due + pictures.tolerance, side="right") - 1
            found = pictures.read(start, 16, 30, 20, seek=False)
            assert (found.float().mean(dim=(1, 2, 3)) / 6).round().tolist() == expected.tolist()
            with monkeypatch.context() as patch:
                if start:
                    patch.setattr(Track, "straight", lambda self: pytest.fail("did not seek"))
                assert torch.equal(pictures.read(start, 16, 30, 20), found)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_what_an_edit_list_cuts_off_is_not_seen_or_heard(suffix, tmp_path, monkeypatch):
    """Stamps below zero become an edit list in MP4, as trimming without encoding anew does: 0.4 s of both are cut."""
    path = tmp_path / f"a.{suffix}"
    rate, cut = 48_000, 0.4
    with av.open(str(path), "w", options={"movie_timescale": str(rate), "avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream("libx264", rate=25, width=32, height=32, pix_fmt="yuv420p")
        stream.codec_context.time_base, stream.codec_context.gop_size = Fraction(1, 25), 25
        sound = container.add_stream("aac", rate=rate, layout="mono")
        for k in range(100):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * (k % 32), np.uint8), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 25), k - round(cut * 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        samples = np.zeros((1, 4 * rate), np.float32)
        samples[0, [rate // 5, 3 * rate]] = 0.9
        whole = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        whole.sample_rate, whole.time_base, whole.pts = rate, Fraction(1, rate), -round(cut * rate)
        container.mux(sound.encode(whole))
        container.mux(sound.encode(None))
    with open_pictures(path) as pictures, open_sound(path) as heard:
        assert pictures.start == 0
        for first in (0, 13, 40, 66):  # key frames were written as 25, 50 and 75, which are 15, 40 and 65 now
            shown = pictures.read(first / 25, 16, 25, 5, seek=False)
            assert (shown.float().mean(dim=(1, 2, 3)) / 8).round().tolist() == [(first + 10 + k) % 32 for k in range(5)]
        assert abs(heard.start) < 2 / rate
        wave, _ = heard.read(heard.start, rate, 3.5)
        assert wave[: rate // 2].abs().max() < 0.05
        assert abs(int(wave.abs().argmax()) - round((3 - cut) * rate)) <= 1
    monkeypatch.setattr(Track, "straight", lambda self: pytest.fail("did not seek"))
    with open_pictures(path) as pictures, open_sound(path) as again:
        assert torch.equal(pictures.read(66 / 25, 16, 25, 5), shown)
        assert (pictures.read(0.52, 16, 25, 1) / 8).round().eq(23).all()  # back, and before any key frame that is left
        again.straight_for = 0.0  # a window so early would else be decoded from the beginning
        assert torch.equal(again.read(again.start + 2.2, rate, 1.0)[0], wave[round(2.2 * rate) : round(3.2 * rate)])
