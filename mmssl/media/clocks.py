"""Whether a click and a flash come back where they were written, in every container with every pair of codecs.

Time stamps are what goes wrong between sound and pictures: encoder delay, edit lists, streams that start late, and
seeks that land elsewhere. So each is tried, on this machine, with the codecs that its FFmpeg has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmssl.errors import DataError
from mmssl.media.audio import ContainerSound
from mmssl.media.clip import write_clip
from mmssl.media.video import open_pictures

CONTAINERS = ("mp4", "mkv", "mov", "webm", "avi", "ogg")
NO_PICTURES = "sound alone"
VIDEO = {"H.264": "libx264", "MPEG-4": "mpeg4", "VP9": "libvpx-vp9", "AV1": "libsvtav1", NO_PICTURES: None}
AUDIO = {
    "AAC": "aac",
    "Opus": "libopus",
    "Vorbis": "vorbis",
    "FLAC": "flac",
    "PCM": "pcm_s16le",
    "MP3": "libmp3lame",
}
# Seconds at which sound and pictures start; with the first, which is how most files are, trials begin.
STARTS = ((0.0, 0.0), (0.36, 0.0), (0.0, 0.36), (0.24, 0.76))

RATE, FPS = 48_000, 25
EVENT = 3.2  # on the clock of the container, and further than a seek reaches back
SIDE = 64  # the least that AV1's encoder takes


@dataclass(frozen=True)
class Clock:
    """How far from its place an event came back in one container.

    Attributes:
        container, video, audio: names out of `CONTAINERS`, `VIDEO` and `AUDIO`.
        refused: whether the container does not take these codecs, or FFmpeg has none of that name here.
        unread: why it cannot be tried with streams that start late, or read; else empty.
        samples: samples of 48 kHz by which the click came late, at each start straight and by seeking.
        frames: frames of 25 a second by which the flash came late, likewise; empty without pictures.
    """

    container: str
    video: str
    audio: str
    refused: bool = False
    unread: str = ""
    samples: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every click came back within one sample and every flash within one frame."""
        return not self.unread and _near(self.samples) and _near(self.frames)

    @property
    def verdict(self) -> str:
        """`exact`, `refused`, `at zero` where only streams that start later are wrong, or `off`."""
        if self.refused or self.exact:
            return "refused" if self.refused else "exact"
        return "at zero" if self.samples and _near(self.samples[:2]) and _near(self.frames[:2]) else "off"

    @property
    def fault(self) -> str:
        """What is wrong, in words; empty where nothing is."""
        if self.refused or self.exact:
            return ""
        return self.unread or (
            f"sound {_off(self.samples[:2], 'sample')}, {_off(self.samples[2:], 'sample')} where a stream starts late"
            + ("" if _near(self.frames) else f"; pictures at most {_off(self.frames, 'frame')}")
        )


def clocks(
    containers: Sequence[str] = CONTAINERS,
    video: Sequence[str] = tuple(VIDEO),
    audio: Sequence[str] = tuple(AUDIO),
    starts: Sequence[tuple[float, float]] = STARTS,
) -> Iterator[Clock]:
    """Write and read every combination of these, by default all: a few hundred clips of four seconds.

    Args:
        containers: out of `CONTAINERS`.
        video: out of `VIDEO`.
        audio: out of `AUDIO`.
        starts: seconds at which sound and pictures start, a pair a trial.
    """
    with tempfile.TemporaryDirectory() as folder:
        for container in containers:
            for pictures in video:
                for sound in audio:
                    yield _clock(Path(folder) / f"clip.{container}", pictures, sound, starts)


def _clock(path: Path, pictures: str, sound: str, starts: Sequence[tuple[float, float]]) -> Clock:
    container = path.suffix[1:]
    late: list[int] = []
    behind: list[int] = []
    for audio_start, video_start in starts:
        try:
            _write_event(path, AUDIO[sound], VIDEO[pictures], EVENT, audio_start, video_start)
        except DataError:
            if audio_start or video_start:
                late_start = "a stream that starts late cannot be written"
                return Clock(container, pictures, sound, False, late_start, tuple(late), tuple(behind))
            return Clock(container, pictures, sound, refused=True)
        try:
            for seek in (False, True):
                late.append(_click(path, seek))
                if VIDEO[pictures]:
                    behind.append(_flash(path, seek))
        except DataError as error:
            return Clock(container, pictures, sound, unread="it cannot be read: " + str(error).partition("' ")[2])
    return Clock(container, pictures, sound, samples=tuple(late), frames=tuple(behind))


def _write_event(
    path: Path, audio: str, video: str | None, at: float, audio_start: float, video_start: float, rate: int = RATE
) -> None:
    """A clip of silence and black but for a click and a flash at `at` seconds on its clock; see `write_clip`."""
    samples = np.zeros(rate * (int(at) + 1), np.float32)
    samples[round((at - audio_start) * rate)] = 0.9
    frames = np.zeros((FPS * (int(at) + 1), SIDE, SIDE, 3), np.uint8) if video else None
    if frames is not None:
        frames[round((at - video_start) * FPS)] = 255
    # FFmpeg's encoder of Vorbis takes two channels and no other number.
    sound = np.stack([samples, samples]) if audio == "vorbis" else samples
    write_clip(
        path,
        frames,
        FPS,
        sound,
        rate,
        audio_codec=audio,
        video_codec=video or "",
        audio_start=audio_start,
        video_start=video_start,
    )


def _click(path: Path, seek: bool) -> int:
    with ContainerSound(path) as sound:
        sound.straight_for = 0.0  # in the first two minutes of AAC, no seek would be tried otherwise
        start = sound.start + round((EVENT - 0.5 - sound.start) * RATE) / RATE
        wave, _ = sound.read(start, RATE, 1.0, seek)
    return round((start - EVENT) * RATE) + int(wave.abs().argmax())


def _flash(path: Path, seek: bool) -> int:
    before = 10
    with open_pictures(path) as pictures:
        shown = pictures.read(EVENT - before / FPS, 16, FPS, 2 * before, seek=seek)
    return int(shown.float().mean(dim=(1, 2, 3)).argmax()) - before


def _near(late: Sequence[int]) -> bool:
    return max(map(abs, late), default=0) <= 1


def _off(late: Sequence[int], unit: str) -> str:
    most = max(late, key=abs, default=0)
    return f"{abs(most):,} {unit}{'s' * (abs(most) != 1)} {'late' if most > 0 else 'early'}" if most else "in place"
