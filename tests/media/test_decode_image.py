"""Pictures: every mode and orientation comes out as the same square of RGB, and hostile bytes as one sentence."""

import io
import struct
import zlib
from pathlib import Path

import iscc_samples
import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.errors import DataError
from mmssl.media.image import decode_image, decode_squeezed

SAMPLES = sorted((Path(iscc_samples.__file__).parent / "files" / "image").iterdir())


def encode(image: Image.Image, kind: str, **settings) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def quadrants(size: int = 32) -> Image.Image:
    """Red, green, blue, white: tells every rotation and flip apart."""
    pixels = np.full((size, size, 3), 255, np.uint8)
    half = size // 2
    pixels[:half, :half] = (255, 0, 0)
    pixels[:half, half:] = (0, 255, 0)
    pixels[half:, :half] = (0, 0, 255)
    return Image.fromarray(pixels)


def means(x: torch.Tensor) -> torch.Tensor:
    return x.float().mean(dim=(1, 2))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_every_sample_shows_the_same_picture(path):
    reference = decode_image(SAMPLES[0], 48).float()
    found = decode_image(path.read_bytes(), 48)
    assert found.dtype == torch.uint8
    assert found.shape == (3, 48, 48)
    # GIF has 256 colors; the others differ by rounding.
    assert (found.float() - reference).abs().mean() < 8


def test_cells_of_every_kind_agree(tmp_path):
    data = encode(quadrants(), "png")
    (tmp_path / "a.png").write_bytes(data)
    expected = decode_image(data, 32)
    assert torch.equal(expected, torch.from_numpy(np.array(quadrants())).permute(2, 0, 1))
    array = np.array(quadrants())
    cells = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        quadrants(),
        array,
        array / 255,
        array.astype(np.uint16) * 257,
        {"array": array},
        bytearray(data),
    ]
    for cell in cells:
        assert torch.equal(decode_image(cell, 32), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    stored = {
        1: (),
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,),
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_270,),
    }[orientation]
    image = quadrants()
    for step in stored:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encode(image, "png", exif=exif), 32)
    assert torch.equal(found, decode_image(quadrants(), 32))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(mode):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 10, 20))
    if mode == "P":
        image = image.quantize(4)
    else:
        image = image.convert(mode)
    found = decode_image(encode(image, "png"), 20)
    assert (found[:, :, :10] < 3).all()
    assert (found[:, :, 10:] > 252).all()


def test_half_transparent_black_is_gray():
    found = decode_image(encode(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "png"), 8)
    assert (found == 127).all()


def test_transparent_color_of_a_png_is_white():
    found = decode_image(encode(Image.new("RGB", (8, 8), (10, 20, 30)), "png", transparency=(10, 20, 30)), 8)
    assert (found == 255).all()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_keep_their_brightness(kind):
    ramp = np.linspace(0, 65_535, 256).astype(np.uint16)[None].repeat(256, 0)
    found = decode_image(encode(Image.fromarray(ramp), kind), 256)
    assert (found[0].float() - torch.arange(256.0)).abs().max() <= 1


def test_gray_bilevel_and_cmyk():
    assert (decode_image(encode(Image.new("L", (9, 9), 77), "png"), 9) == 77).all()
    assert (decode_image(encode(Image.new("1", (9, 9), 1), "png"), 9) == 255).all()
    found = means(decode_image(encode(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "jpeg"), 9))
    assert (found - torch.tensor([255.0, 0, 0])).abs().max() < 4


def test_crop_keeps_proportions_and_the_center():
    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, 30:60] = 255
    for image in (wide, wide.transpose(1, 0, 2)):
        found = decode_image(image, 15)
        # The filter reaches a little over the edge of the square, as in resizing first and cutting then.
        assert (found[:, 1:-1, 1:-1] == 255).all()
        assert (found > 230).all()


def test_pad_keeps_everything_on_white():
    found = decode_image(np.zeros((10, 40, 3), np.uint8), 40, "pad")
    assert (found[:, 15:25] == 0).all()
    assert (found[:, :15] == 255).all()
    assert (found[:, 25:] == 255).all()


def test_a_squeezed_picture_is_whole_and_says_its_aspect():
    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, :45, 0], wide[:15, :, 1] = 255, 255
    found, aspect = decode_squeezed(wide, 40)
    assert (found.dtype, found.shape, aspect) == (torch.uint8, (3, 40, 40), 3.0)
    expected = torch.zeros(3, 40, 40)
    expected[0, :, :20], expected[1, :20] = 255, 255
    far = (torch.arange(40) - 19.5).abs() > 4  # from the edges, which are blurred
    assert (found[:, far][:, :, far] - expected[:, far][:, :, far]).abs().max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_aspect_is_that_of_the_upright_picture(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for shape in ((300, 100), (3000, 1000)):  # the larger one is decoded at a fraction of its size
        data = encode(Image.new("RGB", shape), "jpeg", exif=exif)
        assert decode_squeezed(data, 48)[1] == pytest.approx(3.0 if orientation < 5 else 1 / 3, rel=1e-2)


def test_a_large_jpeg_is_squeezed_from_a_fraction_of_its_size_without_loss():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (150, 200, 3), dtype=np.uint8)).resize((1600, 1200))
    data = encode(smooth, "jpeg", quality=95)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    expected = np.array(whole.resize((128, 128), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    error = decode_squeezed(data, 128)[0].float() - torch.from_numpy(expected)
    assert error.square().mean() < 255**2 * 10**-4.5  # 45 dB


def test_a_fine_pattern_becomes_gray():
    # Without antialiasing a checkerboard turns into black, white or stripes.
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    for found in (decode_image(np.stack([board] * 3, 2), 32), decode_squeezed(board[:, :100], 32)[0]):
        assert (found.float() - 127.5).abs().max() < 4


@pytest.mark.parametrize("size", [1, 2, 7, 224])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_extreme_sizes(size, fit):
    for shape in ((1, 1), (1, 500), (500, 1), (3, 2)):
        assert decode_image(Image.new("RGB", shape, "white"), size, fit).eq(255).all()
        assert decode_squeezed(Image.new("RGB", shape, "white"), size)[0].eq(255).all()


def bomb() -> bytes:
    """A PNG whose header promises 60,000 × 60,000 pixels."""
    data = bytearray(encode(Image.new("RGB", (4, 4)), "png"))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
PNG, JPEG = encode(Image.fromarray(NOISE), "png"), encode(Image.fromarray(NOISE), "jpeg")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "the image cell is empty"),
        ({"bytes": None, "path": None}, "the image cell is empty"),
        (b"", "is empty"),
        (b"not an image", "cannot read image of 12 bytes: cannot identify image file$"),
        (PNG[: len(PNG) // 2], "cannot decode image of .* bytes"),
        (JPEG[: len(JPEG) // 2], "cannot decode image of .* bytes"),
        ({"bytes": JPEG[:1000], "path": "cat.jpg"}, "image 'cat.jpg'"),
        ("/nowhere/cat.png", "there is no image file '/nowhere/cat.png'"),
        (bomb(), "exceeds limit"),
        (3.5, "cannot read image from float"),
        (np.zeros((3, 8, 8), np.uint8), r"should be \(H, W\)"),
        (np.zeros((0, 8, 3), np.uint8), r"should be \(H, W\)"),
        (np.full((8, 8, 3), 7.0), r"should lie in \[0, 1\]"),
        (np.full((8, 8, 3), np.nan), r"should lie in \[0, 1\]"),
        (np.zeros((8, 8, 3), np.int64), "not int64"),
        (Image.new("F", (8, 8)), "no stated range"),
    ],
    ids=range(16),
)
def test_what_cannot_be_read_is_one_sentence(cell, message):
    with pytest.raises(DataError, match=message) as caught:
        decode_image(cell, 16)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)


def test_a_file_without_bytes_is_empty(tmp_path):
    (tmp_path / "cat.png").touch()
    with pytest.raises(DataError, match=r"^image '.*cat\.png' is empty$"):
        decode_image(tmp_path / "cat.png", 16)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(1)
    for path in SAMPLES:
        data = path.read_bytes()[:60_000]
        for _ in range(6):
            damaged = bytearray(data[: rng.integers(1, len(data))])
            for at in rng.integers(0, len(damaged), 8):
                damaged[at] = rng.integers(256)
            try:
                assert decode_image(bytes(damaged), 16).shape == (3, 16, 16)
            except DataError:
                continue


def test_twelve_bits_in_sixteen_and_what_is_beyond():
    ramp = np.linspace(0, 4095, 256).astype(np.uint16)[None].repeat(256, 0)
    for cell in (encode(Image.fromarray(ramp), "png"), encode(Image.fromarray(ramp), "tiff"), ramp):
        assert decode_image(cell, 256).max() == 16
        found = decode_image(cell, 256, extent=(0, 4095))
        assert (found[0].float() - torch.arange(256.0)).abs().max() <= 1
        cut = decode_image(cell, 256, extent=(1000, 2000))
        assert (int(cut.min()), int(cut.max())) == (0, 255)
    kelvin = np.full((8, 8), 290.0, np.float32)
    for cell in (encode(Image.fromarray(kelvin), "tiff"), kelvin):
        with pytest.raises(DataError, match=r"data\.image\.extent"):
            decode_image(cell, 8)
        assert (decode_image(cell, 8, extent=(280, 300)) == 128).all()


@pytest.mark.parametrize(
    ("pixels", "extent", "words"),
    [
        (np.array([[0.5, np.nan]], np.float32), (0, 1), "no finite numbers"),
        (np.array([[0, 100_000]], np.int32), None, r"from 0 to 100000, are beyond 16 bits; .* data\.image\.extent"),
        (np.array([[-5, 7]], np.int32), None, r"from -5 to 7, are beyond 16 bits"),
    ],
)
def test_pixels_that_no_range_holds(pixels, extent, words):
    with pytest.raises(DataError, match=words):
        decode_image(encode(Image.fromarray(pixels), "tiff"), 8, extent=extent)
    assert decode_image(encode(Image.fromarray(np.array([[-5, 95]], np.int32)), "tiff"), 1, extent=(-5, 95)).max() < 255


def test_a_fourth_band_that_is_no_transparency():
    bands = np.broadcast_to(np.array([200, 100, 50, 60], np.uint8), (8, 8, 4)).copy()
    for cell in (encode(Image.fromarray(bands), "tiff"), encode(Image.fromarray(bands), "png"), bands):
        assert decode_image(cell, 8, alpha="ignore")[:, 0, 0].tolist() == [200, 100, 50]
        assert decode_image(cell, 8)[:, 0, 0].tolist() == [242, 219, 207]
    gray = encode(Image.fromarray(bands[..., 0]), "png", transparency=200)
    assert decode_image(gray, 8, alpha="ignore").unique().tolist() == [200]
    assert decode_image(gray, 8).unique().tolist() == [255]


def test_a_transparent_value_of_sixteen_bits():
    values = np.full((8, 8), 0x2000, np.uint16)
    values[:4] = 0xFFFF
    data = bytearray(encode(Image.fromarray(values), "png"))
    at = data.index(b"IDAT") - 4
    for clear, shown in ((0x1000, 32), (0x2000, 255)):
        chunk = b"tRNS" + struct.pack(">H", clear)
        with_clear = data[:at] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:]
        found = decode_image(bytes(with_clear), 8)
        assert found[:, 7].unique().tolist() == [shown]
        assert found[:, 0].unique().tolist() == [255]


@pytest.mark.parametrize("start", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4\n", b"\xd7\xcd\xc6\x9a" + bytes(40)])
def test_files_that_start_programs_are_no_pictures(monkeypatch, start):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(DataError, match="cannot read image"):
        decode_image(start + b"%%BoundingBox: 0 0 8 8\n", 8)


def test_a_small_file_of_a_huge_picture_is_not_decoded():
    data = encode(Image.new("L", (3000, 2000)), "png")
    with pytest.raises(DataError, match=r"3000 x 2000 pixels, more than data\.image\.max_pixels = 1000000"):
        decode_image(data, 8, max_pixels=10**6)
    assert decode_image(data, 8, max_pixels=6 * 10**6).shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["avif", "jpeg2000", "ppm", "tga", "webp", "gif"])
def test_formats_beside_jpeg_and_png(kind):
    found = means(decode_image(encode(Image.new("RGB", (16, 16), (200, 100, 50)), kind), 16))
    assert (found - torch.tensor([200.0, 100, 50])).abs().max() < 6
