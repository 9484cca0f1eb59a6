"""Moving pictures to a window of square frames at the recipe's frame rate, on the container's clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from numbers import Real
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmssl.errors import DataError
from mmssl.media.image import Fit, fit_image, to_rgb
from mmssl.media.track import Track, window_start

# A video whose header promises this many seconds more than it holds is reported as truncated.
MISSING = 0.5
# Key frames are seldom less than this many seconds apart: what lies nearer than that is decoded through.
NEAR = 1.0


def decode_video(
    cell: Any,
    size: int,
    fps: float,
    frames: int,
    window: float | Sequence[float] = 0.0,
    fit: Fit = "crop",
    center: float | None = None,
) -> Tensor:
    """Decode a window of a video: at each instant the picture that is on the screen.

    Args:
        cell: bytes, a path or `{"bytes", "path"}` of any container, or `{"frames", "fps"}` with uint8 (T, H, W, 3).
        size: side of the square in pixels.
        fps: frame rate wanted, in 1/s.
        frames: number of frames, T; past the end of the video the last picture stays.
        window: which part of a longer video, in [0, 1]: 0 is the start, 0.5 the middle. Several, ascending, are read in
            one pass and give a first dimension of as many.
        fit: `crop` scales the short side to `size` and cuts the center; `pad` scales the long side and adds white.
        center: the second that is in the middle of the window, in place of `window`; see `window_start`.

    Returns:
        uint8 (T, 3, size, size), RGB, turned and stretched as the container says.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    with open_pictures(cell) as pictures:
        if isinstance(window, Sequence):
            starts = [window_start([pictures], frames / fps, one, center) for one in window]
            return pictures.read_windows(starts, size, fps, frames, fit)
        return pictures.read(window_start([pictures], frames / fps, window, center), size, fps, frames, fit)


def open_pictures(cell: Any) -> Pictures:
    """The pictures of a cell; see `decode_video`."""
    if isinstance(cell, Mapping) and "frames" in cell:
        return ArrayPictures(cell["frames"], cell.get("fps"))
    if isinstance(cell, np.ndarray):
        raise DataError('a video array needs its frame rate: expected {"frames": ..., "fps": ...}')
    return ContainerPictures(cell)


class Pictures:
    """Pictures with a clock; a subclass says where they come from.

    Attributes:
        start, end: seconds on the clock.
        tolerance: seconds by which a picture may come late and still count as on time.
        seekable: whether pictures further on can be reached without those before them.
    """

    name = "video"
    start: float
    end: float
    tolerance: float = 1e-6
    seekable: bool = True

    def timed(self, start: float, seek: bool) -> Iterator[tuple[float, Any]]:
        """(time, picture) in order, the first one not after `start`."""
        raise TypeError(f"{type(self).__name__} has no pictures")

    def image(self, picture: Any) -> tuple[Image.Image, float]:
        """A picture as upright RGB, and the width of its pixels over their height."""
        raise TypeError(f"{type(self).__name__} has no pictures")

    def read(self, start: float, size: int, fps: float, frames: int, fit: Fit = "crop", seek: bool = True) -> Tensor:
        """The window from `start`; see `decode_video`.

        `seek=False` decodes a container from its beginning; the result is the same.
        """
        return self._read([start], size, fps, frames, fit, seek)[0]

    def read_windows(self, starts: Sequence[float], size: int, fps: float, frames: int, fit: Fit = "crop") -> Tensor:
        """Windows from ascending `starts`: uint8 (W, T, 3, size, size); see `read`."""
        parts, close = list[Tensor](), list[float]()
        for start in starts:
            # What lies between windows is decoded, too, where a seek would decode as much or is not to be trusted.
            if close and self.seekable and start - NEAR > close[-1] + frames / fps:
                parts.append(self._read(close, size, fps, frames, fit, True))
                close = []
            close.append(start)
        return torch.cat([*parts, self._read(close, size, fps, frames, fit, True)])

    def _read(self, starts: Sequence[float], size: int, fps: float, frames: int, fit: Fit, seek: bool) -> Tensor:
        """Windows from ascending `starts` in one pass, (W, T, 3, size, size)."""
        due = sorted(
            (start + k / fps + self.tolerance, w * frames + k) for w, start in enumerate(starts) for k in range(frames)
        )
        shown: list[np.ndarray] = []
        current: Any = None
        square: np.ndarray | None = None
        for time, picture in chain(self.timed(starts[0], seek), [(float("inf"), None)]):
            while current is not None and len(shown) < len(due) and due[len(shown)][0] < time:
                if square is None:
                    image, aspect = self.image(current)
                    square = fit_image(image, size, fit, aspect)
                shown.append(square)
            if len(shown) == len(due):
                break
            current, square = picture, None
        place = np.argsort([number for _, number in due])
        squares = torch.from_numpy(np.stack(shown)[place]).unflatten(0, (len(starts), frames))
        return squares.permute(0, 1, 4, 2, 3).contiguous()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the decoder, where there is one."""


class ArrayPictures(Pictures):
    """Pictures that are decoded already; their clock starts at the first."""

    def __init__(self, frames: Any, fps: Any) -> None:
        array = np.asarray(frames)
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not array.size:
            raise DataError(f"a video array should be uint8 (T, H, W, 3), not {array.dtype} {array.shape}")
        rate = float(fps) if isinstance(fps, Real) else 0.0
        if not 0 < rate < float("inf"):
            raise DataError(f"a video array needs a frame rate in 1/s, found fps = {fps!r}")
        self._array, self._fps = array, rate
        self.start, self.end = 0.0, len(array) / rate

    def timed(self, start: float, seek: bool) -> Iterator[tuple[float, Any]]:
        """See `Pictures.timed`."""
        first = max(0, int(start * self._fps) - 1)
        return ((k / self._fps, self._array[k]) for k in range(first, len(self._array)))

    def image(self, picture: Any) -> tuple[Image.Image, float]:
        """See `Pictures.image`."""
        return Image.fromarray(np.ascontiguousarray(picture)), 1.0


class ContainerPictures(Pictures):
    """The video track of a container."""

    def __init__(self, cell: Any) -> None:
        from av.video.reformatter import VideoReformatter

        self._track = track = Track(cell, "video")
        self.name, self.start, self.end = track.name, track.start, track.end
        # Of the first frame for all: every frame that is asked holds on to itself, until garbage is collected.
        self._matrix = display_matrix(track.head[0])
        # A frame's own `to_ndarray(format=...)` prepares the conversion anew, which costs more than small frames do.
        self._converter = VideoReformatter()
        # Time stamps are rounded, in Matroska to milliseconds.
        self.tolerance = track.tick / 2 + 1e-6
        self.seekable = track.seekable

    def close(self) -> None:
        """Free the decoder."""
        self._track.close()

    def timed(self, start: float, seek: bool) -> Iterator[tuple[float, Any]]:
        """See `Pictures.timed`."""
        frames = None
        if seek and self._track.seekable and start > self.start:
            # A key frame needs nothing before it, unlike a frame of sound. An index by decoding time may name one that
            # is shown shortly after `start`, hence the second try.
            tries = (self._resume(self._track.seek(start - back), start) for back in (0.0, NEAR))
            frames = next((found for found in tries if found is not None), None)
        last = None
        for frame in frames or self._track.straight():
            if frame.pts is not None:
                last = frame
                yield frame.time, frame
        held = last.time + float((last.duration or 0) * last.time_base) if last is not None else self.start
        if held + MISSING < start:
            raise DataError(f"{self.name} ends at {held:.2f} s, before its header says and before the window")

    def _resume(self, frames: Iterator[Any], start: float) -> Iterator[Any] | None:
        """Frames after a seek; None where they begin after `start`."""
        first = next(frames, None)
        return chain([first], frames) if first is not None and first.time <= start + self.tolerance else None

    def image(self, picture: Any) -> tuple[Image.Image, float]:
        """See `Pictures.image`."""
        aspect = float(self._track.stream.sample_aspect_ratio or 1)
        if any(component.is_alpha for component in picture.format.components):
            image = to_rgb(Image.fromarray(self._converter.reformat(picture, format="rgba", threads=1).to_ndarray()))
        else:
            image = Image.fromarray(self._converter.reformat(picture, format="rgb24", threads=1).to_ndarray())
        image, swapped = upright(image, self._matrix)
        return image, 1 / aspect if swapped else aspect


def display_matrix(frame: Any) -> np.ndarray | None:
    """The nine numbers that say how a frame of PyAV is turned, int32; None where it is not."""
    from av.sidedata.sidedata import Type

    found = next((bytes(data) for data in frame.side_data if data.type == Type.DISPLAYMATRIX), None)
    return None if found is None else np.frombuffer(found, np.int32)


def upright(image: Image.Image, matrix: np.ndarray | None) -> tuple[Image.Image, bool]:
    """The picture as a display matrix shows it, and whether width and height changed places.

    Of the matrix (ISO/IEC 14496-12, section 8.3.2; x' = a x + c y, y' = b x + d y) quarter turns and mirrors are
    followed, as players do; other angles are taken for the nearest of them.
    """
    if matrix is None:
        return image, False
    a, b, _, c, d, *_ = matrix
    swapped = abs(b) > abs(a)
    if swapped:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    if (c if swapped else a) < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if (b if swapped else d) < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image, bool(swapped)
