"""LeJEPA: do all crops say the same, in numbers that are distributed like independent Gaussians?

Balestriero & LeCun 2025, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", arXiv
2511.08544. The embeddings of two large and six small crops are drawn to the mean of the large ones. SIGReg keeps them
from collapsing: in each step the embeddings of each crop are projected on random directions, and the distribution of
each projection is compared with N(0, 1); see `mmssl.ops.normality`. There is no teacher, no stop-gradient, no schedule.
For sounds, crops are windows of one recording, the small ones a fifth of it; no such setting is published.

`sigreg` is the statistic, about 1.05 for a sample of a Gaussian and 0.402 times the batch for embeddings that are all
0; `sigreg_ratio` is it over the former. Unlike other losses of this family this one tells a collapse: without the
weight of `sigreg` it is `invariance` alone, which is 0 there, and `spread` tells.

Known traps. Statistics are of one crop and of the global batch: those of each process alone, or of directions of its
own, are another loss. The statistic grows with the batch, so that a weight means something for one size of it (0.05
is advised for 128 rows and more). Crops are drawn to the mean of the *large* ones, and these count among the crops
(lightly-ai/lightly, issue 2023). Nothing is normalized to unit length before it is compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.heads import mlp
from mmssl.modules.views import Given
from mmssl.objectives.base import Chance, Panel, Step
from mmssl.objectives.invariance._multi_crop import MultiCrop
from mmssl.ops.losses import ranking
from mmssl.ops.normality import collapsed_level, draw_directions, epps_pulley, normal_level
from mmssl.ranges import Count, Positive, Share, Width

COLOR = {"strength": 0.5, "saturation": 0.4, "blur": 0.5, "solarize": 0.2}
GLOBAL_VIEWS = (COLOR | {"area": (0.3, 1.0)},)
LOCAL_VIEWS = (COLOR | {"area": (0.05, 0.3), "size": 98 / 224},)


class LeJEPA(MultiCrop):
    """Crops whose embeddings agree and are Gaussian.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images or sound decides the crops.
        width: of the embedding; 16 in the published example on ten classes, which has 128 for others.
        hidden: width of the projector's two hidden layers.
        sigreg: weight of the distance from a Gaussian; that of the distance between crops is 1 less it.
        directions: on which embeddings are projected, drawn anew at every step.
        local_crops: small crops of each row.
        views: what differs from the published large crops: settings of `ImageView` or `AudioView`, for both or each.
        local_views: the same for the small crops.
    """

    meets = "loss"
    directions: Tensor

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        width: Width = 128,
        hidden: Width = 2048,
        sigreg: Share = 0.05,
        directions: Positive = 1024,
        local_crops: Count = 6,
        views: Given = None,
        local_views: Given = None,
    ) -> None:
        super().__init__(encoders, encoder, views, local_views, local_crops, large=GLOBAL_VIEWS, small=LOCAL_VIEWS)
        self.sigreg = sigreg
        self.projector = mlp(self.encoder(encoder).dim, hidden, hidden, width, last_bias=True)
        self.register_buffer("directions", draw_directions(width, directions, 0), persistent=False)

    def chance(self, rows: int) -> Chance:
        """Embeddings that are all 0: crops agree, and the statistic is 0.402 times the rows."""
        return Chance(self.sigreg * collapsed_level(rows), {"ranking": 0.5})

    def before_step(self, step: Step) -> None:
        """Directions of the step, by its number: the same on every process and in a run that goes on."""
        width, number = self.directions.shape
        self.directions.copy_(draw_directions(width, number, step.number, self.directions.device))

    def predict(self, inputs: Batch) -> Batch:
        """`z` (B, V, width), those of the two large crops first."""
        pooled = self.encode_crops(inputs)
        return {"z": self.projector(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2])}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The weighted sum, each term without its weight, and `spread`: deviations, at most 1, averaged over width."""
        z = outputs["z"]
        invariance = (z - z[:, :2].mean(1, keepdim=True)).square().mean()
        statistic = epps_pulley(z @ self.directions.to(z.dtype)).mean()
        # Embeddings of no given length collapse to a point while their directions stay apart.
        room = z.detach().flatten(0, 1).std(0, correction=0).clamp(max=1).mean()
        return {
            "loss": (1 - self.sigreg) * invariance + self.sigreg * statistic,
            "invariance": invariance,
            "sigreg": statistic,
            "sigreg_ratio": statistic.detach() / normal_level(z),
            "ranking": ranking(z[:, 0], z[:, 1]),
            "spread": room,
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The crops, and for each row's first large crop the row whose second one is nearest."""
        first, second = outputs["z"][:, :2].unbind(1)
        names = ("large crop 1", "large crop 2")
        *_, nearest = self.nearest_panels(inputs["views"], -torch.cdist(first, second), *names)
        return [*self.crop_panels(inputs), nearest]
