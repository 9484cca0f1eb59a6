"""SimCLR: which two views come from the same image, the same clip or the same sound?

Chen, Kornblith, Norouzi & Hinton 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
arXiv 2002.05709. Two random views of each row are drawn together and those of all other rows pushed apart, over the
whole global batch. Images are cropped, mirrored, recolored and blurred as in the paper, the frames of a clip all alike
and, with `views: {frames: 16}`, from two moments of it (CVRL, arXiv 2008.03800); sounds give two windows of one
recording, as in COLA and BYOL-A.

The projection is that of the published code, Linear, BatchNorm, ReLU, Linear, BatchNorm (the last one without shift),
where the paper's equation has no norms.

Known traps. A view's similarity with itself is masked, not subtracted (its gradient must go too). Negatives come from
all processes, with gradient. For 32-pixel images the paper leaves out the blur and halves the color distortion:
`views: {blur: 0, strength: 0.5}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.heads import mlp
from mmssl.modules.views import Given, encode_views
from mmssl.objectives.base import Chance, Panel
from mmssl.objectives.invariance._two_views import TwoViews
from mmssl.ops.losses import nt_xent, spread
from mmssl.ranges import Temperature, Width


class SimCLR(TwoViews):
    """Contrast two views of a row with those of all other rows.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images, clips or sound decides the views.
        width: of the projection.
        hidden: width of the projection's hidden layer; that of the encoder where left out.
        temperature: divides the cosine similarity.
        views: what differs from the published views: settings of `ImageView` or `AudioView`, for both or one each.
    """

    meets = "loss"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        width: Width = 128,
        hidden: Width | None = None,
        temperature: Temperature = 0.1,
        views: Given = None,
    ) -> None:
        super().__init__(encoders, encoder, views)
        self.temperature = temperature
        dim = self.encoder(encoder).dim
        self.projection = mlp(dim, hidden or dim, width, bias=False, last_norm="scale")

    def chance(self, rows: int) -> Chance:
        """One partner among the 2N - 1 other views."""
        others = 2 * rows - 1
        return Chance(math.log(others), {"accuracy": 1 / others})

    def predict(self, inputs: Batch) -> Batch:
        """`z` (B, 2, width), unit vectors; both views of a row in one pass, so that BatchNorm sees them together."""
        pooled = encode_views(self.encoder(self.name), inputs["views"], inputs.get("valid"))
        return {"z": F.normalize(self.projection(pooled.flatten(0, 1)), dim=-1).unflatten(0, pooled.shape[:2])}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """NT-Xent over the global batch; accuracy: how often the partner is the nearest view."""
        first, second = outputs["z"].unbind(1)
        loss, accuracy = nt_xent(first, second, self.temperature)
        return {"loss": loss, "accuracy": accuracy, "spread": spread(outputs["z"])}

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both views, and for each row's first view the row whose second view is nearest."""
        first, second = outputs["z"].unbind(1)
        return self.nearest_panels(inputs["views"], first @ second.T)
