"""JPEG files whose colors are coarser in one direction than in the other: as coarse in both once they are decoded.

Files of the kind 4:2:2 store half as many color samples across as down, and so show which way is up: a small network
tells quarter turns of noise from such files at 40 to 50 % where guessing gives 25 %. Most files are 4:2:0, coarse in
both directions, or 4:4:4, fine in both, and stay as they are.
"""

from __future__ import annotations

from PIL import Image, JpegImagePlugin


def finer_direction(image: Image.Image) -> tuple[int, int]:
    """How much finer a file stores colors across and down than in the coarser of the two: (1, 2) for 4:2:2.

    (1, 1) where both are alike, where the file has no colors of their own, and for what is no JPEG file.
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.layers != 3:
        return 1, 1
    across, down = (
        max(sampling) // min(sampling) for sampling in zip(*(layer[1:3] for layer in image.layer), strict=True)
    )
    return max(1, down // across), max(1, across // down)


def coarsen_chroma(image: Image.Image, factor: tuple[int, int]) -> Image.Image:
    """Colors averaged over `factor` pixels across and down, and laid over the brightness again.

    What an encoder and a decoder do to colors of half the resolution: means of neighbors, then linear interpolation.

    Args:
        image: YCbCr, or what Pillow makes YCbCr of.
        factor: whole numbers; see `finer_direction`.

    Returns:
        YCbCr, with the `info` of the picture, in which its orientation is.
    """
    luma, *colors = image.convert("YCbCr").split()
    coarse = [color.reduce(factor).resize(color.size, Image.Resampling.BILINEAR) for color in colors]
    merged = Image.merge("YCbCr", (luma, *coarse))
    merged.info = image.info
    return merged
