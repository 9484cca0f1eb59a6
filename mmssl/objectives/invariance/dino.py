"""DINO: to which prototype does a slowly moving teacher assign the whole, when the student sees a part?

Caron, Touvron, Misra, Jégou, Mairal, Bojanowski & Joulin 2021, "Emerging Properties in Self-Supervised Vision
Transformers", arXiv 2104.14294. The teacher, a moving average of the student, says for two large crops how likely each
of K prototypes is; the student says the same of these and of several small crops, and learns to agree across crops.
Centring (subtracting a moving mean) keeps one prototype from taking all, sharpening (a low temperature) keeps them from
becoming alike. For sounds, crops are windows of one recording, the small ones a fifth of it; no such setting is
published.

Known traps. A crop is not compared with itself: of 2 (2 + 8) pairs 18 count. The teacher is another object than the
student, sees the large crops alone, in training mode but without dropout, and is what leaves the run: the published
numbers are the teacher's. The center that a batch is centered by comes from the batches before it. Prototypes are unit
vectors (weight norm with its gain frozen), and stay as they are for the first share of the run. A loss that stays at
ln K is collapse to the uniform answer; a loss near 0 with `spread` near 0 is collapse to one prototype.
The published code clips the gradient of each parameter alone at 3, `training.clip` that of all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.prototypes import PrototypeHead
from mmssl.modules.teacher import cosine_momentum
from mmssl.modules.views import Given, encode_views
from mmssl.objectives._taught import Taught
from mmssl.objectives.base import Chance, Panel
from mmssl.objectives.invariance._multi_crop import MultiCrop, over_others
from mmssl.ops.gather import average
from mmssl.ops.losses import ranking, spread
from mmssl.ranges import Count, Share, Temperature, Width

COLOR = {"strength": 0.5, "saturation": 0.4}
GLOBAL_VIEWS = (
    COLOR | {"area": (0.4, 1.0), "blur": 1.0},
    COLOR | {"area": (0.4, 1.0), "blur": 0.1, "solarize": 0.2},
)
LOCAL_VIEWS = (COLOR | {"area": (0.05, 0.4), "size": 96 / 224, "blur": 0.5},)


class DINO(Taught, MultiCrop):
    """Match a momentum teacher's assignment to prototypes, from large and small crops.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images or sound decides the crops.
        prototypes: K.
        hidden: width of the head's two hidden layers.
        bottleneck: width of the unit vectors that are compared with the prototypes.
        batch_norm: in the head's hidden layers.
        local_crops: small crops of each row.
        student_temperature: divides the student's logits.
        teacher_temperature: divides the teacher's, at the first step and after `temperature_warmup`.
        temperature_warmup: share of the run in which the teacher's temperature moves from one to the other.
        center_momentum: share of itself that the center keeps in a step.
        momentum: share of itself that the teacher keeps at the first step; rises to 1 along a cosine.
        freeze_last: share of the run in which prototypes do not learn; one epoch of a hundred as published.
        views: what differs from the published large crops: settings of `ImageView` or `AudioView`, for both or each.
        local_views: the same for the small crops.

    Attributes:
        large: published settings of the large crops of images.
        small: of the small ones.
    """

    large: ClassVar[Sequence[Mapping[str, Any]]] = GLOBAL_VIEWS
    small: ClassVar[Sequence[Mapping[str, Any]]] = LOCAL_VIEWS
    center: Tensor
    progress: Tensor
    seen: Tensor
    seen_count: Tensor

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        prototypes: Width = 65536,
        hidden: Width = 2048,
        bottleneck: Width = 256,
        batch_norm: bool = False,
        local_crops: Count = 8,
        student_temperature: Temperature = 0.1,
        teacher_temperature: tuple[Temperature, Temperature] = (0.04, 0.04),
        temperature_warmup: Share = 0.0,
        center_momentum: Share = 0.9,
        momentum: Share = 0.996,
        freeze_last: Share = 0.01,
        views: Given = None,
        local_views: Given = None,
    ) -> None:
        super().__init__(encoders, encoder, views, local_views, local_crops, large=self.large, small=self.small)
        self.prototypes, self.student_temperature = prototypes, student_temperature
        self.teacher_temperature, self.temperature_warmup = teacher_temperature, temperature_warmup
        self.center_momentum, self.momentum, self.freeze_last = center_momentum, momentum, freeze_last
        student = self.encoder(encoder)
        self.head = PrototypeHead(student.dim, hidden, bottleneck, prototypes, batch_norm)
        self.begin_teaching()
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("progress", torch.zeros(()))
        # The teacher's logits in this step's micro-batches, until the center moves.
        self.register_buffer("seen", torch.zeros(prototypes), persistent=False)
        self.register_buffer("seen_count", torch.zeros(()), persistent=False)

    def _student(self) -> dict[str, nn.Module]:
        return {**super()._student(), "head": self.head}

    def chance(self, rows: int) -> Chance:
        """Any of K prototypes."""
        return Chance(math.log(self.prototypes), {"ranking": 0.5})

    def predict(self, inputs: Batch) -> Batch:
        """Logits (B, V, K) of the `student` for all V crops, (B, 2, K) of the `teacher` for the large ones.

        `z` (B, 2, bottleneck) are the student's unit vectors of the large crops.
        """
        z, student = self.head(self.encode_crops(inputs), self.progress < self.freeze_last)
        with torch.no_grad():
            _, teacher = self.teacher["head"](encode_views(self._taught, inputs["views"], inputs.get("valid")))
        return {"student": student, "teacher": teacher, "z": z[:, :2]}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy over the pairs of a teacher's crop and another crop of the student."""
        teacher = outputs["teacher"].detach()
        if self.training:
            self.seen += teacher.mean((0, 1))
            self.seen_count += 1
        wanted = self._assigned(teacher)
        answered = (outputs["student"] / self.student_temperature).log_softmax(-1)
        return {
            "loss": over_others(-(wanted.exp() @ answered.mT)).mean(),
            "teacher_entropy": -(wanted.exp() * wanted).sum(-1).mean(),
            "ranking": ranking(outputs["z"][:, 0], outputs["z"][:, 1]),
            "spread": spread(outputs["z"]),
        }

    def _assigned(self, teacher: Tensor) -> Tensor:
        """Logarithms of the shares of each prototype, of the teacher's logits (B, 2, K)."""
        return ((teacher - self.center) / self._warmed(self.teacher_temperature)).log_softmax(-1)

    def _warmed(self, temperature: tuple[float, float]) -> Tensor:
        """What it is now, between the first and the last."""
        start, end = temperature
        share = self.progress / self.temperature_warmup if self.temperature_warmup else torch.ones_like(self.progress)
        return start + (end - start) * share.clamp(max=1)

    def after_step(self, progress: float) -> None:
        """The teacher follows, the center moves toward the mean of the logits that this step saw."""
        self.progress.fill_(progress)
        self.teacher.follow(self._student(), cosine_momentum(self.momentum, progress))
        mean = average(self.seen / self.seen_count.clamp(min=1))
        self.center.lerp_(torch.where(self.seen_count > 0, mean, self.center), 1 - self.center_momentum)
        self.seen.zero_()
        self.seen_count.zero_()

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The crops, the likeliest prototype of each large one, and where the teacher looks in the first."""
        views = inputs["views"]
        scale = self.encoder(self.name).scale(views[0, 0])
        taught = (outputs["teacher"] - self.center).argmax(-1).tolist()
        answered = outputs["student"][:, :2].argmax(-1).tolist()
        lines = [f"teacher {a[0]}, {a[1]}; student {b[0]}, {b[1]}" for a, b in zip(taught, answered, strict=True)]
        valid = inputs.get("valid")
        focus = _focus(self._taught, views[:, 0], None if valid is None else valid[:, 0])
        lit = focus if views.ndim == 4 else views[:, 0] * (0.15 + 0.85 * focus[:, None])
        return [
            *self.crop_panels(inputs),
            Panel("prototypes of 1 and 2", lines),
            Panel("teacher looks at", list(lit), scale=scale),
        ]


def _focus(encoder: Encoder, x: Tensor, valid: Tensor | None) -> Tensor:
    """Where the encoder looks in `x`, (B, H, W) from 0 to 1.

    What its class token attends to, where the encoder tells; else the cosine of each place with the pooled vector.
    """
    tokens, pooled, grid, _ = encoder(x, valid)
    weight = encoder.attention(x, valid)
    if weight is None:
        weight = torch.cosine_similarity(tokens, pooled[:, None], dim=-1)
    maps = F.interpolate(weight.unflatten(1, grid)[:, None], x.shape[-2:], mode="bilinear")[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)
