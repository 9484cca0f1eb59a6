"""Masks: class numbers that stand where their picture's pixels do, whatever its shape, and sentences for others."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.errors import DataError
from mmssl.media.image import decode_image
from mmssl.media.mask import IGNORED, Frame, decode_mask


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramps(width: int, height: int) -> tuple[bytes, bytes, bytes]:
    """A picture whose red is the column and whose green is the row, and masks of the column and of the row."""
    row, column = np.indices((height, width), dtype=np.uint8)
    picture = np.stack([column, row, np.full_like(row, 128)], axis=2)
    return tuple(encoded(Image.fromarray(one)) for one in (picture, column, row))


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize(("width", "height"), [(200, 120), (120, 200), (161, 97), (64, 64), (37, 150)])
@pytest.mark.parametrize("size", [24, 33, 120])
def test_a_class_stands_where_its_pixel_does(fit, width, height, size):
    picture, *masks = ramps(width, height)
    seen = decode_image(picture, size, fit)
    frame = Frame.of(picture, size, fit)
    scale = (min if fit == "crop" else max)(width, height) / size
    for channel, mask in zip(seen[:2], masks, strict=True):
        found = decode_mask(mask, frame)
        assert found.shape == (size, size)
        inside = found != IGNORED
        # Pixels of the square average a neighborhood whose center is the mask's pixel, half a pixel off at most.
        away = (found[inside].float() - channel[inside].float()).abs()
        edge = (found[inside] < 3 * scale) | (found[inside] > found[inside].max() - 3 * scale)
        assert away[~edge].amax() <= 1.01 if (~edge).any() else size == 24
        assert away.mean() < 0.8
        assert (seen[:, ~inside] == 255).all()  # white that `pad` adds is of no class
        assert bool((~inside).any()) is (fit == "pad" and abs(width - height) * size >= max(width, height))


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (31, 30)])
def test_at_its_own_size_every_pixel_is_that_of_the_picture(fit, width, height):
    picture, *masks = ramps(width, height)
    size = (min if fit == "crop" else max)(width, height)
    seen, frame = decode_image(picture, size, fit), Frame.of(picture, size, fit)
    for channel, mask in zip(seen[:2], masks, strict=True):
        found = decode_mask(mask, frame)
        assert torch.equal(found[found != IGNORED], channel[found != IGNORED])


def test_nearest_is_that_of_the_pixel_at_the_center():
    mask = np.random.default_rng(0).integers(0, 5, (70, 130), dtype=np.uint8)
    found = decode_mask(encoded(Image.fromarray(mask)), Frame(130, 70, 28, "crop"))
    places = np.floor((np.arange(28) + 0.5) * 70 / 28).astype(int)
    assert np.array_equal(found, mask[places][:, 30 + places])


def test_a_mask_may_have_another_number_of_pixels_than_its_picture():
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    large = decode_mask(encoded(Image.fromarray(mask.repeat(10, 0).repeat(10, 1))), Frame(40, 30, 12, "pad"))
    assert torch.equal(large, decode_mask(encoded(Image.fromarray(mask)), Frame(40, 30, 12, "pad")))


def test_a_turned_picture_is_seen_as_its_mask():
    picture, column, _ = ramps(60, 40)
    upright = Image.open(io.BytesIO(picture)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned = encoded(upright, "JPEG", exif=exif, quality=100, subsampling=0)
    frame = Frame.of(turned, 40, "crop")
    assert frame[:2] == (60, 40)
    found, seen = decode_mask(column, frame).float(), decode_image(turned, 40)[0].float()
    assert (found - seen).abs().mean() < 2


@pytest.mark.parametrize(
    "numbers",
    [
        Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8)),
        Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8)).convert("RGB"),
        Image.fromarray(np.array([[0, 1], [2, 255]], np.uint16)),
        Image.fromarray(np.array([[0, 1], [2, 255]], np.int32)),
    ],
)
def test_numbers_are_read_from_any_band(numbers):
    assert decode_mask(numbers).tolist() == [[0, 1], [2, 255]]
    assert decode_mask(encoded(numbers, "TIFF")).tolist() == [[0, 1], [2, 255]]


def test_the_colors_of_a_palette_mean_nothing():
    mask = Image.fromarray(np.array([[0, 3]], np.uint8), "P")
    mask.putpalette([9, 9, 9] * 256)
    assert decode_mask(encoded(mask)).tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        (encoded(Image.new("RGB", (4, 4), "red")), "one band of class numbers, and is 4x4x3 of uint8"),
        (encoded(Image.new("L", (4, 4)), "JPEG"), "is a JPEG"),
        (encoded(Image.fromarray(np.full((4, 4), 300, np.uint16))), "class numbers from 300 to 300"),
        (np.full((4, 4), -1), "from -1"),
        (np.zeros((4, 4)), "float64"),
        (encoded(Image.new("L", (4, 8))), "4 x 8 pixels, and its picture 4 x 4, of another shape"),
        (encoded(Image.effect_noise((4, 4), 9))[:45], "cannot decode mask"),
        (b"no picture", "cannot read mask"),
        ("nowhere.png", "there is no mask file 'nowhere.png'"),
    ],
)
def test_what_is_no_mask_is_told_in_a_sentence(cell, sentence):
    with pytest.raises(DataError, match=sentence):
        decode_mask(cell, Frame(4, 4, 4, "crop"))
    with pytest.raises(DataError, match="max_pixels = 15"):
        decode_mask(Image.new("L", (4, 4)), max_pixels=15)
