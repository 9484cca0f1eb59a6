"""Barlow Twins: do two views say the same, and does each number say something else?

Zbontar, Jing, Misra, LeCun & Deny 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", arXiv
2103.03230. The cross-correlation matrix of the two views' embeddings, over the whole global batch, is drawn toward the
identity: ones on the diagonal (the views agree), zeros off it (no two dimensions repeat each other). For sounds the
views are two windows of one recording.

Known traps. The terms of the matrix are summed, not averaged: averaging changes their balance, and cost 8 points where
it was tried. Embeddings are standardized by the statistics of the *global* batch, without learned scale, so that every
process sees one matrix; a matrix that is averaged over processes after each standardized its own rows is another loss.
Published runs give biases and norms 0.024 of LARS's learning rate: `bias_lr`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.heads import mlp
from mmssl.modules.views import BYOL_VIEWS, Given
from mmssl.objectives.base import Chance, Panel
from mmssl.objectives.invariance._two_views import TwoViews
from mmssl.ops.gather import gather, process_share
from mmssl.ops.losses import off_diagonal, ranking, spread
from mmssl.ranges import Weight, Width

EPS = 1e-5


class BarlowTwins(TwoViews):
    """Draw the cross-correlation of two views' embeddings toward the identity.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images or sound decides the views.
        width: of the embedding, D.
        hidden: width of the projector's two hidden layers.
        redundancy: weight of the terms off the diagonal, lambda.
        bias_lr: learning rate of biases and norms over that of the weights; 0.024 in the published runs.
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
        redundancy: Weight = 0.0051,
        bias_lr: Weight = 1.0,
        views: Given = None,
    ) -> None:
        super().__init__(encoders, encoder, views, image=BYOL_VIEWS)
        self.width, self.redundancy = width, redundancy
        backbone = self.encoder(encoder)
        self.projection = mlp(backbone.dim, hidden, hidden, width, bias=False)
        for parameter in (*backbone.parameters(), *self.projection.parameters()):
            if parameter.ndim < 2 and bias_lr != 1:
                parameter.lr_scale = bias_lr  # type: ignore[attr-defined]

    def chance(self, rows: int) -> Chance:
        """Embeddings that say nothing correlate with nothing: all D diagonal terms are missing."""
        return Chance(float(self.width), {"ranking": 0.5})

    def predict(self, inputs: Batch) -> Batch:
        """`z` (B, 2, D)."""
        return {"z": self.each_view(inputs, self.encoder(self.name), self.projection)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Squared distance of the cross-correlation from the identity; logged unweighted: diagonal, off_diagonal."""
        z = gather(outputs["z"])
        first, second = standardize(z[:, 0]), standardize(z[:, 1])
        diagonal = ((first * second).mean(0) - 1).square().sum()
        redundancy = off_diagonal(first / len(z), second)
        share, shares = process_share()
        return {
            "loss": diagonal + self.redundancy * redundancy,
            "diagonal": diagonal,
            "off_diagonal": redundancy,
            "ranking": ranking(first.chunk(shares)[share], second.chunk(shares)[share]),
            "spread": spread(outputs["z"]),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both views, and for each row's first view the row whose second view correlates most."""
        first, second = standardize(outputs["z"][:, 0]), standardize(outputs["z"][:, 1])
        return self.nearest_panels(inputs["views"], torch.cosine_similarity(first[:, None], second[None], dim=-1))


def standardize(z: Tensor) -> Tensor:
    """Each dimension over the rows (N, D) to mean 0 and variance 1: BatchNorm without parameters, in training mode."""
    centered = z - z.mean(0)
    return centered * (centered.square().mean(0) + EPS).rsqrt()
