"""VICReg: do two views say the same, with numbers that vary and do not repeat each other?

Bardes, Ponce & LeCun 2022, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", arXiv
2105.04906. Two views' embeddings are drawn together (invariance), each dimension is kept from shrinking below a
standard deviation of 1 over the batch (variance), and the dimensions of each view are kept from repeating each other
(covariance). Nothing is normalized, and nothing asks that the two branches be alike. For sounds the views are two
windows of one recording.

Known traps. Paper and published code differ, and libraries follow one or the other (facebookresearch/vicreg, issues 8
and 26). The code, which made the published weights and is the default here (`form: official`), takes the mean of the
squared differences over rows *and* dimensions and halves the sum of the two views' hinges; the paper (`form: paper`)
sums the differences over dimensions and adds the hinges. With D = 8192 the paper's invariance term is 8192 times as
large. Statistics are those of the global batch, gathered with their gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.heads import mlp
from mmssl.modules.views import BYOL_VIEWS, Given
from mmssl.objectives.base import Chance, Panel
from mmssl.objectives.invariance._two_views import TwoViews
from mmssl.ops.gather import gather
from mmssl.ops.losses import off_diagonal, ranking
from mmssl.ranges import Weight, Width

EPS = 1e-4


class VICReg(TwoViews):
    """Variance, invariance and covariance of two views' embeddings.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images or sound decides the views.
        width: of the embedding, D.
        hidden: width of the expander's two hidden layers.
        invariance: weight of the distance between views.
        variance: weight of the hinge on standard deviations.
        covariance: weight of the squared covariances.
        form: how terms are averaged: `official` as in the published code, `paper` as in the paper's equations.
        views: what differs from the published views: settings of `ImageView` or `AudioView`, for both or one each.
    """

    meets = "loss"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        width: Width = 8192,
        hidden: Width = 8192,
        invariance: Weight = 25.0,
        variance: Weight = 25.0,
        covariance: Weight = 1.0,
        form: Literal["official", "paper"] = "official",
        views: Given = None,
    ) -> None:
        super().__init__(encoders, encoder, views, image=BYOL_VIEWS)
        self.form = form
        self.weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
        self.expander = mlp(self.encoder(encoder).dim, hidden, hidden, width)

    def chance(self, rows: int) -> Chance:
        """Embeddings that are all the same: no distance, no covariance, and a standard deviation of sqrt(1e-4)."""
        hinge = (1 - EPS**0.5) * (1 if self.form == "official" else 2)
        return Chance(self.weights["variance"] * hinge, {"ranking": 0.5})

    def predict(self, inputs: Batch) -> Batch:
        """`z` (B, 2, D)."""
        return {"z": self.each_view(inputs, self.encoder(self.name), self.expander)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The weighted sum, each term without its weight, and `spread`: deviations, at most 1, averaged over D."""
        first, second = outputs["z"].unbind(1)
        squares = (first - second).square()
        everyone = gather(outputs["z"])
        hinges, covariances = zip(*(self._regularize(z) for z in everyone.unbind(1)), strict=True)
        official = self.form == "official"
        terms = {
            "invariance": squares.mean() if official else squares.sum(1).mean(),
            "variance": sum(hinges) / (2 if official else 1),
            "covariance": sum(covariances),
        }
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        # Embeddings of no given length collapse to a point while their directions stay apart.
        room = 1 - torch.stack(hinges).mean()
        return {"loss": loss, **terms, "ranking": ranking(first, second), "spread": room}

    def _regularize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and covariance term of one view (N, D) of the global batch: equations 1 and 4 of the paper."""
        centered = z - z.mean(0)
        freedom = max(1, len(z) - 1)
        deviation = (centered.square().sum(0) / freedom + EPS).sqrt()
        return (1 - deviation).relu().mean(), off_diagonal(centered / freedom, centered) / z.shape[1]

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both views, and for each row's first view the row whose second view is nearest."""
        first, second = outputs["z"].unbind(1)
        return self.nearest_panels(inputs["views"], -torch.cdist(first, second))
