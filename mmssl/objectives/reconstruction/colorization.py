"""Colorization: which colors does this gray picture have?

Zhang, Isola & Efros 2016, "Colorful Image Colorization", arXiv 1603.08511. The lightness L of CIE Lab goes in, a and b
come out at every fourth pixel: as a distribution over the 313 colors of a grid of ten that sRGB reaches (`classes`,
the paper's method), or as two numbers (`regression`, its L2 baseline). Targets are soft, ten neighbors under a
Gaussian of 5. Rare colors weigh more: w ∝ ((1 - λ) p + λ / Q)⁻¹ with E_p[w] = 1, looked up at the nearest color and
multiplied into the gradient alone, so that the loss is plain cross-entropy. Pictures without color (no |a| or |b|
above 5) do not count.

Two things differ from the published code. L goes in as a gray picture of three channels, so that any encoder of color
pictures can carry the task and leave as it is; its normalization does the centring. And p is not the file made from
ImageNet but the average over all batches so far, which begins as one picture of all colors alike; it is a buffer, so
that a resumed run goes on with it.

Known traps. The color of a prediction is the annealed mean of its distribution (temperature 0.38): the mode is patchy
and the plain mean gray. Five neighbors, as the paper's text has it, are half of what was used. The 313 colors do not
follow from rounding sRGB, which gives 261. Targets are subsampled, not averaged: an average over an edge is a color
that is not there. A network that knows how frequent colors are and sees nothing has a loss far below ln 313, so that
`relative_error`, not the loss, says whether it looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.decoders import DenseDecoder, feature_map
from mmssl.modules.views import Crop
from mmssl.objectives._concealed import Concealed
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.color import annealed_mean, as_floats, bins_nearby, color_bins, lab_to_rgb, rgb_to_lab, soft_encode
from mmssl.ops.draws import Draws
from mmssl.ops.gather import average
from mmssl.ops.losses import mean_over
from mmssl.ranges import Part, Pixels, Width

NEIGHBORS = 10
GRAY = 5.0  # |a| and |b| up to which a pixel has no color
VIEWS = {"area": (0.4727, 0.4727), "flip": 0.5}
SCALE = 110.0  # of a and b as numbers to regress


class Colorization(Objective):
    """Predict a and b from L.

    Args:
        encoders: holds the image encoder.
        encoder: its name.
        form: `classes` for a distribution over 313 colors, `regression` for the color itself.
        stride: pixels from one target to the next.
        rebalance: λ, how far rare colors are weighed up: 1 not at all, toward 0 by all their rarity.
        views: how images are cropped, see `Crop`; the paper's crop has 176 of 256 pixels.
        width: of the decoder, in channels.
    """

    needs = ("image",)
    divisors = ("colored_pixels", "constant_error")
    bins: Tensor
    nearby: Tensor
    mean_target: Tensor
    pictures: Tensor
    recent: Tensor
    recent_pictures: Tensor

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        form: Literal["classes", "regression"] = "classes",
        stride: Pixels = 4,
        rebalance: Part = 0.5,
        views: dict[str, Any] = VIEWS,
        width: Width = 256,
    ) -> None:
        super().__init__(encoders)
        self.name, self.form, self.stride, self.rebalance = encoder, form, stride, rebalance
        self.crop = Crop.of(VIEWS, views)
        self.register_buffer("bins", color_bins(), persistent=False)
        self.register_buffer("nearby", bins_nearby(color_bins(), NEIGHBORS), persistent=False)
        channels = len(self.bins) if form == "classes" else 2
        self.decoder = DenseDecoder(self.encoder(encoder, "image").dim, channels, width=width)
        # Of all targets so far, plain and weighted: how often each color came, or its mean. Begins as one picture.
        start = torch.full((2, channels), 1 / channels) if form == "classes" else torch.zeros(2, channels)
        self.register_buffer("mean_target", start)
        self.register_buffer("pictures", torch.ones(()))
        # Sums over the step at hand, until `after_step` counts it.
        self.register_buffer("recent", torch.zeros_like(start), persistent=False)
        self.register_buffer("recent_pictures", torch.zeros(()), persistent=False)

    def chance(self, rows: int) -> Chance:
        """All 313 colors alike; and the best constant answer, which knows what colors there are and sees nothing."""
        return Chance(math.log(len(self.bins)) if self.form == "classes" else None, {"relative_error": 1.0})

    def weights(self) -> Tensor:
        """Weight of each of the 313 colors, from how often it came so far: Σ p·w = 1, equation 4 of the paper."""
        p = self.mean_target[0]
        weight = 1 / ((1 - self.rebalance) * p + self.rebalance / len(p))
        return weight / (p * weight).sum()

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, W) -> the gray `image` (B, 3, h, h) and `ab` (B, 2, h / stride, h / stride).

        With these the `weight` of each target, 0 in pictures without color, and for classes its `bins` (B, 10, ...),
        nearest first, and their `share`. A step of training also counts what colors there are.
        """
        images = as_floats(self.crop(batch["image"], draws, batch.get("image_aspect"), square=True))
        if images.shape[-1] % self.stride or images.shape[-2] % self.stride:
            raise RecipeError(
                f"colorization: stride = {self.stride} does not divide the crop of {images.shape[-1]} pixels; set "
                "views.size or stride"
            )
        lab = rgb_to_lab(images)
        ab = lab[:, 1:, :: self.stride, :: self.stride].contiguous()
        colored = (ab.abs() > GRAY).flatten(1).any(1)[:, None, None].expand(-1, *ab.shape[2:])
        inputs = {"image": (lab[:, :1] / 100).expand(-1, 3, -1, -1), "ab": ab, "weight": colored.to(ab.dtype)}
        if self.form == "classes":
            inputs["bins"], inputs["share"] = soft_encode(ab, self.bins, self.nearby, neighbors=NEIGHBORS)
            inputs["weight"] = inputs["weight"] * self.weights()[inputs["bins"][:, 0]]
            constant = (self.mean_target[1] / self.mean_target[1].sum()).log()[:, None, None]
            error = -(inputs["share"] * constant[inputs["bins"], 0, 0]).sum(1)
        else:
            error = (self.mean_target[1][:, None, None] - ab / SCALE).square().sum(1)
        if self.training:
            self._count(inputs, colored)
        return inputs | {"colored_pixels": colored.sum(), "constant_error": (inputs["weight"] * error).sum()}

    def _count(self, inputs: Batch, colored: Tensor) -> None:
        """Sum this step's targets over all processes, plain and weighted; the loss of this step does not see them."""
        pixels = colored[0].numel()
        for kind, weight in enumerate((colored, inputs["weight"])):
            if self.form == "classes":
                # Whole numbers add up to the same bits in any order.
                parts = (inputs["share"] * weight[:, None] * (1 << 20)).round().long().flatten()
                total = torch.zeros(len(self.bins), dtype=torch.long, device=parts.device)
                total = total.scatter_add_(0, inputs["bins"].flatten(), parts).to(self.recent.dtype) / (1 << 20)
            else:
                total = (inputs["ab"] / SCALE * weight[:, None]).sum((0, 2, 3))
            self.recent[kind] = average(total / pixels)
        self.recent_pictures.copy_(average(colored[:, 0, 0].to(self.recent.dtype).sum()))

    def after_step(self, progress: float) -> None:
        """Take the step's targets into the average over all so far."""
        self.pictures += self.recent_pictures
        self.mean_target += (self.recent - self.recent_pictures * self.mean_target) / self.pictures

    def predict(self, inputs: Batch) -> Batch:
        """`answer` (B, C, h / stride, h / stride): logits of 313 colors, or a and b in units of 110."""
        features = self.encoder(self.name)(inputs["image"])
        height, width = inputs["ab"].shape[2:]
        return {"answer": self.decoder(feature_map(features), (height, width))}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy with the soft code, or squared distance, over pixels of colored pictures."""
        answer, weight = outputs["answer"], inputs["weight"]
        if self.form == "classes":
            # The shares of a target add up to 1.
            error = answer.logsumexp(1) - (inputs["share"] * answer.gather(1, inputs["bins"])).sum(1)
        else:
            error = (answer - inputs["ab"] / SCALE).square().sum(1)
        # Weights are multiplied into the gradient; the value stays that of the error.
        boosted = error.detach() + weight * (error - error.detach())
        return {
            "loss": mean_over(boosted, weight > 0, inputs["colored_pixels"]),
            "relative_error": mean_over((weight * error).detach(), weight > 0, inputs["constant_error"]),
        }

    def concealed(self, inputs: Batch) -> Concealed:
        """The colors, of which nothing is left in the picture."""
        image = inputs["image"]
        kept = {"image", "colored_pixels", "constant_error"}
        hidden = {key: torch.ones_like(value, dtype=torch.bool) for key, value in inputs.items() if key not in kept}
        return Concealed(lambda inputs: self.predict(inputs)["answer"], hidden, shown=image.amax(1) != image.amin(1))

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The gray picture, its colors as fine as they are asked for, and those of the network."""
        light = inputs["image"][:, :1] * 100

        def paint(ab: Tensor) -> list[Tensor | str]:
            fine = F.interpolate(ab, size=light.shape[2:], mode="bilinear")
            return list(lab_to_rgb(torch.cat([light, fine], 1)))

        answer = outputs["answer"]
        found = annealed_mean(answer, self.bins) if self.form == "classes" else answer * SCALE
        return [
            Panel("input", list(inputs["image"])),
            Panel("target", paint(inputs["ab"])),
            Panel("prediction", paint(found)),
        ]
