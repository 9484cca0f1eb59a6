"""Autoencoder: what was in the picture, told through a few numbers?

Hinton & Salakhutdinov 2006, "Reducing the Dimensionality of Data with Neural Networks", Science 313. The pooled vector
goes through a code of `bottleneck` numbers, from which a decoder paints the picture again; the error is squared. With
`noise` the encoder sees the picture under Gaussian noise and has to paint the clean one: the denoising autoencoder of
Vincent et al. 2010, "Stacked Denoising Autoencoders", JMLR 11, whose training by layers is not needed today.

Known traps. Without a bottleneck or noise the identity solves the task; tokens on their grid would be such a way
around, so that only the pooled vector reaches the code. Noise is added to the input alone and not clipped, which would
tell it apart where the picture is white or black. Squared error pays for large areas: a code of a few numbers keeps
colors and layout, not what the picture shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.decoders import DenseDecoder
from mmssl.modules.views import Crop
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ranges import Weight, Width

VIEWS = {"area": (0.08, 1.0), "flip": 0.5}
SEED = 4  # height and width of the first map, as in DCGAN


class Autoencoder(Objective):
    """Paint the picture again from a short code.

    `relative_error` is the squared error over that of each picture's own mean color: 1 for a code that holds three
    numbers, 0 for the picture itself. A network that sees nothing is above 1, by how much pictures differ in color.

    Args:
        encoders: holds the image encoder.
        encoder: its name.
        bottleneck: numbers in the code.
        noise: standard deviation of the Gaussian noise on the input, where pixels go from 0 to 1; 0 for none.
        views: how images are cropped; see `Crop`.
        width: of the decoder, in channels.
    """

    needs = ("image",)
    divisors = ("constant_error",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        bottleneck: Width = 128,
        noise: Weight = 0.0,
        views: dict[str, Any] = VIEWS,
        width: Width = 256,
    ) -> None:
        super().__init__(encoders)
        self.name, self.noise, self.crop = encoder, noise, Crop.of(VIEWS, views)
        self.code = nn.Linear(self.encoder(encoder, "image").dim, bottleneck)
        # Each place of the first map has weights of its own, since a code has no places.
        self.spread = nn.Linear(bottleneck, width * SEED**2)
        self.decoder = DenseDecoder(width, 3, width=width)

    def chance(self, rows: int) -> Chance:
        """The level of the squared error is that of the data; relative to each picture's mean color it is 1."""
        return Chance(None, {"relative_error": 1.0})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, W) -> `image`, noisy where asked for, and the clean `target`, (B, 3, h, h)."""
        target = as_floats(self.crop(batch["image"], draws, batch.get("image_aspect"), square=True))
        seen = target + self.noise * draws.normal(*target.shape[1:]) if self.noise else target
        spread = (target - target.mean((2, 3), keepdim=True)).square().mean((1, 2, 3))
        return {"image": seen, "target": target, "constant_error": spread.sum()}

    def predict(self, inputs: Batch) -> Batch:
        """`image` (B, 3, h, h), 0 to 1 where it is right."""
        code = self.code(self.encoder(self.name)(inputs["image"]).pooled)
        start = self.spread(code).unflatten(1, (-1, SEED, SEED))
        height, width = inputs["target"].shape[2:]
        return {"image": self.decoder(start, (height, width))}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Mean squared error against the clean picture, and the same over that of its mean color."""
        error = (outputs["image"] - inputs["target"]).square().mean((1, 2, 3))
        constant = inputs["constant_error"]
        return {
            "loss": error.mean(),
            "relative_error": error.detach().sum() / torch.where(constant > 0, constant, 1),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What the encoder sees, the picture, and the picture from its code."""
        return [
            Panel("input", list(inputs["image"].clamp(0, 1))),
            Panel("target", list(inputs["target"])),
            Panel("prediction", list(outputs["image"].clamp(0, 1))),
        ]
