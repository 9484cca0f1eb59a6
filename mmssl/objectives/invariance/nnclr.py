"""NNCLR: which view comes from the image whose other view is nearest to this remembered one?

Dwibedi, Aytar, Tompson, Sermanet & Zisserman 2021, "With a Little Help from My Friends: Nearest-Neighbor Contrastive
Learning of Visual Representations", arXiv 2104.14548. One view of a row gives way to its nearest neighbor among the
vectors of earlier batches, which a queue keeps, and what a predictor makes of the other view is to be told from those
of all rows of the global batch (equation 3), both ways. So other images become positives, which no augmentation makes.

Known traps. Neighbors are looked up before the batch enters the queue: afterwards each row is its own neighbor, and
the task is SimCLR's. Only the first view enters, as in the paper's pseudocode. Negatives are the predicted vectors of
the other view: SimCLR's loss over both, as in some libraries, also pushes neighbors apart that two rows have in common.
The first queue is noise, whose neighbors say nothing. Neighbors that are the same for all rows leave the loss at
ln N: `neighbors`, the share of the first views' neighbors that differ, tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.heads import mlp
from mmssl.modules.queue import Queue
from mmssl.modules.views import Given
from mmssl.objectives.base import Chance, Panel
from mmssl.objectives.invariance._two_views import TwoViews
from mmssl.ops.gather import gather, own_rows
from mmssl.ops.losses import spread
from mmssl.ranges import Positive, Temperature, Width


class NNCLR(TwoViews):
    """Contrast the nearest neighbor of one view with the other view of its row, among those of all rows.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images, clips or sound decides the views.
        width: of the projection and the prediction.
        hidden: width of the projection's two hidden layers.
        prediction_hidden: width of the predictor's hidden layer.
        temperature: divides the cosine similarity.
        queue: number of vectors among which neighbors are looked up.
        views: what differs from SimCLR's views: settings of `ImageView` or `AudioView`, for both or one each.
    """

    meets = "loss"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        width: Width = 256,
        hidden: Width = 2048,
        prediction_hidden: Width = 4096,
        temperature: Temperature = 0.1,
        queue: Positive = 98304,
        views: Given = None,
    ) -> None:
        super().__init__(encoders, encoder, views)
        self.temperature = temperature
        self.projection = mlp(self.encoder(encoder).dim, hidden, hidden, width, bias=False, last_norm="scale")
        self.prediction = mlp(width, prediction_hidden, width, bias=False, last_bias=True)
        self.queue = Queue(queue, width)

    def chance(self, rows: int) -> Chance:
        """Any of the N rows."""
        return Chance(math.log(rows), {"accuracy": 1 / rows}, self.queue.filled(rows, "loss", "accuracy"))

    def predict(self, inputs: Batch) -> Batch:
        """Unit vectors (B, 2, width): `z` of each view, and `p`, what the predictor makes of them."""
        z = self.each_view(inputs, self.encoder(self.name), self.projection)
        p = torch.stack([self.prediction(view) for view in z.unbind(1)], dim=1)
        return {"z": F.normalize(z, dim=-1), "p": F.normalize(p, dim=-1)}

    @torch.no_grad()
    def neighbors(self, z: Tensor) -> Tensor:
        """Numbers of the nearest vectors in the queue, int64 (B,)."""
        return (z @ self.queue.rows.T).argmax(1)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy over the global batch; accuracy: how often a neighbor is nearest to its row's other view."""
        z, p = outputs["z"].detach(), gather(outputs["p"])
        own = own_rows(len(z), z.device)
        first = gather(z[:, 0])
        found = torch.stack([self.neighbors(view) for view in z.unbind(1)])  # (2, B)
        logits = torch.einsum("vbd,nvd->vbn", self.queue.rows[found], p.flip(1)).flatten(0, 1) / self.temperature
        target = own.repeat(2)
        self.queue.put(first)
        nearest = self.neighbors(first).sort().values
        return {
            "loss": F.cross_entropy(logits, target),
            "accuracy": (logits.argmax(1) == target).to(logits.dtype).mean(),
            "neighbors": (1 + (nearest.diff() > 0).sum()).to(logits.dtype) / len(nearest),
            "spread": spread(outputs["z"]),
        }

    def after_step(self, progress: float) -> None:
        """The first views of this batch replace the oldest vectors in the queue."""
        self.queue.advance()

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both views, and for each row's first view, by its neighbor, the row whose second view is nearest."""
        likeness = self.queue.rows[self.neighbors(outputs["z"][:, 0])] @ outputs["p"][:, 1].T
        return self.nearest_panels(inputs["views"], likeness)
