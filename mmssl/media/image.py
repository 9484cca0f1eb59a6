"""Encoded or decoded pictures to a square of RGB bytes.

A random crop of the whole picture is cut from a square to which it was squeezed, in both directions on its own, with
its aspect ratio beside it: a batch has one shape, no side is lost, and the crop is stretched back where it is cut.
JPEG files that store colors coarser in one direction than in the other are made coarse in both (`mmssl.media.chroma`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmssl.errors import DataError
from mmssl.media.cell import open_cell, sentence
from mmssl.media.chroma import coarsen_chroma, finer_direction

Fit = Literal["crop", "pad"]
Alpha = Literal["white", "ignore"]

# What Pillow may take a file for, as far as it was built with it; others (PostScript, PDF, WMF) start programs.
Image.init()
FORMATS: list[str] = [
    name
    for name in (
        *(
            "JPEG",
            "PNG",
            "WEBP",
            "BMP",
            "DIB",
            "GIF",
            "TIFF",
            "AVIF",
            "JPEG2000",
            "PPM",
            "TGA",
            "ICO",
            "PCX",
            "QOI",
            "PSD",
        ),
        *("SGI", "ICNS"),
    )
    if name in Image.OPEN
]
MAX_PIXELS = 2**26


def decode_image(
    cell: Any,
    size: int,
    fit: Fit = "crop",
    *,
    extent: tuple[float, float] | None = None,
    alpha: Alpha = "white",
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Decode one picture, upright as its EXIF says, the first frame where it has several.

    Args:
        cell: bytes, a path, `{"bytes", "path"}`, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
            uint8, uint16, bool, or floats in [0, 1].
        size: side of the square in pixels.
        fit: `crop` scales the short side to `size` and cuts the center; `pad` scales the long side and adds white.
        extent: stored values that are black and white, in pictures of more than 8 bits a value: (0, 4095) where 12 bits
            are stored in 16. Without it all of the type's values are, and floats have to lie in [0, 1].
        alpha: what a fourth band is: transparency, shown on `white`, or something to `ignore`, such as infrared.
        max_pixels: most pixels that are decoded (a small file may hold a huge picture).

    Returns:
        uint8 (3, size, size), RGB.

    Raises:
        DataError: naming the picture and what is wrong with it.
    """
    return _planes(fit_image(_upright(cell, size, extent, alpha, max_pixels), size, fit))


def decode_squeezed(
    cell: Any,
    size: int,
    *,
    extent: tuple[float, float] | None = None,
    alpha: Alpha = "white",
    max_pixels: int = MAX_PIXELS,
) -> tuple[Tensor, float]:
    """Decode one picture whole, each of its two sides resized to `size` with antialiasing.

    Random crops are cut from it as from the file (`mmssl.ops.augment.draw_crops`). With `size` twice that of the crop
    as few of them are enlarged as when they are cut from ImageNet's files, of 469 x 387 pixels on average.

    Args:
        cell: see `decode_image`.
        size: side of the square in pixels.
        extent: see `decode_image`.
        alpha: see `decode_image`.
        max_pixels: see `decode_image`.

    Returns:
        uint8 (3, size, size), RGB; and the aspect ratio of the picture, its width over its height.

    Raises:
        DataError: naming the picture and what is wrong with it.
    """
    image = _upright(cell, size, extent, alpha, max_pixels)
    # It is resized once more where it is cut: Lanczos' filter takes a third of the detail that a bicubic one does.
    square = image.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return _planes(np.array(square)), image.width / image.height


def _upright(cell: Any, size: int, extent: tuple[float, float] | None, alpha: Alpha, max_pixels: int) -> Image.Image:
    """The whole picture in RGB, a JPEG of more than twice `size` pixels at a fraction of its own; `decode_image`."""
    image, name = open_image(cell, extent)
    finer = finer_direction(image)
    # JPEG decodes at a fraction of its size for less; twice the target keeps the resize antialiased.
    image.draft(None if finer == (1, 1) else "YCbCr", (2 * size, 2 * size))
    if image.width * image.height > max_pixels:
        raise DataError(
            f"{name} has {image.width} x {image.height} pixels, more than data.image.max_pixels = {max_pixels}"
        )
    if extent is not None and is_cut_to_8_bits(image):
        raise DataError(
            f"{name} has 16 bits in each of several bands, of which the upper 8 are read: data.image.extent says "
            "nothing of them; convert it to 8 bits"
        )
    try:
        image = image if finer == (1, 1) else coarsen_chroma(image, finer)
        upright = to_rgb(ImageOps.exif_transpose(image), extent, alpha)
        upright.load()
    except Exception as error:
        raise DataError(f"cannot decode {name}: {_reason(error)}") from error
    return upright


def _planes(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W); NumPy makes planes of colors in two thirds of the time that torch takes."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def open_image(cell: Any, extent: tuple[float, float] | None = None, kind: str = "image") -> tuple[Image.Image, str]:
    """A picture as Pillow opens it, not yet decoded where it is a file, and what to call it; see `decode_image`."""
    if isinstance(cell, Image.Image):
        return cell, kind
    if isinstance(cell, Mapping) and isinstance(cell.get("array"), np.ndarray):
        cell = cell["array"]
    if isinstance(cell, np.ndarray):
        return _from_array(cell, extent), kind
    source, name = open_cell(cell, kind)
    try:
        return Image.open(source, formats=FORMATS), name
    except Exception as error:  # Pillow's decoders raise anything on hostile bytes.
        raise DataError(f"cannot read {name}: {_reason(error)}") from error


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a picture when it is upright, as its EXIF says."""
    turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def is_cut_to_8_bits(image: Image.Image) -> bool:
    """Whether a file stores 16 bits a band and Pillow reads the upper 8 of them, as it does where there are several."""
    return image.mode[0] != "I" and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def to_rgb(image: Image.Image, extent: tuple[float, float] | None = None, alpha: Alpha = "white") -> Image.Image:
    """Any Pillow mode as RGB; see `decode_image`.

    Raises:
        DataError: for pixels of a range nobody states (floats, more than 16 bits), or that are not finite.
    """
    if image.mode[0] in "IF":  # 16 bits, 32 bits or floats, of one band
        if extent is None and image.mode == "F":
            raise DataError("an image of floating-point pixels has no stated range; name it with data.image.extent")
        values, clear = np.asarray(image), image.info.get("transparency")
        if not np.isfinite(values).all():
            raise DataError("some of its pixels are no finite numbers")
        if extent is None and (values.min() < 0 or values.max() > 65_535):
            raise DataError(
                f"its pixels, from {values.min()} to {values.max()}, are beyond 16 bits; name their range with "
                "data.image.extent"
            )
        gray = _bytes(values, extent or (0, 65_535))
        if alpha == "white" and isinstance(clear, int):
            gray[values == clear] = 255
        return Image.fromarray(gray).convert("RGB")
    if image.has_transparency_data:
        if alpha == "ignore":
            image.info.pop("transparency", None)
            return image.convert("RGB")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _bytes(values: np.ndarray, extent: tuple[float, float]) -> np.ndarray:
    """Values from the first of `extent` to the second as 0 to 255, those beyond cut."""
    low, high = extent
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)


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
    source, extent, corner = placement(image.width, image.height, size, fit, aspect)
    shown = image.resize(extent, Image.Resampling.BICUBIC, box=source, reducing_gap=2.0)
    if fit == "crop":
        return np.array(shown)
    square = Image.new("RGB", (size, size), "white")
    square.paste(shown, corner)
    return np.array(square)


class Placement(NamedTuple):
    """Where what is seen of a picture stands in the square.

    Attributes:
        source: left, top, right, bottom of the part of the picture that is seen, in its pixels.
        extent: width and height of that part in the square, in whole pixels.
        corner: its left upper corner there.
    """

    source: tuple[float, float, float, float]
    extent: tuple[int, int]
    corner: tuple[int, int]


def placement(width: int, height: int, size: int, fit: Fit, aspect: float = 1.0) -> Placement:
    """How a picture of `width` x `height` pixels comes to stand in the square; see `fit_image`."""
    wide, high = width * aspect, float(height)
    if fit == "crop":
        side = min(wide, high)
        # Whole pixels: half of one would blur a picture that has the right size already, in one direction only.
        left, top = (wide - side) // 2, (high - side) // 2
        box = (left / aspect, top, (left + side) / aspect, top + side)
        # Rounding may put the far edge a hair outside, which Pillow refuses.
        return Placement((box[0], box[1], min(box[2], width), min(box[3], height)), (size, size), (0, 0))
    scale = size / max(wide, high)
    extent = (max(1, round(wide * scale)), max(1, round(high * scale)))
    return Placement((0, 0, width, height), extent, ((size - extent[0]) // 2, (size - extent[1]) // 2))


def _from_array(array: np.ndarray, extent: tuple[float, float] | None) -> Image.Image:
    channels = array.shape[2:] or (1,)
    if array.ndim not in (2, 3) or channels[0] not in (1, 3, 4) or not array.size:
        raise DataError(f"an image array should be (H, W) or (H, W, 1, 3 or 4), not {array.shape}")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or (extent is None and not (array.min() >= 0 and array.max() <= 1)):
            raise DataError(
                f"an image array of {array.dtype} should lie in [0, 1]; data.image.extent names another range"
            )
        array = _bytes(array, extent or (0, 1))
    elif array.dtype == np.uint16:
        array = _bytes(array, extent or (0, 65_535))
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        raise DataError(f"an image array should be uint8, uint16, bool or float, not {array.dtype}")
    pixels = np.ascontiguousarray(array, dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and channels == (1,) else pixels)


def _reason(error: BaseException) -> str:
    """Without the memory address that Pillow prints for bytes it cannot identify."""
    return sentence(error).partition(" <_io.")[0]
