"""DenseCL: which place of the other view shows the same, among places of many images?

Wang, Zhang, Shen, Kong & Li 2021, "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", arXiv
2011.09157. MoCo v2 with a second head that projects every place: the key of a place is the place of the other view
whose feature, before any head, is nearest to its own, and its negatives are a second queue, of one pooled vector an
image. The loss is that of images and that of places, in equal parts; what it is for is dense prediction.

Known traps. Matches are of the encoder's own features, not of the projected ones, and carry no gradient. The second
queue holds the mean over places, taken before it is made a unit vector. BatchNorm betrays keys as in `moco`, and the
same is done about it. At first matches say little; the paper tried to begin with images alone, and needed not. An
encoder that shrinks a view to a single place leaves nothing to match.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError
from mmssl.modules.heads import mlp
from mmssl.modules.queue import Queue
from mmssl.modules.teacher import Teacher
from mmssl.modules.views import Given
from mmssl.objectives.base import EMBEDDINGS, Chance, Panel, Step
from mmssl.objectives.invariance._shuffled_keys import ShuffledKeys, found_among
from mmssl.ops.gather import gather
from mmssl.ops.losses import ranking, spread
from mmssl.ranges import Positive, Share, Temperature, Width


class DenseCL(ShuffledKeys):
    """Find the key of the other view among images, and that of each place among places.

    Args:
        encoders: holds the encoder, of images.
        encoder: its name.
        width: of queries and keys.
        hidden: width of the hidden layer of both heads; that of the encoder where left out.
        temperature: divides the cosine.
        momentum: share of itself that the copy keeps at a step.
        queue: number of keys that each of the two queues keeps; any number from the global batch up.
        dense: share of the loss that is that of places, lambda.
        groups: of rows that share BatchNorm statistics; see `moco`.
        views: what differs from MoCo v2's views: settings of `ImageView`, for both or one each.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        width: Width = 128,
        hidden: Width | None = None,
        temperature: Temperature = 0.2,
        momentum: Share = 0.999,
        queue: Positive = 65536,
        dense: Share = 0.5,
        groups: Positive = 8,
        views: Given = None,
    ) -> None:
        super().__init__(encoders, encoder, views, groups, image=({"strength": 0.5, "area": (0.2, 1.0)},))
        dim = self.encoder(encoder, "image").dim
        self.temperature, self.momentum, self.dense = temperature, momentum, dense
        heads = [mlp(dim, hidden or dim, width, norm=False, last_bias=True) for _ in range(2)]
        self.projection, self.dense_projection = heads
        self.queue, self.dense_queue = Queue(queue, width), Queue(queue, width)
        self.teacher = Teacher(self._student())

    def _student(self) -> dict[str, nn.Module]:
        heads = {"projection": self.projection, "dense_projection": self.dense_projection}
        return {"encoder": self.encoder(self.name), **heads}

    def chance(self, rows: int) -> Chance:
        """One key among K + 1, of an image as of a place; `ranking` is among the keys of the batch."""
        keys = len(self.queue) + 1
        levels = {"accuracy": 1 / keys, "accuracy_dense": 1 / keys, "ranking": 0.5}
        return Chance(math.log(keys), levels, self.queue.filled(rows, "loss", "accuracy", "accuracy_dense"))

    def predict(self, inputs: Batch) -> Batch:
        """Unit vectors: `q`, `k` and `mean_k` (B, 1, width), `dense_q` and `dense_k` (B, N, width) of N places.

        `match` (B, N) is the number of the place of the second view that is nearest to each of the first.
        """
        query, key = self.query_and_key(inputs, self.teacher["encoder"], _pooled_and_places)
        places, other_places = query[:, 1:], key[:, 1:]
        if places.shape[1] == 1:
            raise RecipeError(
                f"densecl matches places, and the encoder '{self.name}' makes one of a view of this size; "
                "enlarge data.image.size, or views.size"
            )
        with torch.no_grad():
            likeness = F.normalize(places, dim=-1) @ F.normalize(other_places, dim=-1).mT
            dense_k = self.teacher["dense_projection"](other_places)
            keys = (self.teacher["projection"](key[:, :1]), dense_k.mean(1, keepdim=True), dense_k)
            k, mean_k, dense_k = (F.normalize(made, dim=-1) for made in keys)
        q, dense_q = self.projection(query[:, :1]), self.dense_projection(places)
        return {
            **{"q": F.normalize(q, dim=-1), "k": k, "mean_k": mean_k},
            **{"dense_q": F.normalize(dense_q, dim=-1), "dense_k": dense_k},
            "match": likeness.argmax(2).float(),
        }

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Both cross-entropies, each over a key and a queue; accuracies: how often the own key is the nearest one."""
        q, k, mean_k = outputs["q"][:, 0], gather(outputs["k"].detach()[:, 0]), gather(outputs["mean_k"].detach()[:, 0])
        if len(k) > len(self.queue):
            raise RecipeError(f"densecl: queue = {len(self.queue)} should hold the keys of a batch, {len(k)} rows")
        self.queue.put(k)
        self.dense_queue.put(mean_k)
        images = found_among((q * outputs["k"].detach()[:, 0]).sum(1), q @ self.queue.rows.T)
        dense_q = outputs["dense_q"]
        matched = outputs["match"].long()[..., None].expand_as(dense_q)
        own = (dense_q * outputs["dense_k"].detach().gather(1, matched)).sum(2).flatten()
        places = found_among(own, dense_q.flatten(0, 1) @ self.dense_queue.rows.T)
        of_images, of_places = (F.cross_entropy(one[0] / self.temperature, one[1]) for one in (images, places))
        return {
            "loss": (1 - self.dense) * of_images + self.dense * of_places,
            "accuracy": images[2],
            "accuracy_dense": places[2],
            "loss_dense": of_places,
            # A queue that is noise, as the first one is, is easily told from any key, and the keys of a batch are not.
            "ranking": ranking(outputs["k"][:, 0], q),
            "spread": spread(outputs["q"]),
        }

    def before_step(self, step: Step) -> None:
        """See `Teacher.begin`."""
        self.teacher.begin(step.number, self._student())

    def after_step(self, progress: float) -> None:
        """The copy follows; the keys of this batch replace the oldest in both queues."""
        self.teacher.follow(self._student(), self.momentum)
        self.queue.advance()
        self.dense_queue.advance()

    def drawn_together(self, inputs: Batch) -> dict[str, Tensor]:
        """Both views, and the embeddings of the first as a whole and of its places."""
        outputs = self.predict(inputs)
        pooled = self.each_view(inputs, self.encoder(self.name))
        return {self.name: pooled, EMBEDDINGS: outputs["q"], f"dense/{EMBEDDINGS}": outputs["dense_q"]}

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both views, how near each place of the second is to the first's middle, and the row of the nearest key."""
        views = inputs["views"]
        first, second, nearest = self.nearest_panels(
            views, outputs["q"][:, 0] @ outputs["k"][:, 0].T, "query, its middle lit", "key"
        )
        with torch.no_grad():
            grid = self.encoder(self.name)(views[:1, 1]).grid
        middle = grid[0] // 2 * grid[1] + grid[1] // 2
        likeness = (outputs["dense_k"] @ outputs["dense_q"][:, middle, :, None])[..., 0].unflatten(1, grid)
        asked = torch.zeros_like(likeness)
        asked[:, grid[0] // 2, grid[1] // 2] = 1
        lit = Panel(first.title, list(_lit(views[:, 0], asked)))
        return [lit, second, Panel("places like the query's middle", list(_lit(views[:, 1], likeness))), nearest]


def _pooled_and_places(features: Features) -> Tensor:
    """(B, 1 + N, D)."""
    return torch.cat([features.pooled[:, None], features.tokens], dim=1)


def _lit(pictures: Tensor, weight: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), dark where `weight` (B, h, w) is lowest."""
    low, high = weight.amin((1, 2), keepdim=True), weight.amax((1, 2), keepdim=True)
    share = (weight - low) / (high - low).clamp(min=1e-12)
    return pictures * (0.25 + 0.75 * F.interpolate(share[:, None], pictures.shape[-2:], mode="nearest"))
