"""Random crops of squeezed pictures beside those that torchvision's RandomResizedCrop cuts from the files.

    python scripts/compare_views.py [--sides 469x387 640x427 300x450] [--size 448] [--view 224] [--crops 300]

Pictures are noise whose amplitude falls as 1/f, as that of photographs does, stored as JPEG. Shown are the share of the
crops that are enlarged, of the picture that no crop reaches, and means over the crops, with their standard error: share
of the picture's area, log of the aspect ratio, and high-frequency energy, the logarithm of the variance of the view's
Laplacian. `crop` are today's two decode forms, of 256 pixels and of the view's size. Then what a picture costs: bytes
of a batch, and milliseconds of decoding, medians of alternating rounds on one thread.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from mmssl.media.image import decode_image, decode_squeezed
from mmssl.ops.augment import draw_crops, resized_crop
from mmssl.ops.draws import Draws


def picture(width: int, height: int, seed: int) -> np.ndarray:
    """Noise of 1/f amplitude in gray, uint8 (H, W, 3)."""
    white = np.random.default_rng(seed).normal(size=(height, width))
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    spectrum = np.fft.rfft2(white) / np.maximum(np.hypot(down, across), 1 / max(width, height))
    gray = np.fft.irfft2(spectrum, (height, width))
    return np.uint8(np.clip(128 + 45 * gray / gray.std(), 0, 255))[..., None].repeat(3, 2)


def detail(views: Tensor) -> Tensor:
    """Logarithm of the variance of the Laplacian, (N,) of (N, 3, S, S)."""
    kernel = views.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(views.mean(1, keepdim=True), kernel).flatten(1).var(1).log()


def from_file(data: bytes, view: int, crops: int, mode: str) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) as shares of the picture and views of torchvision."""
    image = TF.pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
    crop = v2.RandomResizedCrop(view, interpolation=v2.InterpolationMode(mode), antialias=True)
    params = [crop.make_params([image]) for _ in range(crops)]
    boxes = torch.tensor([[each[key] for key in ("top", "left", "height", "width")] for each in params])
    views = [TF.resized_crop(image, *box, [view, view], crop.interpolation, antialias=True) for box in boxes.tolist()]
    return boxes, torch.stack(views) / 255


def from_square(
    square: Tensor, aspect: float | None, view: int, crops: int, mode: Any, seed: int
) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) in pixels of the square, and views."""
    side = square.shape[-1]
    known = None if aspect is None else torch.full((crops,), aspect)
    boxes = draw_crops(Draws(seed, 0, crops), 1, side, side, aspect=known)[:, 0]
    views = [resized_crop(square[None], box[None], view, torch.zeros(1, dtype=torch.bool), mode)[0] for box in boxes]
    return boxes, torch.stack(views)


def milliseconds(works: list[Callable[[], object]], rounds: int = 41) -> list[float]:
    """Median CPU time of each, in turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, own in zip(works, times, strict=True):
            began = time.process_time()
            work()
            own.append(1000 * (time.process_time() - began))
    return [statistics.median(own) for own in times]


def compare(width: int, height: int, options: argparse.Namespace) -> None:
    """Prints the rows of one size of file."""
    view, size, mode = options.view, options.size, options.interpolation
    found: dict[str, list[Tensor]] = {}
    for seed in range(options.pictures):
        stream = io.BytesIO()
        Image.fromarray(picture(width, height, seed)).save(stream, "JPEG", quality=95)
        data, crops = stream.getvalue(), options.crops // options.pictures
        square, aspect = decode_squeezed(data, size)
        side, short = float(size), float(min(width, height))
        forms = {
            "file, torchvision": (from_file(data, view, crops, mode), width, height, float(width), float(height), 1.0),
            f"squeeze {size}": (from_square(square, aspect, view, crops, mode, seed), width, height, side, side, 1.0),
        }
        for small in (256, view):
            made = from_square(decode_image(data, small), None, view, crops, mode, seed)
            forms[f"crop {small}"] = (made, short, short, float(small), float(small), short**2 / (width * height))
        for name, ((boxes, views), wide, tall, across, down, reach) in forms.items():
            y, x = boxes[:, 2] * tall / down, boxes[:, 3] * wide / across
            row = torch.stack(
                [
                    (boxes[:, 2] * boxes[:, 3] < view**2).float(),
                    torch.full((crops,), 1 - reach),
                    y * x / (width * height),
                    (x / y).log(),
                    detail(views),
                ]
            )
            found.setdefault(name, []).append(row)
    for name, rows in found.items():
        all_rows = torch.cat(rows, 1)
        mean, error = all_rows.mean(1).tolist(), (all_rows.std(1) / math.sqrt(all_rows.shape[1])).tolist()
        shown = [f"{mean[0]:.0%}", f"{mean[1]:.0%}"]
        shown += [f"{value:.3f} ± {near:.3f}" for value, near in zip(mean[2:], error[2:], strict=True)]
        print(f"| {width} x {height} | {name} | " + " | ".join(shown) + " |", flush=True)


def costs(width: int, height: int, options: argparse.Namespace) -> None:
    """Prints bytes and decode time of one size of file."""
    stream = io.BytesIO()
    Image.fromarray(picture(width, height, 0)).save(stream, "JPEG", quality=90)
    data = stream.getvalue()
    sizes = [options.view, 256, options.size]
    works: list[Callable[[], object]] = [
        lambda: decode_image(data, options.view),
        lambda: decode_image(data, 256),
        lambda: decode_squeezed(data, options.size),
    ]
    taken = milliseconds([*works, lambda: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))])
    names = [f"crop {options.view}", "crop 256", f"squeeze {options.size}"]
    for name, size, ms in zip(names, sizes, taken, strict=False):
        print(f"| {width} x {height} | {name} | {3 * size**2 / 1000:.0f} kB | {ms:.2f} ms |")
    print(
        f"| {width} x {height} | Pillow, whole | {3 * width * height / 1000:.0f} kB | {taken[-1]:.2f} ms |", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", nargs="+", default=["469x387", "640x427", "300x450", "1600x600", "3000x2000"])
    parser.add_argument("--size", type=int, default=448, help="of the squeezed square, in pixels")
    parser.add_argument("--view", type=int, default=224, help="side of a view, in pixels")
    parser.add_argument("--crops", type=int, default=320, help="in all of one size of file")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"), default="bilinear")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sides = [tuple(map(int, each.split("x"))) for each in options.sides]
    print("| file | crops from | enlarged | lost | area | log aspect | detail |\n|---|---|---|---|---|---|---|")
    for width, height in sides:
        compare(width, height, options)
    print("\n| file | decoded | a picture | in |\n|---|---|---|---|")
    for width, height in sides:
        costs(width, height, options)


if __name__ == "__main__":
    main()
