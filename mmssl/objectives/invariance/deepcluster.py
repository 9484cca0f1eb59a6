"""DeepCluster: in which cluster of the whole data set is the other view of this image?

Caron, Bojanowski, Joulin & Douze 2018, "Deep Clustering for Unsupervised Learning of Visual Features", arXiv
1807.05520, as simplified in Caron et al. 2020, arXiv 2006.09882 (DeepCluster-v2): every so often k-means sorts unit
vectors of the training rows, and its centers are the head: a crop's cosines with them, over a temperature, are to say
the cluster. There is no head that each clustering makes useless and that would have to start anew.

The published code keeps a vector of each row from its last visit, and clusters those. Here a copy of the network,
which is renewed along with the clusters, says the cluster of each large crop, and every other crop of the row is to say
it: no table of rows is kept, a stream will do, and no vector is older than the clusters. A clustering goes on from the
centers there are. Of the three clusterings and heads of the published setting there is one.

Known traps. A single cluster solves the task: an empty one moves to the vector that is farthest from its own, and each
cluster counts the same in the loss, however large it is, as where rows are drawn evenly over clusters in the first
paper. The first clusters are those of an untrained network. `perplexity` says how many clusters are in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.codebook import Codebook
from mmssl.modules.heads import mlp
from mmssl.modules.mode import evaluating
from mmssl.modules.teacher import Teacher
from mmssl.modules.views import Given, encode_views
from mmssl.objectives.base import Chance, Panel, Step
from mmssl.objectives.invariance._multi_crop import MultiCrop, over_others
from mmssl.ops.draws import Draws
from mmssl.ops.gather import process_share
from mmssl.ops.losses import ranking, spread
from mmssl.ranges import Count, Positive, Temperature, Width

GLOBAL_VIEWS = ({"area": (0.14, 1.0)},)
LOCAL_VIEWS = ({"area": (0.05, 0.14), "size": 96 / 224},)


class DeepCluster(MultiCrop):
    """Say from one crop to which cluster another crop of the row belongs.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images or sound decides the crops.
        clusters: K.
        every: steps from one clustering to the next, an epoch as published; the first is before step 0.
        points: vectors for each cluster that a clustering looks at, where there are as many; two a row.
        hidden: width of the head's hidden layer.
        width: of the unit vectors that are clustered.
        local_crops: small crops of each row.
        temperature: divides the cosines with the centers.
        views: what differs from the published large crops: settings of `ImageView` or `AudioView`, for both or each.
        local_views: the same for the small crops.
    """

    divisors = ("total",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        clusters: Annotated[int, Ge(2)] = 3000,
        every: Positive = 1000,
        points: Positive = 64,
        hidden: Width = 2048,
        width: Width = 128,
        local_crops: Count = 6,
        temperature: Temperature = 0.1,
        views: Given = None,
        local_views: Given = None,
    ) -> None:
        super().__init__(encoders, encoder, views, local_views, local_crops, large=GLOBAL_VIEWS, small=LOCAL_VIEWS)
        self.clusters, self.every, self.points, self.temperature = clusters, every, points, temperature
        self.projection = mlp(self.encoder(encoder).dim, hidden, width, last_bias=True)
        self.codebook = Codebook(clusters, width, unit=True)
        self.copy = Teacher(self._student())

    def _student(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder(self.name), "projection": self.projection}

    def chance(self, rows: int) -> Chance:
        """All clusters are equally likely, for each counts the same."""
        return Chance(math.log(self.clusters), {"accuracy": 1 / self.clusters, "ranking": 0.5})

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        """Where it is due, renew the copy and cluster what it makes of the data, on as many batches as that takes.

        Raises:
            RecipeError: where each process holds a part of every weight.
        """
        if step.number % self.every:
            return
        if step.sharded:
            raise RecipeError("deepcluster copies whole networks, and these are sharded; set training.sharded=false")
        self.copy.renew(self._student())
        self.codebook.fit(self._vectors_of_all(step), self.points)

    def _vectors_of_all(self, step: Step) -> Iterator[Tensor]:
        """Of two large crops of each row, one after the other, (2B, D) a batch."""
        share, shares = process_share()
        for number, batch in enumerate(step.data()):
            rows = batch[self.needs[0]]
            seed, stream = int(self.codebook.seed), f"clusters {step.number}"
            draws = Draws(seed, number, len(rows), share=share, shares=shares, device=rows.device, stream=stream)
            crops = self.views(batch, draws, self.encoder(self.name))
            yield self._copied(dict(zip(("views", "valid"), crops, strict=False))).flatten(0, 1)

    def _copied(self, inputs: Batch) -> Tensor:
        """What the copy makes of the large crops: unit vectors (B, 2, D), each whatever the others are."""
        with evaluating(self.copy):
            pooled = encode_views(self.copy["encoder"], inputs["views"], inputs.get("valid"))
            return F.normalize(self.copy["projection"](pooled.flatten(0, 1)), dim=-1).unflatten(0, pooled.shape[:2])

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """The crops; of each large one its cluster, `code` int64 (B, 2), and how much it counts, `weight` (B, 2)."""
        inputs = super().transform(batch, draws)
        code = self.codebook(self._copied(inputs))
        weight = (-self.codebook.log_shares()[code]).exp() / self.clusters
        return inputs | {"code": code, "weight": weight, "total": weight.sum()}

    def predict(self, inputs: Batch) -> Batch:
        """Logits (B, V, K) of all crops, and `z` (B, 2, width), unit vectors of the large ones."""
        pooled = self.encode_crops(inputs)
        hidden = self.projection(pooled.flatten(0, 1)).to(self.codebook.centers.dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # a cosine in half precision, divided by 0.1, is coarse
            z = F.normalize(hidden, dim=-1).unflatten(0, pooled.shape[:2])
            logits = F.linear(z, self.codebook.centers) / self.temperature
        return {"logits": logits, "z": z[:, :2]}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy over the pairs of a large crop and another crop, in which every cluster counts the same.

        Accuracy is of large crops about each other.
        """
        code, logits = inputs["code"], outputs["logits"]
        weight = inputs["weight"].to(logits.dtype)
        crops = logits.shape[1]
        surprise = -logits.log_softmax(-1).gather(2, code[:, None].expand(-1, crops, -1)).mT  # (B, 2, V)
        right = (logits[:, :2].argmax(-1).flip(1) == code).to(logits.dtype)
        return {
            "loss": (over_others(surprise) * weight).sum() / inputs["total"],
            "accuracy": (right * weight).sum() / inputs["total"],
            "perplexity": self.codebook.perplexity(),
            "ranking": ranking(outputs["z"][:, 0], outputs["z"][:, 1]),
            "spread": spread(outputs["z"]),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The crops, and the cluster of each large one: as the copy has it, and as the other says."""
        code, said = inputs["code"].tolist(), outputs["logits"][:, :2].argmax(-1).flip(1).tolist()
        lines = [f"in {a[0]}, {a[1]}; said {b[0]}, {b[1]}" for a, b in zip(code, said, strict=True)]
        right = [a == b for a, b in zip(code, said, strict=True)]
        return [*self.crop_panels(inputs), Panel("clusters of 1 and 2", lines, right)]
