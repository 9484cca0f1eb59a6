"""Colors of JPEG files: as coarse down as across, whatever the file stores."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmssl.media.chroma import coarsen_chroma, finer_direction
from mmssl.media.image import decode_image

SIDE = 64


def jpeg(pixels: np.ndarray, sampling: str | None, **settings) -> bytes:
    stream = io.BytesIO()
    kept = {} if sampling is None else {"subsampling": sampling}
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, **kept, **settings)
    return stream.getvalue()


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def roughness(data: bytes) -> tuple[float, float]:
    """Mean squared difference of red less green between neighbors, across and down."""
    red, green, _ = decode_image(data, SIDE).double()
    difference = red - green
    return difference.diff(dim=1).square().mean().item(), difference.diff(dim=0).square().mean().item()


@pytest.mark.parametrize(
    ("sampling", "expected"), [("4:4:4", (1, 1)), ("4:2:0", (1, 1)), ("4:2:2", (1, 2)), ("4:1:1", (1, 4))]
)
def test_the_finer_direction_is_read_from_the_file(noise, sampling, expected):
    if sampling == "4:1:1":  # Pillow writes none; the factors stand in the header of any file
        image = Image.open(io.BytesIO(jpeg(noise, "4:4:4")))
        image.layer = [(1, 4, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]
    else:
        image = Image.open(io.BytesIO(jpeg(noise, sampling)))
    assert finer_direction(image) == expected


def test_what_has_no_colors_of_its_own_has_none(noise):
    assert finer_direction(Image.open(io.BytesIO(jpeg(noise[..., 0], None)))) == (1, 1)
    assert finer_direction(Image.fromarray(noise)) == (1, 1)


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:0"])
def test_other_files_are_decoded_as_they_are(noise, sampling):
    data = jpeg(noise, sampling)
    assert np.array_equal(decode_image(data, SIDE).permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(data))))


def test_no_direction_of_a_4_2_2_file_is_finer(noise):
    data = jpeg(noise, "4:2:2")
    stored = np.asarray(Image.open(io.BytesIO(data))).astype(float)
    difference = stored[..., 0] - stored[..., 1]
    across, down = (np.square(np.diff(difference, axis=axis)).mean() for axis in (1, 0))
    assert down > 2 * across
    across, down = roughness(data)
    assert down == pytest.approx(across, rel=0.1)
    assert (across, down) == pytest.approx(roughness(jpeg(noise, "4:2:0")), rel=0.1)


def test_the_filter_is_that_of_a_jpeg_codec(noise):
    """Colors that are alike across, in 4:4:4 and coarsened down, and the same file as 4:2:0."""
    stripes = np.repeat(noise[:, :1], SIDE, axis=1)
    fine, coarse = (Image.open(io.BytesIO(jpeg(stripes, kind))) for kind in ("4:4:4", "4:2:0"))
    for image in (fine, coarse):
        image.draft("YCbCr", image.size)
    found = np.asarray(coarsen_chroma(fine, (1, 2)))[..., 1:].astype(float)
    assert np.abs(found - np.asarray(coarse)[..., 1:]).mean() < 2


def test_it_is_turned_upright_after(noise):
    exif = Image.Exif()
    exif[274] = 6
    plain, turned = jpeg(noise, "4:2:2"), jpeg(noise, "4:2:2", exif=exif)
    expected = decode_image(plain, SIDE).rot90(-1, (1, 2))
    assert np.array_equal(decode_image(turned, SIDE), expected)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(turned))).size == (SIDE, SIDE)
