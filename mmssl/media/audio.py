"""Sounds to a mono window of fixed length, at the recipe's sample rate, sample-exact on the container's clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import ceil, gcd
from numbers import Real
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from mmssl.errors import DataError
from mmssl.media.cell import sentence
from mmssl.media.track import PREROLL, Track, window_start

# The resampler's filter spans 16 samples of the lower rate to either side.
FILTER_REACH = 64
# AAC may code noise as nothing but its level, and decoders then draw it from a generator that runs since the first
# packet. So a window in the first this many seconds is decoded from there; a later one has other noise after a seek.
AAC_STRAIGHT = 120.0
# Time stamps may wobble by this many seconds before a jump is taken for a gap in the sound.
WOBBLE = 0.01
# Floats may overshoot full scale a little, and are cut; beyond this they were written in other units.
LOUDEST = 16.0

# The mean of two channels that have nothing in common, one of them silent even, is half as loud as one, of six a sixth.
CANCELED = 0.1
CANCELING = "sounds are lost in the mean of their channels, which cancel each other; data.audio.channel=left hears one"

# The number of its first sample, and a frame of PyAV.
Placed = tuple[int, Any]


def decode_audio(
    cell: Any,
    rate: int,
    seconds: float,
    window: float | Sequence[float] = 0.0,
    center: float | None = None,
    channel: str | int = "mean",
) -> tuple[Tensor, Tensor]:
    """Decode a window of a sound.

    Args:
        cell: bytes, a path or `{"bytes", "path"}` of any container (videos too), or `{"array", "sampling_rate"}` with
            an array (S,), (channels, S) or (S, channels) of floats in [-1, 1] or of signed integers.
        rate: sample rate wanted, in Hz.
        seconds: length of the window, S = round(rate · seconds) samples.
        window: which part of a longer sound, in [0, 1]: 0 is the start, 0.5 the middle. Several, ascending, are read in
            one pass and give a first dimension of as many.
        center: the second that is in the middle of the window, in place of `window`; see `window_start`.
        channel: `mean` of all, `left`, `right` (of one channel, that one), or a number from 0.

    Returns:
        float32 (S,) in [-1, 1], zero after the sound's end, and a mask bool (S,), True where there is sound.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    with open_sound(cell, channel) as sound:
        if isinstance(window, Sequence):
            return sound.read_windows([window_start([sound], seconds, one, center) for one in window], rate, seconds)
        return sound.read(window_start([sound], seconds, window, center), rate, seconds)


def open_sound(cell: Any, channel: str | int = "mean") -> Sound:
    """The sound of a cell; see `decode_audio`."""
    if isinstance(cell, Mapping) and "array" in cell:
        return ArraySound(cell["array"], cell.get("sampling_rate"), channel)
    if isinstance(cell, np.ndarray):
        raise DataError('an audio array needs its sample rate: expected {"array": ..., "sampling_rate": ...}')
    return ContainerSound(cell, channel)


class Sound:
    """A mono sound with a clock; a subclass says where its source samples come from.

    Attributes:
        source_rate: in Hz.
        start, end: seconds on the clock; source sample n happens at `start + n / source_rate`.
        samples: number of source samples, as far as known before decoding.
        channels: that the source has.
    """

    name = "audio"
    start: float
    end: float
    source_rate: int
    samples: int
    channels: int

    def take(self, first: int, last: int, seek: bool) -> tuple[np.ndarray, int]:
        """Source samples first..last-1 as float32, zero beyond the end, and the number that the sound really has."""
        raise TypeError(f"{type(self).__name__} has no samples")

    def read(self, start: float, rate: int, seconds: float, seek: bool = True) -> tuple[Tensor, Tensor]:
        """The window from `start`, to the nearest sample of `rate`; see `decode_audio`.

        `seek=False` decodes a container from its beginning; the result is the same.
        """
        length, source = round(rate * seconds), self.source_rate
        offset = round((start - self.start) * rate)
        common = gcd(source, rate)
        # Resampling starts where source and target samples coincide: so any window has the samples of the whole.
        block_in, block_out = source // common, rate // common
        reach = FILTER_REACH * max(1, ceil(source / rate)) if source != rate else 0
        block = max(0, offset // block_out - ceil(reach / block_in))
        first = block * block_in
        last = min(self.samples, ceil((offset + length) * source / rate) + reach)
        sound, held = self.take(first, max(first + 1, last), seek)
        if held * rate <= offset * source:
            raise DataError(f"{self.name} ends at {held / source:.2f} s, before its header says and before the window")
        resampled = resample(sound, source, rate)[offset - block * block_out :][:length]
        valid = min(length, ceil(held * rate / source) - offset)
        window = np.zeros(length, np.float32)
        window[: min(valid, len(resampled))] = resampled[:valid]
        if not np.isfinite(window).all():
            raise DataError(f"{self.name} holds values that are not finite")
        loudest = float(np.abs(window).max(initial=0))
        if loudest > LOUDEST:
            raise DataError(f"{self.name} holds values up to {loudest:.6g}, where full scale is 1: scale it to [-1, 1]")
        return torch.from_numpy(window.clip(-1, 1)), torch.arange(length) < valid

    def read_windows(self, starts: Sequence[float], rate: int, seconds: float) -> tuple[Tensor, Tensor]:
        """Windows from ascending `starts`: float32 and bool (W, S); see `read`."""
        waves, masks = zip(*(self.read(start, rate, seconds) for start in starts), strict=True)
        return torch.stack(waves), torch.stack(masks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the decoder, where there is one."""


class ArraySound(Sound):
    """A sound that is decoded already; its clock starts at its first sample."""

    def __init__(self, array: Any, rate: Any, channel: str | int = "mean") -> None:
        hertz = float(rate) if isinstance(rate, Real) else 0.0
        if not (1 <= hertz < 1e9 and hertz.is_integer()):
            raise DataError(f"an audio array needs a sample rate in Hz, found sampling_rate = {rate!r}")
        array = np.asarray(array)
        if array.ndim not in (1, 2) or array.dtype.kind not in "fiu" or not array.size:
            raise DataError(
                f"an audio array should be (S,) or (channels, S) of numbers, not {array.dtype} {array.shape}"
            )
        planes = to_float(np.atleast_2d(array))
        planes = planes if planes.shape[0] <= planes.shape[1] else planes.T
        self.channels = len(planes)
        mono = choose(planes, channel, self.name)
        self._mono, self.source_rate, self.samples = mono, int(hertz), len(mono)
        self.start, self.end = 0.0, len(mono) / hertz

    def take(self, first: int, last: int, seek: bool) -> tuple[np.ndarray, int]:
        """See `Sound.take`."""
        return self._mono[first:last], self.samples


class _Left(NamedTuple):
    """Where a window ended: its own frames, those after them, and whether a seek led there."""

    kept: list[Placed]
    frames: Iterator[Placed]
    sought: bool


class ContainerSound(Sound):
    """The audio track of a container.

    Attributes:
        straight_for: windows that begin in the first so many seconds are decoded straight, without a seek.
    """

    def __init__(self, cell: Any, channel: str | int = "mean") -> None:
        self._track = track = Track(cell, "audio")
        self._channel, self.channels = channel, track.head[0].layout.nb_channels
        self.name, self.start, self.end = track.name, track.start, track.end
        self.source_rate = track.head[0].sample_rate
        self.samples = max(1, round((self.end - self.start) * self.source_rate))
        self._left: _Left | None = None
        self.straight_for = AAC_STRAIGHT if track.stream.codec_context.name == "aac" else PREROLL

    def close(self) -> None:
        """Free the decoder, and what holds on to this."""
        self._left = None
        self._track.close()

    def take(self, first: int, last: int, seek: bool) -> tuple[np.ndarray, int]:
        """See `Sound.take`; a window shortly after the last one is read on from there."""
        sound, held = np.zeros(last - first, np.float32), 0
        frames, sought = self._frames(first, seek)
        kept: list[Placed] = []
        for at, frame in frames:
            held = at + frame.samples
            begin, end = max(at, first), min(held, last)
            if begin < end:
                sound[begin - first : end - first] = self._mono(frame)[begin - at : end - at]
            if held > first:
                kept.append((at, frame))
            if held >= last:
                break
        self._left = _Left(kept, frames, sought)
        return sound, self.samples if held >= last else min(held, self.samples)

    def _frames(self, first: int, seek: bool) -> tuple[Iterator[Placed], bool]:
        """Frames from before `first`, and whether a seek led there."""
        track, preroll, left = self._track, round(PREROLL * self.source_rate), self._left
        seek = seek and track.seekable and first > max(PREROLL, self.straight_for) * self.source_rate
        if left is not None and left.kept and left.kept[0][0] <= first and (seek or not left.sought):
            at, frame = left.kept[-1]
            if not seek or first <= at + frame.samples + preroll:
                return chain(left.kept, left.frames), left.sought
        self._left = None
        if seek:
            frames = self._resume(track.seek(self.start + first / self.source_rate - PREROLL), first - preroll // 2)
            if frames is not None:
                return frames, True
        return self._place(track.straight(), 0), False

    def _mono(self, frame: Any) -> np.ndarray:
        """Samples of a frame of PyAV, float32 (S,)."""
        array = frame.to_ndarray()
        planes = array if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels).T
        return choose(to_float(planes), self._channel, self.name)

    def _resume(self, frames: Iterator[Any], latest: int) -> Iterator[Placed] | None:
        """Place frames after a seek; None where their place cannot be told, or they begin after `latest`."""
        frame = next(frames, None)
        if frame is None:
            return None
        at = (frame.time - self.start) * self.source_rate
        if self._track.tick * self.source_rate > 1:
            # Coarse time stamps, of Matroska mostly: all frames but the first are of one length, so count in frames.
            sizes = [head.samples for head in self._track.head]
            if len(sizes) < 2 or frame.samples != sizes[1]:
                return None
            at = sizes[0] + round((at - sizes[0]) / sizes[1]) * sizes[1]
        return self._place(chain([frame], frames), round(at)) if at <= latest else None

    def _place(self, frames: Iterator[Any], at: int) -> Iterator[Placed]:
        """(number of its first sample, frame) of each frame: counted on, until a time stamp tells of a gap."""
        for frame in frames:
            if frame.sample_rate != self.source_rate:
                raise DataError(
                    f"{self.name} changes its sample rate from {self.source_rate} to {frame.sample_rate} Hz"
                )
            if frame.pts is not None:
                stamped = (frame.time - self.start) * self.source_rate
                if abs(stamped - at) > (WOBBLE + self._track.tick) * self.source_rate:
                    at = round(stamped)
            yield at, frame
            at += frame.samples


def choose(planes: np.ndarray, channel: str | int, name: str) -> np.ndarray:
    """float32 (channels, S) -> (S,); see `decode_audio`.

    Raises:
        DataError: for a number past the last channel.
    """
    if channel == "mean":
        return planes[0] if len(planes) == 1 else planes.mean(axis=0)
    number = (
        {"left": 0, "right": min(1, len(planes) - 1)}.get(channel, channel) if isinstance(channel, str) else channel
    )
    if not isinstance(number, int) or number >= len(planes):
        raise DataError(f"{name} has {len(planes)} channels, numbered from 0, and audio.channel = {channel} is none")
    return planes[number]


def cancels(cell: Any, seconds: float) -> bool:
    """Whether so many seconds of a sound are lost in the mean of its channels: below a tenth of the loudest of them.

    Raises:
        DataError: for what cannot be decoded.
    """
    with open_sound(cell) as sound:
        if sound.channels == 1:
            return False
        wave, _ = sound.read(sound.start, sound.source_rate, seconds)
        channels = sound.channels
    loudest = 0.0
    for channel in range(channels):
        with open_sound(cell, channel) as sound:
            own, _ = sound.read(sound.start, sound.source_rate, seconds)
        loudest = max(loudest, float(own.square().mean()))
    return float(wave.square().mean()) < CANCELED**2 * loudest


def to_float(array: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1]; integers are divided by half their type's range."""
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    half = 2.0 ** (8 * array.dtype.itemsize - 1)
    return ((array - half if array.dtype.kind == "u" else array) / half).astype(np.float32)


def resample(sound: np.ndarray, source: int, rate: int) -> np.ndarray:
    """Change the sample rate with FFmpeg's polyphase filter; sample 0 stays sample 0.

    Args:
        sound: float32 (S,).
        source: its sample rate in Hz.
        rate: the sample rate wanted, in Hz.

    Raises:
        DataError: where FFmpeg has no filter for the two rates.
    """
    if source == rate:
        return sound
    import av

    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[None]), format="fltp", layout="mono")
    frame.sample_rate = source
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
    try:
        parts = [part.to_ndarray()[0] for given in (frame, None) for part in resampler.resample(given)]
    except av.error.FFmpegError as error:
        raise DataError(f"cannot resample a sound from {source} to {rate} Hz: {sentence(error)}") from error
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
