"""Scenes whose answers can be told: colored squares on black, and sounds that are as loud as a color is bright."""

from __future__ import annotations

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmssl.encoders.base import Encoder, Features
from mmssl.objectives.base import Objective, Pair

SIZE, PATCH, RATE = 32, 4, 800
GRID = SIZE // PATCH
LOUD = (0.25, 0.5, 0.75)
"""What the colors sound like: red, green, blue."""


class Eye(Encoder):
    """Pictures or clips -> the mean color of each patch."""

    dim = 3

    def __init__(self, modality: str) -> None:
        super().__init__()
        self.modality, self.one = modality, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        frames = x if x.ndim == 5 else x[:, None]
        patches = frames.float().unflatten(3, (-1, PATCH)).unflatten(5, (-1, PATCH)).mean((4, 6)) / 255 * self.one
        grid = (frames.shape[1], *patches.shape[-2:])
        tokens = patches.transpose(1, 2).flatten(2).mT
        return Features(tokens, tokens.mean(1), grid if x.ndim == 5 else grid[1:])


class Ear(Encoder):
    """Sounds -> which color is that loud; `rate` as of a real encoder."""

    modality, dim, rate = "audio", 3, RATE

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        loud = x.abs().amax(1, keepdim=True) * self.one
        color = torch.softmax(-100 * (loud - loud.new_tensor(LOUD)).abs(), dim=1)
        return Features(color[:, None], color, (1, 1))


class Heard(Objective):
    """Compares a place's color with that of the sound; by `match` alone where it does not `embed`."""

    def __init__(self, seen: str = "image", embeds: bool = True, blind: bool = False) -> None:
        super().__init__({seen: Eye(seen), "audio": Ear()})
        self.seen, self.embeds, self.sign = seen, embeds, 0.0 if blind else 1.0

    def vector(self, features: Features) -> Tensor:
        return features.pooled

    def match(self, seen: Features, heard: Features) -> Tensor:
        assert not self.training
        return (self.sign * seen.pooled * heard.pooled).sum(1)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        spaces = (self.vector, self.vector) if self.embeds else None
        return (Pair(self.seen, "audio", spaces, None if self.embeds else self.match),)


def scenes(rows: int, seed: int = 0, side: int = 8, off: int = 0) -> datasets.Dataset:
    """Pictures with three squares, of which one sounds; of the last `off` rows none does, and its color is missing."""
    dice = np.random.default_rng(seed)
    pictures, sounds, boxes = [], [], []
    for row in range(rows):
        picture = np.zeros((SIZE, SIZE, 3), np.uint8)
        right, hidden = dice.integers(3), row >= rows - off
        # On a 2 x 2 grid of quarters, so that no square covers another.
        for color, quarter in enumerate(dice.permutation(4)[:3]):
            left, top = (int(quarter) % 2 * SIZE // 2 + PATCH, int(quarter) // 2 * SIZE // 2 + PATCH)
            if not (hidden and color == right):
                picture[top : top + side, left : left + side, color] = 255
            if color == right:
                boxes.append(None if hidden else [edge / SIZE for edge in (left, top, left + side, top + side)])
        pictures.append(Image.fromarray(picture))
        sounds.append({"array": np.full(RATE, LOUD[right], np.float32), "sampling_rate": RATE})
    return datasets.Dataset.from_dict({"image": pictures, "audio": sounds, "box": boxes})
