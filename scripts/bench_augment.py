"""Images per second and core of SimCLR's augmentation: batched on the device, against torchvision one image at a time.

    python scripts/bench_augment.py [--sizes 64,96,224] [--rounds 9]

Both do the same operations with the same probabilities: random resized crop (antialiased), flip, color jitter in
random order, gray, Gaussian blur. One thread, CPU time, the two alternating. Shown are medians over the rounds, and of
the ratio of neighboring runs the smallest and the largest, too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torchvision.transforms import v2

from mmssl.ops.augment import random_views
from mmssl.ops.draws import Draws


def torchvision_pipeline(size: int) -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(2 * (size // 20) + 1, (0.1, 2.0))], 0.5),
        ]
    )


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="64,96,224", help="image sides in pixels")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| side | input | torchvision images/s | mmssl images/s | ratio |\n|---|---|---|---|---|")
    for size in map(int, arguments.sizes.split(",")):
        rows = max(32, (1 << 20) // size**2)
        pipeline = torchvision_pipeline(size)
        as_bytes = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8)
        for name, images in (("uint8", as_bytes), ("float", as_bytes / 255)):

            def theirs(images: torch.Tensor = images, pipeline: v2.Compose = pipeline) -> None:
                torch.stack([pipeline(image) for image in images])

            def ours(step: int, images: torch.Tensor = images, size: int = size) -> None:
                random_views(images, Draws(0, step, len(images)), 1, size)

            theirs(), ours(-1)
            times = [(seconds(theirs), seconds(partial(ours, step))) for step in range(arguments.rounds)]
            slow, fast = (rows / statistics.median(column) for column in zip(*times, strict=True))
            ratios = [before / after for before, after in times]
            ratio = f"**{statistics.median(ratios):.1f}x** ({min(ratios):.1f} to {max(ratios):.1f})"
            print(f"| {size} | {name} | {slow:.0f} | {fast:.0f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
