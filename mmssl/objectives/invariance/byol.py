"""BYOL: what does a slowly moving copy of the network say about the other view?

Grill et al. 2020, "Bootstrap your own latent: A new approach to self-supervised learning", arXiv 2006.07733. From each
of two views, a predictor on top of the online network answers with the target network's projection of the other view.
The target follows the online network as a moving average; there are no negatives. For sounds this is BYOL-A (Niizumi et
al. 2021, arXiv 2103.06695) but for its views: two windows of one recording in place of one, and `mix: 0.4` for other
recordings in the background, see `AudioView`. Two moments of one clip, `views: {frames: 8}`, make it the BYOL of
Feichtenhofer et al. 2021, arXiv 2104.14558.

Known traps. Both directions count: the loss runs from 0 to 8, and 4 is that of orthogonal answers. The target has no
predictor and no gradient; it runs in training mode and keeps BatchNorm statistics of its own, which would be stale were
only its parameters to follow. The two views are made differently (blur and solarisation). A collapsed network has a
loss near 0: read `spread` with it.

The target's momentum belongs to the length of the run (from the published configurations, with their LARS rate for a
batch of 256 and weight decay): 40 epochs 0.97, 0.45, 1e-6; 100 epochs 0.99, 0.45, 1e-6; 300 epochs 0.99, 0.3, 1e-6;
1000 epochs 0.996, 0.2, 1.5e-6.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.heads import mlp
from mmssl.modules.teacher import Teacher, cosine_momentum
from mmssl.modules.views import BYOL_VIEWS, Given
from mmssl.objectives.base import Chance, Panel, Step
from mmssl.objectives.invariance._two_views import TwoViews
from mmssl.ops.losses import ranking, spread
from mmssl.ranges import Share, Width


class BYOL(TwoViews):
    """Predict the target network's projection of the other view.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images or sound decides the views.
        width: of projection and prediction.
        hidden: width of the hidden layer of each of the two.
        momentum: share of itself that the target keeps at the first step; rises to 1 along a cosine.
        views: what differs from the published views: settings of `ImageView` or `AudioView`, for both or one each.
    """

    compared = "target"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        width: Width = 256,
        hidden: Width = 4096,
        momentum: Share = 0.996,
        views: Given = None,
    ) -> None:
        super().__init__(encoders, encoder, views, image=BYOL_VIEWS)
        self.momentum = momentum
        self.projection = mlp(self.encoder(encoder).dim, hidden, width)
        self.prediction = mlp(width, hidden, width)
        self.target = Teacher(self._online())

    def _online(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder(self.name), "projection": self.projection}

    def chance(self, rows: int) -> Chance:
        """An answer at a right angle to what was asked, in both directions; its rank among the rows is any."""
        return Chance(4.0, {"ranking": 0.5})

    def predict(self, inputs: Batch) -> Batch:
        """Unit vectors (B, 2, width): the `prediction` from each view, and the `target` projection of each."""
        prediction = self.each_view(inputs, self.encoder(self.name), self.projection, self.prediction)
        with torch.no_grad():
            target = self.each_view(inputs, self.target["encoder"], self.target["projection"])
        return {"prediction": F.normalize(prediction, dim=-1), "target": F.normalize(target, dim=-1)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Squared distance of each prediction from the target of the other view, summed over both."""
        prediction, target = outputs["prediction"], outputs["target"].detach().flip(1)
        return {
            "loss": (2 - 2 * (prediction * target).sum(-1)).sum(1).mean(),
            "ranking": ranking(prediction[:, 0], target[:, 0]),
            "spread": spread(target),
        }

    def before_step(self, step: Step) -> None:
        """See `Teacher.begin`."""
        self.target.begin(step.number, self._online())

    def after_step(self, progress: float) -> None:
        """The target follows."""
        self.target.follow(self._online(), cosine_momentum(self.momentum, progress))

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both views, and for each prediction from view 1 the row whose view 2 has the nearest target."""
        return self.nearest_panels(inputs["views"], outputs["prediction"][:, 0] @ outputs["target"][:, 1].T)
