"""Contrastive pairs: which `b` belongs to which `a`, for instance which caption to which image?

Form `clip`, cross-entropy over rows and over columns: Radford et al. 2021, "Learning Transferable Visual Models From
Natural Language Supervision", arXiv 2103.00020. With `smoothing` and a scale of 1 it is ALIGN (Jia et al. 2021, arXiv
2102.05918), with equal positives UniCL (Yang et al. 2022, arXiv 2204.03610) and Florence (Yuan et al. 2021, arXiv
2111.11432), with a frozen encoder LiT (Zhai et al. 2022, arXiv 2111.07991). Form `siglip`, one binary decision a
combination: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343. Formulas: see
`mmssl.ops.pairs`. Each process compares its own rows with everybody's.

Known traps. Gathering without gradient scales or turns the towers' gradient while the loss looks right. The learnable
scale is clamped after the step, to at most 100. A small batch wants a bias nearer 0 than SigLIP's -10: the best
constant is -ln(B - 1). A caption that stands twice in a batch is a negative of itself, unless positives are equal
items; empty captions are equal ones, too.
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
from mmssl.encoders.fusion import FusionEncoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Chance, Objective, Pair, Panel
from mmssl.ops.augment import draw_crops, resized_crop
from mmssl.ops.draws import Draws
from mmssl.ops.pairs import fingerprint, info_nce, sigmoid_pairs

LARGEST_SCALE = 100.0


class Contrastive(Objective):
    """Match the two sides of a pair among all pairs of the global batch.

    Args:
        encoders: holds both encoders.
        a: name of the first encoder.
        b: name of the second.
        fusion: name of a multiway fusion through which each side goes alone, as in BEiT-3 (arXiv 2208.10442); null for
            the encoders themselves.
        form: `clip` or `siglip`.
        width: of the shared space; None for the encoders' own, where it is one: towers of open_clip then leave as a
            whole CLIP, with the scale and the bias.
        scale: initial factor of the cosine, 1 / temperature; 1 / 0.07 for clip and 10 for siglip where left out.
        bias: initial bias of siglip's logits.
        positives: `pair` for each row's own partner alone; `equal` for the partners of all rows with the same `a` or
            the same `b`, byte by byte before augmentation, such as equal captions or several captions of one image.
        smoothing: share of clip's targets that is spread over all rows; 0.1 in ALIGN.
        chunk: rows of logits at a time, in which memory then grows with the batch and not with its square, for a
            third more arithmetic in the loss; None for all at once.
        area: smallest and largest share of an image that its random square crop covers; None for the whole image.
    """

    meets = "loss"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        a: str = "image",
        b: str = "text",
        fusion: str | None = None,
        form: Literal["clip", "siglip"] = "clip",
        width: int | None = 512,
        scale: float | None = None,
        bias: float = -10.0,
        positives: Literal["pair", "equal"] = "pair",
        smoothing: float = 0.0,
        chunk: int | None = None,
        area: tuple[float, float] | None = (0.9, 1.0),
    ) -> None:
        super().__init__(encoders)
        if a == b:
            raise RecipeError(f"contrastive compares two encoders, a and b are both '{a}'")
        if smoothing and form == "siglip":
            raise RecipeError("contrastive: smoothing spreads targets of a softmax, and siglip has none; set form=clip")
        if not 0 <= smoothing < 1:
            raise RecipeError(f"contrastive: smoothing = {smoothing} should be a share from 0 to below 1")
        if chunk is not None and chunk < 1:
            raise RecipeError(f"contrastive: chunk = {chunk} should be a number of rows, or null for all at once")
        scale = (1 / 0.07 if form == "clip" else 10.0) if scale is None else scale
        if not 1 <= scale <= LARGEST_SCALE:
            raise RecipeError(f"contrastive: scale = {scale} should be from 1 to {LARGEST_SCALE:g}, where it is kept")
        both = None if fusion is None else self.encoder(fusion)
        if both is not None and not (
            isinstance(both, FusionEncoder) and both.kind == "multiway" and list(both.reads) == [a, b]
        ):
            raise RecipeError(
                f"contrastive: fusion = '{fusion}' should take one side alone, and be a timm vision transformer: "
                f"{{modality: fusion, model: timm/vit_base_patch16_224, reads: [{a}, {b}]}}"
            )
        self.a, self.b, self.form, self.width, self.area, self.fusion = a, b, form, width, area, fusion
        self.positives, self.smoothing, self.chunk = positives, smoothing, chunk
        self.modalities = {side: self.encoder(name).modality for side, name in (("a", a), ("b", b))}
        self.needs = tuple(dict.fromkeys(self.modalities.values()))
        widths = (both.dim, both.dim) if both is not None else (self.encoder(a).dim, self.encoder(b).dim)
        if width is None and widths[0] != widths[1]:
            raise RecipeError(
                f"contrastive: width = null keeps the encoders' own, and '{a}' has {widths[0]} and '{b}' {widths[1]}; "
                "set one, for instance width=512"
            )
        self.project_a, self.project_b = (
            nn.Identity() if width is None else nn.Linear(own, width, bias=False) for own in widths
        )
        # Of one entry each: FSDP2 shards no parameter without dimensions.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        if form == "siglip":
            self.logit_bias = nn.Parameter(torch.tensor([bias]))

    def chance(self, rows: int) -> Chance:
        """One `b` among B. For siglip the loss of the best constant logit, which is that of probability 1 / B."""
        loss: float | None = math.log(rows)
        if self.form == "siglip" and self.positives == "equal":
            loss = None  # the best constant is that of how many are equal, which the data tell
        elif self.form == "siglip" and rows > 1:
            loss = math.log(rows) + (rows - 1) * math.log(rows / (rows - 1))
        return Chance(loss, dict.fromkeys(self._metrics(), 1 / rows))

    def _metrics(self) -> tuple[str, str]:
        return f"accuracy_{self.a}_to_{self.b}", f"accuracy_{self.b}_to_{self.a}"

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Both sides as they are, images cropped: `a`, `b`, and `a_mask`, `b_mask` where the batch has masks.

        `items` int64 (B, 2), where equal items are positives: a number for each `a` and each `b`.
        """
        inputs = {}
        if self.positives == "equal":
            inputs["items"] = torch.stack([fingerprint(batch[key]) for key in self.modalities.values()], dim=1)
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
        pooled = features.pooled if self.fusion is None else self.encoder(self.fusion)(features, None).pooled
        return F.normalize(self.project_a(pooled), dim=-1)

    def embed_b(self, features: Features) -> Tensor:
        """Unit vectors (B, width) in the shared space."""
        pooled = features.pooled if self.fusion is None else self.encoder(self.fusion)(None, features).pooled
        return F.normalize(self.project_b(pooled), dim=-1)

    @property
    def pairs(self) -> tuple[Pair, ...]:
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
        a, b, items = outputs["a"], outputs["b"], inputs.get("items")
        if self.form == "clip":
            loss, *accuracies = info_nce(a, b, scale, items=items, smoothing=self.smoothing, chunk=self.chunk)
        else:
            loss, *accuracies = sigmoid_pairs(a, b, scale, self.logit_bias[0], items=items, chunk=self.chunk)
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
