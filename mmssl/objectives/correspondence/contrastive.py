"""Contrastive pairs: which `b` belongs to which `a`, for instance which caption to which image?

Form `clip`: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv
2103.00020: cross-entropy over rows and over columns. Form `siglip`: Zhai et al. 2023, "Sigmoid Loss for Language Image
Pre-Training", arXiv 2303.15343: one binary decision a combination. Each process compares its own rows with everybody's.

Known traps. Gathering without gradient scales or turns the towers' gradient while the loss looks right. The learnable
scale is clamped after the step, to at most 100. A small batch wants a bias nearer 0 than SigLIP's -10: the best
constant is -ln(B - 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Chance, Objective, Pair, Panel
from mmssl.ops.augment import draw_crops, resized_crop
from mmssl.ops.draws import Draws
from mmssl.ops.losses import info_nce, sigmoid_pairs

LARGEST_SCALE = 100.0


class Contrastive(Objective):
    """Match the two sides of a pair among all pairs of the global batch.

    Args:
        encoders: holds both encoders.
        a: name of the first encoder.
        b: name of the second.
        form: `clip` or `siglip`.
        width: of the shared space.
        scale: initial factor of the cosine, 1 / temperature; 1 / 0.07 for clip and 10 for siglip where left out.
        bias: initial bias of siglip's logits.
        area: smallest and largest share of an image that its random square crop covers; None for the whole image.
    """

    coupled = True

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        a: str = "image",
        b: str = "text",
        form: Literal["clip", "siglip"] = "clip",
        width: int = 512,
        scale: float | None = None,
        bias: float = -10.0,
        area: tuple[float, float] | None = (0.9, 1.0),
    ) -> None:
        super().__init__(encoders)
        if a == b:
            raise RecipeError(f"contrastive compares two encoders, a and b are both '{a}'")
        self.a, self.b, self.form, self.area = a, b, form, area
        self.modalities = {side: self.encoder(name).modality for side, name in (("a", a), ("b", b))}
        self.needs = tuple(dict.fromkeys(self.modalities.values()))
        self.project_a = nn.Linear(self.encoder(a).dim, width, bias=False)
        self.project_b = nn.Linear(self.encoder(b).dim, width, bias=False)
        # Of one entry each: FSDP2 shards no parameter without dimensions.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(scale or (1 / 0.07 if form == "clip" else 10.0))]))
        if form == "siglip":
            self.logit_bias = nn.Parameter(torch.tensor([bias]))

    def chance(self, rows: int) -> Chance:
        """One `b` among B. For siglip the loss of the best constant logit, which is that of probability 1 / B."""
        loss = math.log(rows)
        if self.form == "siglip" and rows > 1:
            loss += (rows - 1) * math.log(rows / (rows - 1))
        return Chance(loss, dict.fromkeys(self._metrics(), 1 / rows))

    def _metrics(self) -> tuple[str, str]:
        return f"accuracy_{self.a}_to_{self.b}", f"accuracy_{self.b}_to_{self.a}"

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Both sides as they are, images cropped: `a`, `b`, and `a_mask`, `b_mask` where the batch has masks."""
        inputs = {}
        for side, modality in self.modalities.items():
            inputs[side] = batch[modality]
            if modality == "image" and self.area is not None:
                images = batch["image"]
                boxes = draw_crops(draws, 1, *images.shape[-2:], area=self.area)[:, 0]
                unflipped = torch.zeros(len(images), dtype=torch.bool, device=images.device)
                inputs[side] = resized_crop(images, boxes, min(images.shape[-2:]), unflipped)
            if f"{modality}_mask" in batch:
                inputs[f"{side}_mask"] = batch[f"{modality}_mask"]
        return inputs

    def embed_a(self, features: Features) -> Tensor:
        """Unit vectors (B, width) in the shared space."""
        return F.normalize(self.project_a(features.pooled), dim=-1)

    def embed_b(self, features: Features) -> Tensor:
        """Unit vectors (B, width) in the shared space."""
        return F.normalize(self.project_b(features.pooled), dim=-1)

    def compares(self) -> tuple[Pair, ...]:
        """Both encoders, by the cosine in the shared space."""
        return (Pair(self.a, self.b, embed=(self.embed_a, self.embed_b)),)

    def predict(self, inputs: Batch) -> Batch:
        """`a` and `b` (B, width), unit vectors."""
        a = self.encoder(self.a)(inputs["a"], inputs.get("a_mask"))
        b = self.encoder(self.b)(inputs["b"], inputs.get("b_mask"))
        return {"a": self.embed_a(a), "b": self.embed_b(b)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The form's loss over the global batch, retrieval accuracy in both directions, the scale."""
        scale = self.logit_scale[0].exp()
        if self.form == "clip":
            loss, *accuracies = info_nce(outputs["a"], outputs["b"], scale)
        else:
            loss, *accuracies = sigmoid_pairs(outputs["a"], outputs["b"], scale, self.logit_bias[0])
        return {"loss": loss, **dict(zip(self._metrics(), accuracies, strict=True)), "scale": scale.detach()}

    def after_step(self, progress: float) -> None:
        """Keep the scale in [1, 100]."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, math.log(LARGEST_SCALE))

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both sides, and the `b` that the network finds for each `a` among the rows shown."""
        found = (outputs["a"] @ outputs["b"].T).argmax(1)
        b = self._cells(inputs, "b")
        return [
            Panel(self.a, self._cells(inputs, "a")),
            Panel(self.b, b),
            Panel("found", [b[int(i)] for i in found]),
        ]

    def _cells(self, inputs: Batch, side: str) -> list[Tensor | str]:
        value, name = inputs[side], self.a if side == "a" else self.b
        if self.modalities[side] == "text":
            tokenizer = cast(TextEncoder, self.encoder(name)).tokenizer
            masks = inputs.get(f"{side}_mask", torch.ones_like(value, dtype=torch.bool))
            return [tokenizer.decode(ids[mask]) for ids, mask in zip(value, masks, strict=True)]
        return list(value / 255 if value.dtype == torch.uint8 else value)
