"""Contrastive pairs: which `b` belongs to which `a`, for instance which caption to which image?

Form `clip`, cross-entropy over rows and over columns: Radford et al. 2021, "Learning Transferable Visual Models From
Natural Language Supervision", arXiv 2103.00020. With `smoothing` and a temperature of 1 it is ALIGN (Jia et al. 2021,
arXiv 2102.05918), with equal positives UniCL (Yang et al. 2022, arXiv 2204.03610) and Florence (Yuan et al. 2021,
arXiv 2111.11432), with a frozen encoder LiT (Zhai et al. 2022, arXiv 2111.07991). Form `siglip`, one binary decision a
combination: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343. Formulas: see
`mmssl.ops.pairs`. Of clips and their sound it is AVID with negatives from the batch (Morgado et al. 2021, arXiv
2004.12943), of sounds and texts CLAP (Wu et al. 2023, arXiv 2211.06687). Each process compares its own rows with
everybody's.

Known traps. Gathering without gradient scales or turns the towers' gradient while the loss looks right. The learned
temperature is kept at 0.01 or above, after the step. A small batch wants a bias nearer 0 than SigLIP's -10: the best
constant is -ln(B - 1). A caption that is twice in a batch is a negative of itself, unless positives are equal
items; empty captions are equal ones, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.encoders.fusion import FusionEncoder
from mmssl.errors import RecipeError
from mmssl.modules.heads import mlp
from mmssl.modules.views import Crop
from mmssl.objectives._two_sides import TwoSides
from mmssl.objectives.base import Chance, Pair, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.pairs import fingerprint, info_nce, sigmoid_pairs
from mmssl.ranges import BelowOne, Positive, Width

TEMPERATURE = {"clip": 0.07, "siglip": 0.1}
COLDEST = 0.01
VIEWS = {"area": (0.9, 1.0)}


class Contrastive(TwoSides):
    """Match the two sides of a pair among all pairs of the global batch.

    Args:
        encoders: holds both encoders.
        a: name of the first encoder.
        b: name of the second.
        fusion: name of a multiway fusion through which each side goes alone, as in BEiT-3 (arXiv 2208.10442); null for
            the encoders themselves.
        form: `clip` or `siglip`.
        width: of the shared space; None for the encoders' own, where it is one: towers of open_clip then leave as a
            whole CLIP, with the logit scale and the bias.
        hidden: width of a hidden layer with ReLU before the shared space, as in AVID and CLAP; None for a linear map.
        temperature: initial value of what divides the cosine, learned from 0.01 to 1; 0.07 for clip and 0.1 for siglip
            where left out.
        bias: initial bias of siglip's logits.
        positives: `pair` for each row's own partner alone; `equal` for the partners of all rows with the same `a` or
            the same `b`, byte by byte before augmentation, such as equal captions or several captions of one image.
        smoothing: share of clip's targets that is spread over all rows; 0.1 in ALIGN.
        chunk: rows of logits at a time, in which memory then grows with the batch and not with its square, for a
            third more arithmetic in the loss; None for all at once.
        views: of images and clips: how they are cropped, see `Crop`.
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
        width: Width | None = 512,
        hidden: Width | None = None,
        temperature: Annotated[float, Ge(COLDEST), Le(1)] | None = None,
        bias: float = -10.0,
        positives: Literal["pair", "equal"] = "pair",
        smoothing: BelowOne = 0.0,
        chunk: Positive | None = None,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders, a, b, Crop.of(VIEWS, views))
        if a == b:
            raise RecipeError(f"contrastive compares two encoders, a and b are both '{a}'")
        if smoothing and form == "siglip":
            raise RecipeError("contrastive: smoothing spreads targets of a softmax, and siglip has none; set form=clip")
        temperature = TEMPERATURE[form] if temperature is None else temperature
        both = None if fusion is None else self.encoder(fusion)
        if both is not None and not (
            isinstance(both, FusionEncoder) and both.kind == "multiway" and list(both.reads) == [a, b]
        ):
            raise RecipeError(
                f"contrastive: fusion = '{fusion}' should take one side alone, and be a timm vision transformer: "
                f"{{modality: fusion, model: timm/vit_base_patch16_224, reads: [{a}, {b}]}}"
            )
        self.fusion, self.form, self.width = fusion, form, width
        self.positives, self.smoothing, self.chunk = positives, smoothing, chunk
        widths = [both.dim, both.dim] if both is not None else [side.encoder.dim for side in self.sides.values()]
        if width is None and widths[0] != widths[1]:
            raise RecipeError(
                f"contrastive: width = null keeps the encoders' own, and '{a}' has {widths[0]} and '{b}' {widths[1]}; "
                "set one, for instance width=512"
            )
        if width is None and hidden is not None:
            raise RecipeError("contrastive: a hidden layer is before a shared space; set width, or leave hidden out")
        layers = () if hidden is None else (hidden,)
        self.project_a, self.project_b = (
            nn.Identity() if width is None else _projection(own, *layers, width) for own in widths
        )
        # Of one entry each: FSDP2 shards no parameter without dimensions.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / temperature)]))
        if form == "siglip":
            self.logit_bias = nn.Parameter(torch.tensor([bias]))

    def chance(self, rows: int) -> Chance:
        """One `b` among B. For siglip the loss of the best constant logit, which is that of probability 1 / B."""
        loss: float | None = math.log(rows)
        if self.form == "siglip" and self.positives == "equal":
            loss = None  # the best constant is that of how many are equal, which the data tell
        elif self.form == "siglip" and rows > 1:
            loss = math.log(rows) + (rows - 1) * math.log(rows / (rows - 1))
        return Chance(loss, dict.fromkeys(self.accuracies, 1 / rows))

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Both sides, see `Side`; where equal items are positives, `items` int64 (B, 2): numbers of `a` and `b`."""
        inputs = self.read(batch, draws)
        if self.positives == "equal":
            inputs["items"] = torch.stack([fingerprint(batch[side.modality]) for side in self.sides.values()], dim=1)
        return inputs

    def embed(self, key: str, features: Features) -> Tensor:
        """Unit vectors (B, width) in the shared space, through the fusion where there is one."""
        if self.fusion is not None:
            alone = (features, None) if key == "a" else (None, features)
            features = features._replace(pooled=self.encoder(self.fusion)(*alone).pooled)
        return super().embed(key, features)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Both encoders, by the cosine in the shared space."""
        bare = self.width is None and self.fusion is None
        scalars = dict(self.named_parameters(recurse=False)) if bare else {}
        embed = partial(self.embed, "a"), partial(self.embed, "b")
        maps = self.project_a, self.project_b
        linear = isinstance(maps[0], nn.Linear) and isinstance(maps[1], nn.Linear) and self.fusion is None
        project = cast(tuple[nn.Linear, nn.Linear], maps) if linear else None
        return (Pair(self.a, self.b, embed=embed, scalars=scalars, project=project),)

    def predict(self, inputs: Batch) -> Batch:
        """`a` and `b` (B, width), unit vectors."""
        return {key: self.embed(key, side.features(inputs)) for key, side in self.sides.items()}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The form's loss over the global batch, retrieval accuracy in both directions, the temperature."""
        scale = self.logit_scale[0].exp()
        a, b, items = outputs["a"], outputs["b"], inputs.get("items")
        if self.form == "clip":
            loss, *accuracies = info_nce(a, b, scale, items=items, smoothing=self.smoothing, chunk=self.chunk)
        else:
            loss, *accuracies = sigmoid_pairs(a, b, scale, self.logit_bias[0], items=items, chunk=self.chunk)
        return {"loss": loss, **dict(zip(self.accuracies, accuracies, strict=True)), "temperature": 1 / scale.detach()}

    def after_step(self, progress: float) -> None:
        """Keep the temperature in [0.01, 1]."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, math.log(1 / COLDEST))

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both sides, and the nearest `b` to each `a` among the rows shown."""
        nearest = (outputs["a"] @ outputs["b"].T).argmax(1)
        (a, b), (first, second) = zip(*((s.cells(inputs), s.scale(inputs)) for s in self.sides.values()), strict=True)
        found = [b[int(i)] for i in nearest]
        # Another row of the same text is as right.
        right = [int(i) == row or (isinstance(b[row], str) and b[row] == found[row]) for row, i in enumerate(nearest)]
        return [
            Panel(self.a, a, scale=first),
            Panel(self.b, b, scale=second),
            Panel(f"nearest {self.b}", found, right, second),
        ]


def _projection(*widths: int) -> nn.Module:
    """A linear map, or one with a hidden layer."""
    return nn.Linear(*widths, bias=False) if len(widths) == 2 else mlp(*widths, norm=False)
