"""SimSiam: what does the same network say about the other view?

Chen & He 2021, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566. One network, two views of a row:
a predictor answers, from each view, with the projection of the other one, through which no gradient flows. Neither
negatives nor a second network keep it from collapsing, only that missing gradient.

Known traps. The projection ends in a BatchNorm without scale and shift, and no Linear before a BatchNorm has a bias;
the prediction ends in a Linear. The predictor's learning rate does not decay. A collapsed network has a loss near -1:
read `spread` with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.heads import mlp
from mmssl.modules.views import Given
from mmssl.objectives.base import Chance, Panel
from mmssl.objectives.invariance._two_views import TwoViews
from mmssl.ops.losses import ranking, spread
from mmssl.ranges import Width

IMAGE_VIEWS = ({"strength": 0.5, "area": (0.2, 1.0)},)


class SimSiam(TwoViews):
    """Predict the projection of the other view, and stop the gradient there.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images or sound decides the views.
        width: of projection and prediction.
        hidden: width of the projection's two hidden layers; that of the encoder where left out.
        bottleneck: width of the predictor's hidden layer.
        fix_pred_lr: whether the predictor keeps the peak learning rate throughout the run.
        views: what differs from the published views: settings of `ImageView` or `AudioView`, for both or one each.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        width: Width = 2048,
        hidden: Width | None = None,
        bottleneck: Width = 512,
        fix_pred_lr: bool = True,
        views: Given = None,
    ) -> None:
        super().__init__(encoders, encoder, views, image=IMAGE_VIEWS)
        dim = self.encoder(encoder).dim
        inner = hidden or dim
        self.projection = mlp(dim, inner, inner, width, bias=False, last_norm="plain")
        self.prediction = mlp(width, bottleneck, width, bias=False, last_bias=True)
        if fix_pred_lr:
            for parameter in self.prediction.parameters():
                parameter.lr_constant = True  # type: ignore[attr-defined]

    def chance(self, rows: int) -> Chance:
        """An answer at a right angle to what was asked; its rank among the rows is any."""
        return Chance(0.0, {"ranking": 0.5})

    def predict(self, inputs: Batch) -> Batch:
        """Unit vectors (B, 2, width): the projection `z` of each view, and the prediction `p` from it."""
        z = self.each_view(inputs, self.encoder(self.name), self.projection)
        p = torch.stack([self.prediction(view) for view in z.unbind(1)], dim=1)
        return {"z": F.normalize(z, dim=-1), "p": F.normalize(p, dim=-1)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Minus the cosine of each prediction and the projection of the other view, averaged over both."""
        p, z = outputs["p"], outputs["z"].detach().flip(1)
        return {
            "loss": -(p * z).sum(-1).mean(),
            "ranking": ranking(p[:, 0], z[:, 0]),
            "spread": spread(z),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both views, and for each prediction from view 1 the row whose view 2 has the nearest projection."""
        return self.nearest_panels(inputs["views"], outputs["p"][:, 0] @ outputs["z"][:, 1].T)
