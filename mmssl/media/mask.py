"""Class numbers of pixels, and boxes, in the square in which an encoder sees their picture.

Nothing is interpolated: the class of a pixel of the square is that of the pixel of the mask at its center.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmssl.errors import DataError
from mmssl.media.cell import sentence
from mmssl.media.image import MAX_PIXELS, Fit, Placement, open_image, placement, shown_size
from mmssl.media.outlines import Outlines
from mmssl.media.video import open_pictures

IGNORED = 255
"""The class number of pixels that say nothing: as in PASCAL VOC those at outlines, here also those beyond a picture."""


class Frame(NamedTuple):
    """How a picture is seen.

    Attributes:
        width: of the picture as it is shown, in pixels.
        height: likewise.
        size: side of the square to which it is decoded, in pixels.
        fit: see `mmssl.media.image.decode_image`.
    """

    width: int
    height: int
    size: int
    fit: Fit

    @classmethod
    def of(cls, cell: Any, size: int, fit: Fit, extent: tuple[float, float] | None = None) -> Self:
        """Of an encoded or decoded picture, of which no more than the head is read; see `decode_image`.

        Raises:
            DataError: where there is no picture.
        """
        width, height = shown_size(open_image(cell, extent)[0])
        return cls(width, height, size, fit)

    @classmethod
    def of_clip(cls, cell: Any, size: int, fit: Fit) -> Self:
        """Of a clip, whose first picture is decoded; see `decode_video`.

        Raises:
            DataError: where there is none.
        """
        with open_pictures(cell) as pictures:
            first = next((picture for _, picture in pictures.timed(pictures.start, seek=False)), None)
            if first is None:
                raise DataError(f"{pictures.name} has no picture")
            image, aspect = pictures.image(first)
        return cls(max(1, round(image.width * aspect)), image.height, size, fit)

    @property
    def placement(self) -> Placement:
        """Where it stands in the square."""
        return placement(self.width, self.height, self.size, self.fit)

    def place(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4), left, top, right, bottom, in pixels of the picture -> in those of the square, uncut."""
        source, extent, corner = self.placement
        scale = np.array(extent) / (np.array(source[2:]) - source[:2])
        return boxes * np.tile(scale, 2) + np.tile(corner - np.array(source[:2]) * scale, 2)

    def boxes_in_picture(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) in pixels of the square -> in those of the picture, cut at its edges; undoes `place`."""
        source, extent, corner = self.placement
        scale = np.array(extent) / (np.array(source[2:]) - source[:2])
        found = (boxes - np.tile(corner, 2)) / np.tile(scale, 2) + np.tile(source[:2], 2)
        return found.clip(0, np.tile([self.width, self.height], 2))

    def mask_in_picture(self, square: np.ndarray) -> np.ndarray:
        """Class numbers of the square, uint8 (size, size) -> those of the picture, uint8 (height, width).

        The class of a pixel is that of the square's pixel in which its center lies; of what the square leaves out it is
        `IGNORED`.
        """
        source, extent, corner = self.placement
        places, seen = [], []
        for axis, length in enumerate((self.width, self.height)):
            scale = extent[axis] / (source[2 + axis] - source[axis])
            place = np.floor((np.arange(length) + 0.5 - source[axis]) * scale).astype(np.int64)
            seen.append((place >= 0) & (place < extent[axis]))
            places.append((place + corner[axis]).clip(0, self.size - 1))
        found = square[np.ix_(places[1], places[0])]
        found[~seen[1]] = IGNORED
        found[:, ~seen[0]] = IGNORED
        return found


def palette() -> list[int]:
    """Red, green and blue of every class number in turn, as PASCAL VOC paints them: bits of the number, spread."""
    return [
        sum(((number >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
        for number in range(IGNORED + 1)
        for channel in range(3)
    ]


def decode_mask(cell: Any, frame: Frame | None = None, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a mask as its picture is decoded.

    Args:
        cell: as for `decode_image`, of one band that holds class numbers (a palette's colors mean nothing); an array
            (H, W) of whole numbers; or outlines. A mask may have fewer or more pixels than its picture, of which it
            shows all.
        frame: of the picture; the mask as it is where there is none.
        max_pixels: most pixels that are decoded.

    Returns:
        uint8 (size, size) of class numbers from 0; `IGNORED` is that of pixels without a class.

    Raises:
        DataError: naming the mask and what is wrong with it.
    """
    numbers, name = _class_numbers(cell, max_pixels)
    if frame is None:
        return torch.from_numpy(numbers.copy())
    height, width = numbers.shape
    if abs(width * frame.height - height * frame.width) > max(frame.width, frame.height):  # by more than a pixel
        raise DataError(
            f"{name} has {width} x {height} pixels, and its picture {frame.width} x {frame.height}, of another shape"
        )
    source, extent, (left, top) = placement(width, height, frame.size, frame.fit)
    shown = Image.fromarray(numbers).resize(extent, Image.Resampling.NEAREST, box=source)
    square = np.full((frame.size, frame.size), IGNORED, np.uint8)
    square[top : top + extent[1], left : left + extent[0]] = np.asarray(shown)
    return torch.from_numpy(square)


def _class_numbers(cell: Any, max_pixels: int) -> tuple[np.ndarray, str]:
    """uint8 (H, W), and what to call it."""
    if isinstance(cell, Outlines):
        values, name = cell.draw(), "mask"
    elif isinstance(cell, np.ndarray):
        values, name = cell, "mask"
    else:
        image, name = open_image(cell, kind="mask")
        if image.format == "JPEG":
            raise DataError(f"{name} is a JPEG, which changes class numbers; write masks as PNG")
        if image.width * image.height > max_pixels:
            raise DataError(
                f"{name} has {image.width} x {image.height} pixels, more than data.image.max_pixels = {max_pixels}"
            )
        try:
            values = np.asarray(ImageOps.exif_transpose(image))
        except Exception as error:  # Pillow's decoders raise anything on hostile bytes.
            raise DataError(f"cannot decode {name}: {sentence(error)}") from error
    if values.ndim == 3 and values.shape[2] >= 3 and (values[..., :1] == values[..., :3]).all():
        values = values[..., 0]  # gray that was saved as RGB
    whole = values.dtype == bool or np.issubdtype(values.dtype, np.integer)
    if values.ndim != 2 or not whole or not values.size:
        raise DataError(
            f"{name} should be one band of class numbers, and is {'x'.join(map(str, values.shape))} of {values.dtype}; "
            "where colors stand for classes, write the numbers of these"
        )
    if values.min() < 0 or values.max() > IGNORED:
        raise DataError(f"{name} holds class numbers from {values.min()} to {values.max()}; they go from 0 to 254")
    return values.astype(np.uint8), name
