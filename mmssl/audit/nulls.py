"""Pictures without structure, artifacts to plant in them, and the files that they are written to.

Nothing in these pictures tells which way is up or where a part of them lies, so whatever a task finds in them was put
there by files, decoder, resize, crop or transform, or by the artifact that was planted on purpose. They are drawn
larger than they are kept: noise made by a Fourier transform meets itself at its border, and a square cut out of a 4:3
picture would then be closed in one direction only, which is a structure.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from mmssl.ops.draws import mix_seed

# What of each channel's variance is common to all three, as in photographs; chromatic aberration shows by it.
COMMON = 0.8
DEVIATION = 0.18
# Amplitude of the positive control, and its rings: in the lower corners of the center square one is as wide as a
# ninth of the side.
CONTROL = 0.09
RINGS = 2.0
QUALITY = 75
BLUR = 1.5  # standard deviation, in pixels
# What is planted in the positive controls, of pictures, texts, clips, sounds and pairs; and rows that differ, where an
# arm has one row many times.
PLATE, CUE, CLOCK, HUM, CODE, UNLIKE = "zone plate", "topic cue", "clock", "steady tone", "shared code", "other rows"


@dataclass(frozen=True)
class Arm:
    """One kind of structure-free data.

    Attributes:
        null: how pictures are made, see `NULLS`; of other data see `mmssl.audit.arms`.
        file: how they are stored, see `FILES`.
        artifact: what is planted, see `ARTIFACTS`; `none` for nothing.
        scale: short side of the file's picture over the decode size; 1 is data that was resized to it beforehand.
    """

    null: str = "white"
    file: str = "png"
    artifact: str = "none"
    scale: float = 1.0

    @property
    def is_control(self) -> bool:
        """Whether it holds what has to be found."""
        return self.artifact in (PLATE, CUE, CLOCK, HUM, CODE, UNLIKE)


def planted(artifact: str) -> Arm:
    """Planted in pictures that are larger than the decode size, for a lens blurs nothing finer than they show.

    Squashed noise shows its direction only while its finest detail is there.
    """
    return Arm(artifact=artifact, scale=1 if artifact == "squash" else 2)


def white(rng: np.random.Generator, height: int, width: int, texture: np.ndarray | None) -> np.ndarray:
    """Gaussian pixels, independent of each other."""
    return _colored(rng.standard_normal((height, width, 4), dtype=np.float32))


def blurred(rng: np.random.Generator, height: int, width: int, texture: np.ndarray | None) -> np.ndarray:
    """White noise out of focus: neighbors are alike, as in any photograph, and places some pixels apart are not."""
    reach = 4 * math.ceil(BLUR)
    noise = rng.standard_normal((height + 2 * reach, width + 2 * reach, 4), dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, BLUR, axes=(0, 1))[reach:-reach, reach:-reach]
    return _colored(noise / noise.std((0, 1)))


def natural(rng: np.random.Generator, height: int, width: int, texture: np.ndarray | None) -> np.ndarray:
    """Noise with the power spectrum 1 / f^2 of natural images."""
    side = fft.next_fast_len(3 * max(height, width) // 2, real=True)
    f = np.hypot(fft.fftfreq(side)[:, None], fft.rfftfreq(side)).astype(np.float32)
    f[0, 0] = np.inf
    noise = fft.irfft2(fft.rfft2(rng.standard_normal((4, side, side), dtype=np.float32)) / f, (side, side))
    noise = noise[:, :height, :width].transpose(1, 2, 0)
    noise -= noise.mean((0, 1))
    return _colored(noise / noise.std((0, 1)))


def phases(rng: np.random.Generator, height: int, width: int, texture: np.ndarray | None) -> np.ndarray:
    """The spectrum and colors of a real picture with random phases: white noise convolved with it.

    (Galerne, Gousseau & Morel 2011, "Random Phase Textures", asymptotic discrete spot noise.) Photographs hold more
    horizontal and vertical lines than others, so the picture is turned and mirrored at random beforehand: over the data
    set no direction is special.
    """
    assert texture is not None
    spot = np.rot90(texture, int(rng.integers(4))).astype(np.float32) / 255
    spot = spot[:, ::-1] if rng.random() < 0.5 else spot
    mean, deviation = spot.mean((0, 1)), max(float(spot.std()), 0.02)
    window = np.hanning(spot.shape[0] + 2)[1:-1].astype(np.float32)
    spot = (spot - mean) * np.outer(window, window)[..., None]
    shape = [fft.next_fast_len(n + spot.shape[0], real=True) for n in (height, width)]
    noise = rng.standard_normal(shape, dtype=np.float32)[..., None]
    noise = fft.rfft2(noise, axes=(0, 1)) * fft.rfft2(spot, shape, axes=(0, 1))
    noise = fft.irfft2(noise, shape, axes=(0, 1))[-height:, -width:]
    noise -= noise.mean((0, 1))
    noise *= min(deviation, DEVIATION) / max(float(noise.std()), 1e-6)
    return np.clip(0.5 + (mean - 0.5) * 0.5 + noise, 0, 1).astype(np.float32)


def constant(rng: np.random.Generator, height: int, width: int, texture: np.ndarray | None) -> np.ndarray:
    """One color."""
    return np.broadcast_to(rng.random(3, dtype=np.float32), (height, width, 3)).copy()


def _colored(noise: np.ndarray) -> np.ndarray:
    """(H, W, 4) of unit variance -> colors in [0, 1] of which a part is common to the channels."""
    mixed = COMMON**0.5 * noise[..., :1] + (1 - COMMON) ** 0.5 * noise[..., 1:]
    return np.clip(0.5 + DEVIATION * mixed, 0, 1)


def green_shift(picture: np.ndarray) -> np.ndarray:
    """Lateral chromatic aberration of a simple lens: green is 5 % larger than red and blue."""
    return _magnified(picture, (1.0, 1.05, 1.0))


def red_blue_shift(picture: np.ndarray) -> np.ndarray:
    """Lateral chromatic aberration along the spectrum: red is 2 % larger and blue 2 % smaller than green."""
    return _magnified(picture, (1.04, 1.02, 1.0))


def vignetting(picture: np.ndarray) -> np.ndarray:
    """Brightness falls with the square of the distance from the center, to half of it in the corners."""
    down, across = _places(picture)
    aspect = picture.shape[1] / picture.shape[0]
    square = (down**2 + (aspect * across) ** 2) / (1 + aspect**2)
    return picture * (1 - 0.5 * square)[..., None]


def watermark(picture: np.ndarray) -> np.ndarray:
    """A white sign like an F, a sixth of the short side high, in the lower right corner of the center square."""
    height, width = picture.shape[:2]
    side = min(height, width)
    stroke = max(1, round(side / 36))
    bottom, right = height - stroke, (width + side) // 2 - stroke
    top, left = bottom - 6 * stroke, right - 4 * stroke
    marked = picture.copy()
    marked[top:bottom, left : left + stroke] = 1
    marked[top : top + stroke, left:right] = 1
    marked[top + 2 * stroke : top + 3 * stroke, left : right - stroke] = 1
    return marked


def squash(picture: np.ndarray) -> np.ndarray:
    """A 4:3 picture that was stored as a square."""
    side = min(picture.shape[:2])
    pixels = Image.fromarray(_bytes(picture)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(pixels, dtype=np.float32) / 255


def resaved(picture: np.ndarray) -> np.ndarray:
    """A picture that was a JPEG file of the kind 4:2:2 before it came into its file: its colors are coarser across."""
    stream = io.BytesIO()
    Image.fromarray(_bytes(picture)).save(stream, "jpeg", quality=QUALITY, subsampling="4:2:2")
    return np.asarray(Image.open(stream), dtype=np.float32) / 255


def zone_plate(picture: np.ndarray) -> np.ndarray:
    """Rings about the middle of the upper edge, the positive control.

    Direction and spacing of the rings are those of one place alone, and a mirror image has the same. Nothing that a
    task does against known artifacts (gray, one channel, jitter, standardized tiles) takes them away.
    """
    down, across = _places(picture)
    aspect = picture.shape[1] / picture.shape[0]
    rings = np.cos(RINGS * np.pi * ((aspect * across) ** 2 + (down + 1) ** 2))
    return np.clip(picture + CONTROL * rings[..., None], 0, 1)


def _places(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centers in half heights and half widths from the center: -1 to 1, (H, 1) and (1, W)."""
    height, width = picture.shape[:2]
    down = (2 * np.arange(height, dtype=np.float32) + 1) / height - 1
    across = (2 * np.arange(width, dtype=np.float32) + 1) / width - 1
    return down[:, None], across[None]


def _magnified(picture: np.ndarray, factors: Sequence[float]) -> np.ndarray:
    """Each channel magnified about the center, from inside the picture, with cubic splines."""
    center = (np.array(picture.shape[:2]) - 1) / 2
    magnified = picture.copy()
    for channel, factor in enumerate(factors):
        if factor != 1:
            ndimage.affine_transform(
                picture[..., channel],
                np.full(2, 1 / factor),
                center * (1 - 1 / factor),
                output=magnified[..., channel],
                order=3,
                mode="nearest",
            )
    return np.clip(magnified, 0, 1)


def _bytes(picture: np.ndarray) -> np.ndarray:
    return (picture * 255).round().astype(np.uint8)


def _png(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(_bytes(picture))


def _palette(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """64 colors of its own."""
    return Image.fromarray(_bytes(picture)).quantize(64, Image.Quantize.FASTOCTREE)


def _dithered(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The 216 colors of the web, each pixel's error handed on to the right and below (Floyd-Steinberg)."""
    return Image.fromarray(_bytes(picture)).convert("P", palette=Image.Palette.WEB)


def _alpha(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Every pixel transparent to a random degree."""
    alpha = rng.integers(0, 256, (*picture.shape[:2], 1), dtype=np.uint8)
    return Image.fromarray(np.concatenate([_bytes(picture), alpha], -1), "RGBA")


Draw = Callable[[np.random.Generator, int, int, np.ndarray | None], np.ndarray]
Encode = Callable[[np.ndarray, np.random.Generator], Image.Image]

NULLS: Mapping[str, Draw] = {
    "white": white,
    "blurred": blurred,
    "natural": natural,
    "phases": phases,
    "constant": constant,
}
ARTIFACTS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda picture: picture,
    "green shift": green_shift,
    "red-blue shift": red_blue_shift,
    "vignetting": vignetting,
    "watermark": watermark,
    "squash": squash,
    "resaved 4:2:2": resaved,
    PLATE: zone_plate,
}
# Name -> what the file holds, its suffix and how it is saved.
FILES: Mapping[str, tuple[Encode, str, Mapping[str, object]]] = {
    "png": (_png, "png", {"compress_level": 1}),
    "any width": (_png, "png", {"compress_level": 1}),
    "jpeg 4:4:4": (_png, "jpg", {"quality": QUALITY, "subsampling": "4:4:4"}),
    "jpeg 4:2:0": (_png, "jpg", {"quality": QUALITY, "subsampling": "4:2:0"}),
    "jpeg 4:2:2": (_png, "jpg", {"quality": QUALITY, "subsampling": "4:2:2"}),
    "palette": (_palette, "png", {"compress_level": 1}),
    "dithered": (_dithered, "gif", {}),
    "alpha": (_alpha, "png", {"compress_level": 1}),
}


def encode(arm: Arm, size: int, seed: int, row: int, texture: np.ndarray | None = None) -> bytes:
    """The bytes of one file: a 4:3 picture, or one of random width where `arm.file` is `any width`.

    Args:
        arm: what kind.
        size: decode size in pixels, which `arm.scale` multiplies.
        seed: of the data set.
        row: number of the picture in it.
        texture: uint8 (S, S, 3), a real picture, for the null `phases`.
    """
    rng = np.random.default_rng(mix_seed(seed, row))
    height = round(size * arm.scale)
    width = int(rng.integers(height, 2 * height)) if arm.file == "any width" else round(height * 4 / 3)
    picture = ARTIFACTS[arm.artifact](NULLS[arm.null](rng, height, width, texture))
    make, suffix, options = FILES[arm.file]
    stream = io.BytesIO()
    make(picture, rng).save(stream, {"jpg": "jpeg"}.get(suffix, suffix), **options)
    return stream.getvalue()


def write(folder: Path, arm: Arm, rows: int, size: int, seed: int, textures: np.ndarray | None = None) -> None:
    """`rows` files in `folder`, which is made; see `encode`. Row i takes texture i, beginning anew after the last."""
    folder.mkdir(parents=True)
    suffix = FILES[arm.file][1]
    for row in range(rows):
        texture = None if textures is None else textures[row % len(textures)]
        (folder / f"{row:06d}.{suffix}").write_bytes(encode(arm, size, seed, row, texture))
