"""Inpainting: what was in the hole that was cut into this image?

Pathak, Krähenbühl, Donahue, Darrell & Efros 2016, "Context Encoders: Feature Learning by Inpainting", arXiv 1604.07379.
A hole is filled with one color, the encoder reads what is left, and a decoder paints the hole: the square in the
center without its rim, or a smooth random region that covers 20 to 30 % of the image. The rim around a hole is painted
as well, though it is seen, and weighs ten times as much, so that the two meet without a seam. A discriminator adds a
thousandth: does the painted region look real? The published feature-learning models do without it (`adversarial: 0`).

One optimizer trains both. The generator's term passes a discriminator whose weights are held fast, the discriminator's
term sees paintings that carry no gradient, and one backward pass gives each the gradient of its own. The discriminator
learns at a tenth of the recipe's learning rate, as published (2e-4 and 2e-3).

Differences. The paper's fully connected layer, through which AlexNet's features see across the hole, is not needed: the
receptive field of today's encoders covers the image, and their pooled vector is added everywhere. The released code
draws one random region a batch; here each row has its own, and a random region gets a rim like the square's (the code
weighs all that is visible alike, or ten times). The discriminator normalizes groups of channels, not the batch, so that
rows do not meet; its convolutions have no bias, for the code sets those to 0 at every step.

Known traps. The fill is the data set's mean color in the order red, green, blue: the released code fills 117, 104,
123, which is ImageNet's mean with its channels in disorder. The weight of ten belongs to the visible rim, not to the
hole. The discriminator sees the painted region alone, real or painted, and the fill around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.decoders import DenseDecoder, feature_map
from mmssl.modules.views import Crop
from mmssl.objectives._concealed import Concealed
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over
from mmssl.ranges import BelowOne, Distance, Ratio, Share, Width

VIEWS = {"flip": 0.5}
RIM_WEIGHT = 10.0
CELLS = 8  # of the noise whose smooth version makes random regions; 0.06 of 128 pixels in the released code
GROUPS = 8


class Inpainting(Objective):
    """Paint what a hole hides.

    Args:
        encoders: holds the image encoder.
        encoder: its name.
        region: where the hole is: `center`, or `random` shapes.
        overlap: width in pixels of the rim around a hole that is painted though it is seen, in images of 128 pixels: 4
            in the released code, 7 in the paper.
        mask_ratio: smallest and largest share of the image that a random region covers.
        adversarial: weight of the adversarial term; the reconstruction has the rest of 1.
        fill: color of the hole, red, green and blue in [0, 1]; the mean of ImageNet by default.
        views: how images are cropped before anything else; see `Crop`.
        width: of the decoder's first stage, in channels.
        discriminator_width: of the discriminator's first layer, in channels; it doubles three times.
    """

    needs = ("image",)
    divisors = ("painted_pixels", "constant_error")
    fill: Tensor

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        region: Literal["center", "random"] = "center",
        overlap: Distance = 4,
        mask_ratio: tuple[Ratio, Ratio] = (0.2, 0.3),
        adversarial: BelowOne = 0.001,
        fill: tuple[Share, Share, Share] = (0.485, 0.456, 0.406),
        views: dict[str, Any] = VIEWS,
        width: Width = 256,
        discriminator_width: Width = 64,
    ) -> None:
        super().__init__(encoders)
        if mask_ratio[0] > mask_ratio[1]:
            raise RecipeError(f"inpainting: mask_ratio = {mask_ratio} should be two shares, the larger last")
        self.name, self.region, self.overlap, self.mask_ratio = encoder, region, overlap, mask_ratio
        self.adversarial, self.crop = adversarial, Crop.of(VIEWS, views)
        self.register_buffer("fill", torch.tensor(fill)[:, None, None], persistent=False)
        self.decoder = DenseDecoder(self.encoder(encoder, "image").dim, 3, width=width)
        if adversarial:
            if discriminator_width % GROUPS:
                raise RecipeError(f"inpainting: discriminator_width = {discriminator_width} is no multiple of {GROUPS}")
            self.discriminator = Discriminator(discriminator_width)

    def chance(self, rows: int) -> Chance:
        """The level of the squared error is that of the data; relative to the mean color of each hole it is 1."""
        return Chance(None, {"relative_error": 1.0})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, W) -> `image` with its hole filled and `target`, (B, 3, h, w) in [0, 1], and `weight`.

        `weight` (B, 1, h, w) is 1 in the hole, 10 in the rim around it and 0 where nothing is painted.
        """
        images = self.crop(batch["image"], draws, batch.get("image_aspect"))
        target = images.to(self.fill.dtype) / (255 if images.dtype == torch.uint8 else 1)
        hole = self._square(target) if self.region == "center" else self._shapes(target, draws)
        painted = _widened(hole, self.overlap).to(target.dtype)
        mean = (target * hole).sum((2, 3), keepdim=True) / hole.sum((2, 3), keepdim=True)
        return {
            "image": torch.where(hole, self.fill, target),
            "target": target,
            "weight": torch.where(hole, 1.0, RIM_WEIGHT * painted),
            "painted_pixels": painted.sum(),
            "constant_error": _error(mean, target).masked_fill(~hole, 0.0).sum(),
        }

    def _square(self, images: Tensor) -> Tensor:
        """The middle half in both directions less the rim, bool (B, 1, h, w)."""
        height, width = images.shape[2:]
        if height % 4 or width % 4 or self.overlap >= min(height, width) // 4:
            raise RecipeError(
                f"inpainting: the square in the center of {height} x {width} pixels is its middle half less a rim of "
                f"overlap = {self.overlap}: take sides that are multiples of 4, and a narrower rim"
            )
        hole = torch.zeros(len(images), 1, height, width, dtype=torch.bool, device=images.device)
        top, left = height // 4 + self.overlap, width // 4 + self.overlap
        hole[:, :, top : height - top, left : width - left].fill_(True)
        return hole

    def _shapes(self, images: Tensor, draws: Draws) -> Tensor:
        """The lowest places of smooth noise, as many as the ratio asks for; bool (B, 1, h, w)."""
        height, width = images.shape[2:]
        noise = F.interpolate(draws.uniform(1, CELLS, CELLS), (height, width), mode="bicubic", align_corners=True)
        number = (draws.uniform(1, low=self.mask_ratio[0], high=self.mask_ratio[1]) * (height * width)).ceil()
        rank = noise.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
        return (rank < number).view_as(noise)

    def _judged(self, images: Tensor, painted: Tensor) -> Tensor:
        """What the discriminator sees of pictures: their painted region, and the fill around random ones."""
        if self.region == "random":
            return torch.where(painted, images, 2 * self.fill - 1)
        top, left = images.shape[2] // 4, images.shape[3] // 4
        return images[:, :, top : images.shape[2] - top, left : images.shape[3] - left]

    def predict(self, inputs: Batch) -> Batch:
        """`image` (B, 3, h, w), -1 to 1 where it is right; the discriminator's logits (B,), above 0 for "real".

        `real` and `fake` are its answers, `fooled` is that for the same paintings with its weights held fast.
        """
        features = self.encoder(self.name)(inputs["image"])
        height, width = inputs["image"].shape[2:]
        outputs = {"image": self.decoder(feature_map(features), (height, width))}
        if self.adversarial:
            painted = inputs["weight"] > 0
            fake, real = (self._judged(x, painted) for x in (outputs["image"], 2 * inputs["target"] - 1))
            outputs["real"], outputs["fake"] = self.discriminator(torch.cat([real, fake.detach()])).chunk(2)
            held = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
            outputs["fooled"] = functional_call(self.discriminator, held, (fake,))
        return outputs

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Weighted squared error on the scale from -1 to 1, plus generator's and discriminator's cross-entropies.

        `relative_error` is of the hole alone, unweighted, over the error of the hole's mean color.
        """
        weight = inputs["weight"]
        error = _error((outputs["image"] + 1) / 2, inputs["target"])
        reconstruction = mean_over(4 * weight * error, weight > 0, inputs["painted_pixels"])
        losses = {"relative_error": mean_over(error.detach(), weight == 1, inputs["constant_error"])}
        if not self.adversarial:
            return {"loss": reconstruction, **losses}
        adversarial = F.softplus(-outputs["fooled"]).mean()
        discriminator = F.softplus(-outputs["real"]).mean() + F.softplus(outputs["fake"]).mean()
        generator = (1 - self.adversarial) * reconstruction + self.adversarial * adversarial
        return {
            "loss": generator + discriminator,
            "reconstruction": reconstruction,
            "adversarial": adversarial,
            "discriminator": discriminator,
            **losses,
        }

    def concealed(self, inputs: Batch) -> Concealed:
        """The hole, of which nothing is left in the picture."""
        image, target = inputs["image"], inputs["target"]
        return Concealed(
            lambda inputs: self.predict(inputs)["image"],
            {"target": torch.ones_like(target, dtype=torch.bool)},
            shown=(image == target).all(1, keepdim=True)[inputs["weight"] == 1],
        )

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The image with its hole, the hole as the network paints it, and what was there."""
        painted = torch.where(inputs["weight"] == 1, (outputs["image"] + 1) / 2, inputs["target"])
        return [
            Panel("input", list(inputs["image"])),
            Panel("prediction", list(painted.clamp(0, 1))),
            Panel("target", list(inputs["target"])),
        ]


class Discriminator(nn.Sequential):
    """DCGAN's (arXiv 1511.06434): four strided convolutions, then one logit a picture, a mean over its places."""

    def __init__(self, width: int) -> None:
        widths = [width << stage for stage in range(4)]
        layers: list[nn.Module] = [_convolution(3, width, 2), nn.LeakyReLU(0.2)]
        for before, after in pairwise(widths):
            layers += [_convolution(before, after, 2), nn.GroupNorm(GROUPS, after), nn.LeakyReLU(0.2)]
        super().__init__(*layers, _convolution(widths[-1], 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(0))
        for parameter in self.parameters():
            parameter.lr_scale = 0.1  # type: ignore[attr-defined]


def _convolution(before: int, after: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(before, after, 5, stride, padding=2, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def _widened(mask: Tensor, reach: int) -> Tensor:
    """True where the mask (B, 1, h, w) is within `reach` pixels, across and down: max pooling, several times faster."""
    window = 2 * reach + 1
    down = F.pad(mask, (reach,) * 4).unfold(2, window, 1).any(-1)
    return down.unfold(3, window, 1).any(-1)


def _error(a: Tensor, b: Tensor) -> Tensor:
    """Squared error, a mean over colors: (B, 1, h, w)."""
    return (a - b).square().mean(1, keepdim=True)
