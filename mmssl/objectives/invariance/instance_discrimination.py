"""Instance discrimination: which row of the data set is this, out of all that a memory holds?

Wu, Xiong, Yu & Lin 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv 1805.01978.
Every row is a class of its own, and what stands for it is its vector from its last visit, in a bank of as many vectors
as the data have rows. A new view is to be told by its cosines with them: over all rows (form `softmax`), or by
noise-contrastive estimation against rows drawn by lot (form `nce`, equations 5 to 7), where the normalizing constant is
estimated on the first batch and then stays.

A row is known by its number in the source, so that one has to be lasting: a stream is refused. The bank takes 4 bytes
times width and rows, 0.66 GB for ImageNet, and is part of the checkpoint.

Known traps. The bank is noise until each row was seen once: nothing can be right in the first epoch. The view is
compared with the vector of an earlier visit, which moves afterwards. The constant is no parameter: with a gradient, it
would absorb the loss. Noise may draw the row itself, which the estimate allows for and `ranking` leaves out. The
published term that keeps a vector near its last one is left out, as in the published code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.views import Given, Views, encode_views
from mmssl.objectives.base import EMBEDDINGS, Chance, Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.gather import average, gather
from mmssl.ops.losses import found, spread
from mmssl.ranges import Positive, Share, Temperature, Width

VIEW = {"area": (0.2, 1.0), "jitter": 1.0, "strength": 0.5, "blur": 0.0}


class InstanceDiscrimination(Objective):
    """Tell a view's row by the vectors of all rows from their last visit.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images, clips or sound decides the view.
        rows: of the data, n; counted where left out.
        form: `nce`, or `softmax` over all rows.
        width: of the vectors.
        temperature: divides the cosine similarity.
        negatives: rows drawn by lot for each row in form `nce`, m.
        momentum: share of itself that a vector in the bank keeps when its row is seen.
        views: what differs from the published view: settings of `ImageView` or `AudioView`.
    """

    meets = "loss"
    bank: Tensor
    partition: Tensor

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        rows: Positive | None = None,
        form: Literal["nce", "softmax"] = "nce",
        width: Width = 128,
        temperature: Temperature = 0.07,
        negatives: Positive = 4096,
        momentum: Share = 0.5,
        views: Given = None,
    ) -> None:
        super().__init__(encoders)
        if rows is None:
            raise RecipeError("instance_discrimination keeps a vector of each row, and rows should say how many")
        net = self.encoder(encoder)
        self.name, self.form, self.temperature, self.momentum = encoder, form, temperature, momentum
        self.negatives = negatives
        self.views = Views(net, views, 1, image=(VIEW,))
        self.needs = self.views.needs
        self.projection = nn.Linear(net.dim, width)
        self.register_buffer("bank", F.normalize(torch.randn(rows, width), dim=1))
        self.register_buffer("partition", torch.zeros(()))
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    def chance(self, rows: int) -> Chance:
        """Any row of the bank; of `nce` the posterior of a row that is as likely as the noise makes it."""
        epoch = -(-len(self.bank) // rows)
        if self.form == "softmax":
            level = 1 / len(self.bank)
            return Chance(-math.log(level), {"accuracy": level}, {"loss": epoch, "accuracy": epoch})
        m = self.negatives
        level = math.log(m + 1) + m * math.log1p(1 / m)
        return Chance(level, {"ranking": 0.5}, {"loss": epoch, "ranking": epoch})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`views` (B, 1, ...), of sounds what is `valid`; `row` int64 (B,), in form `nce` also `noise` (B, m)."""
        crops = self.views(batch, draws, self.encoder(self.name))
        inputs = dict(zip(("views", "valid"), crops, strict=False)) | {"row": batch["id"]}
        return inputs | ({"noise": draws.integers(len(self.bank), self.negatives)} if self.form == "nce" else {})

    def predict(self, inputs: Batch) -> Batch:
        """`z` (B, 1, width), unit vectors."""
        pooled = encode_views(self.encoder(self.name), inputs["views"], inputs.get("valid"))
        return {"z": F.normalize(self.projection(pooled), dim=-1)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy over all rows, and how often the own vector is the nearest; or that of row against noise.

        Of the latter `ranking` says how often the own vector is nearer than that of another row.
        """
        z, row = outputs["z"][:, 0], inputs["row"]
        constant = self.partition
        if self.form == "softmax":
            logits = z @ self.bank.T / self.temperature
            losses = {"loss": F.cross_entropy(logits, row), "accuracy": found(logits, row)}
        else:
            rows = torch.cat([row[:, None], inputs["noise"]], dim=1)
            scores = (self.bank[rows] @ z[:, :, None])[:, :, 0] / self.temperature
            first = average(scores.exp().mean()) * len(self.bank)
            constant = torch.where(self.partition > 0, self.partition, first)
            odds = scores - constant.log() - math.log(self.negatives / len(self.bank))
            own, noise = F.softplus(-odds[:, 0]), F.softplus(odds[:, 1:]).sum(1)
            losses = {"loss": (own + noise).mean(), "ranking": _ranked(scores, rows)}
        if self.training:
            self._seen = (gather(row), gather(z.detach()), constant)
        return losses | {"spread": spread(z)}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The vectors of the rows that were seen move toward what they are now; the first constant stays."""
        if self._seen is None:
            return
        row, z, constant = self._seen
        self.bank[row] = F.normalize(self.momentum * self.bank[row] + (1 - self.momentum) * z, dim=1)
        self.partition.copy_(constant)
        self._seen = None

    def drawn_together(self, inputs: Batch) -> dict[str, Tensor]:
        """The embedding of the view."""
        return {EMBEDDINGS: self.predict(inputs)["z"]}

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The view, the row of these whose remembered vector is nearest, and the own one's place among all."""
        views, z, row = inputs["views"][:, 0], outputs["z"][:, 0], inputs["row"]
        scale = self.encoder(self.name).scale(views[0])
        nearest = (z @ self.bank[row].T).argmax(1)
        place = (z @ self.bank.T > (z * self.bank[row]).sum(1, keepdim=True)).sum(1).tolist()
        right = [of == own for own, of in enumerate(nearest.tolist())]
        lines = [f"{before + 1} of {len(self.bank)}" for before in place]
        return [
            Panel("view", list(views), scale=scale),
            Panel("nearest of these in the bank", list(views[nearest]), right, scale),
            Panel("place of its own vector", lines, [before == 0 for before in place]),
        ]


@torch.no_grad()
def _ranked(scores: Tensor, rows: Tensor) -> Tensor:
    """How often the first score is above another row's, 0-dim; ties count half, 0.5 where there is no other row."""
    own, others = scores[:, :1], scores[:, 1:]
    valid = rows[:, 1:] != rows[:, :1]
    wins = ((others < own).to(scores.dtype) + (others == own) / 2) * valid
    return torch.where(valid.any(), wins.sum() / valid.sum().clamp(min=1), 0.5).to(scores.dtype)
