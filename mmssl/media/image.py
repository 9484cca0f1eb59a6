"""Encoded or decoded pictures to a square of RGB bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmssl.errors import DataError
from mmssl.media.cell import open_cell, sentence

Fit = Literal["crop", "pad"]


def decode_image(cell: Any, size: int, fit: Fit = "crop") -> Tensor:
    """Decode one picture, upright as its EXIF says, transparency on white, the first frame where it has several.

    Args:
        cell: bytes, a path, `{"bytes", "path"}`, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
            uint8, uint16, bool, or floats in [0, 1].
        size: side of the square in pixels.
        fit: `crop` scales the short side to `size` and cuts the center; `pad` scales the long side and adds white.

    Returns:
        uint8 (3, size, size), RGB.

    Raises:
        DataError: naming the picture and what is wrong with it.
    """
    if isinstance(cell, Image.Image):
        image, name = cell, "image"
    elif isinstance(cell, np.ndarray):
        image, name = _from_array(cell), "image"
    elif isinstance(cell, Mapping) and isinstance(cell.get("array"), np.ndarray):
        image, name = _from_array(cell["array"]), "image"
    else:
        source, name = open_cell(cell, "image")
        try:
            image = Image.open(source)
            # JPEG decodes at a fraction of its size for less; twice the target keeps the resize antialiased.
            image.draft(None, (2 * size, 2 * size))
        except Exception as error:  # Pillow's decoders raise anything on hostile bytes.
            raise DataError(f"cannot read {name}: {_reason(error)}") from error
    try:
        pixels = fit_image(to_rgb(ImageOps.exif_transpose(image)), size, fit)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot decode {name}: {_reason(error)}") from error
    # NumPy makes planes of colors in two thirds of the time that torch takes.
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB, transparency composited on white; 16-bit values keep their upper byte.

    Raises:
        DataError: for pixels of a range nobody states (floats).
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65_535)
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise DataError("an image of floating-point pixels has no stated range; save it with 8 or 16 bits")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def fit_image(image: Image.Image, size: int, fit: Fit, aspect: float = 1.0) -> np.ndarray:
    """Resize isotropically with antialiasing to a square.

    Args:
        image: RGB.
        size: side of the square in pixels.
        fit: see `decode_image`.
        aspect: width of a pixel over its height, as it is shown.

    Returns:
        uint8 (size, size, 3).
    """
    width, height = image.width * aspect, float(image.height)
    if fit == "crop":
        side = min(width, height)
        # Whole pixels: half of one would blur a picture that has the right size already, in one direction only.
        left, top = (width - side) // 2, (height - side) // 2
        box = (left / aspect, top, (left + side) / aspect, top + side)
        # Rounding may put the far edge a hair outside, which Pillow refuses.
        box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
        square = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        return np.array(square)
    scale = size / max(width, height)
    extent = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = Image.new("RGB", (size, size), "white")
    place = ((size - extent[0]) // 2, (size - extent[1]) // 2)
    square.paste(image.resize(extent, Image.Resampling.BICUBIC, reducing_gap=2.0), place)
    return np.array(square)


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2:] or (1,)
    if array.ndim not in (2, 3) or channels[0] not in (1, 3, 4) or not array.size:
        raise DataError(f"an image array should be (H, W) or (H, W, 1, 3 or 4), not {array.shape}")
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # also false for NaN
            raise DataError(f"an image array of {array.dtype} should lie in [0, 1]")
        array = (array * 255).round()
    elif array.dtype == np.uint16:
        array = (array / 257).round()
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        raise DataError(f"an image array should be uint8, uint16, bool or float, not {array.dtype}")
    pixels = np.ascontiguousarray(array, dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and channels == (1,) else pixels)


def _reason(error: BaseException) -> str:
    """Without the memory address that Pillow prints for bytes it cannot identify."""
    return sentence(error).partition(" <_io.")[0]
