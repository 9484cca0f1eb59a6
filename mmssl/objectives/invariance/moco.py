"""MoCo: which of many keys was made from the same image, or the same sound?

v2: Chen, Fan, Girshick & He 2020, arXiv 2003.04297, after He et al. 2020, arXiv 1911.05722. A query from one view looks
for the key of the other among the keys of earlier batches, which a queue keeps; a slowly moving copy of the network
makes them. v3: Chen, Xie & He 2021, arXiv 2104.02057. No queue: the keys of the other rows of a large batch, both ways,
and a predictor on the queries' side.

Known traps. The query is compared before its batch's keys enter the queue. Only parameters follow by momentum.
BatchNorm betrays the key: where a query shares its batch statistics with its own key, and keys in the queue come from
other batches, the network finds the key without looking at the picture (v3 has no queue, hence no such difference).
SyncBatchNorm is no remedy, it is the leak at full size. As published, BatchNorm is not synchronized, and keys are made
in another order of the global batch than queries, for which their views change processes: those that share statistics
with a query are not those that share them with its key. Where processes are fewer than `groups`, each cuts its rows
into several and makes one forward pass of each, so that one process computes what many do (but for the running
statistics, which count each pass). Under accumulation a group is one of a micro-batch, of two rows at least. A copy
that follows fast betrays the key as well: new keys differ from those in the queue by what the network has drifted
since, so `accuracy` leaves chance before anything is learned.

v3's vision transformers start with fixed positions, and weights of their own: `weight_init: moco_v3` of timm's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.heads import mlp
from mmssl.modules.queue import Queue
from mmssl.modules.teacher import Teacher, cosine_momentum
from mmssl.modules.views import Given
from mmssl.objectives.base import Chance, Panel, Step
from mmssl.objectives.invariance._shuffled_keys import ShuffledKeys, found_among
from mmssl.ops.gather import gather, own_rows
from mmssl.ops.losses import found, spread
from mmssl.ranges import Positive, Share, Temperature, Width


class MoCo(ShuffledKeys):
    """Find the key of the other view, made by a momentum copy of the network.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images or sound decides the views.
        form: `v2` (queue) or `v3` (large batch, both ways).
        width: of queries and keys; 128 in v2, 256 in v3 where left out.
        hidden: width of hidden layers of the heads; that of the encoder in v2, 4096 in v3 where left out.
        temperature: divides the cosine; 0.2 where left out, in v3 with a convolutional encoder 1.
        momentum: share of itself that the copy keeps at a step; 0.999 in v2, in v3 0.99 that rises to 1 along a cosine.
        queue: number of keys that v2 keeps, K; any number from the global batch up.
        groups: of rows that share BatchNorm statistics in v2, over all processes, each of which has one at least: the
            published number of GPUs. Without effect where the encoder has no BatchNorm.
        freeze_patch_embedding: whether v3 leaves the patch embedding as it was initialized, where the encoder has one:
            its gradient is what makes transformers unstable.
        views: what differs from the published views: settings of `ImageView` or `AudioView`, for both or one each.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        form: Literal["v2", "v3"] = "v2",
        width: Width | None = None,
        hidden: Width | None = None,
        temperature: Temperature | None = None,
        momentum: Share | None = None,
        queue: Positive = 65536,
        groups: Positive = 8,
        freeze_patch_embedding: bool = True,
        views: Given = None,
    ) -> None:
        patches = encoder in encoders and encoders[encoder].patch_size is not None
        super().__init__(encoders, encoder, views, groups if form == "v2" else None, image=_views(form, patches))
        net = self.encoder(encoder)
        self.form, width = form, width or (128 if form == "v2" else 256)
        if form == "v2":
            self.temperature, self.momentum = (
                0.2 if temperature is None else temperature,
                0.999 if momentum is None else momentum,
            )
            self.projection = mlp(net.dim, hidden or net.dim, width, norm=False, last_bias=True)
            self.queue = Queue(queue, width)
        else:
            self.temperature = temperature if temperature is not None else 0.2 if patches else 1.0
            self.momentum = 0.99 if momentum is None else momentum
            layers = [hidden or 4096] * (2 if patches else 1)
            self.projection = mlp(net.dim, *layers, width, bias=False, last_norm="plain")
            self.prediction = mlp(width, layers[0], width, bias=False, last_norm="plain" if patches else None)
            if patches and freeze_patch_embedding:
                _patch_embedding(net).requires_grad_(False)
        self.teacher = Teacher(self._student())

    def _student(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder(self.name), "projection": self.projection}

    def chance(self, rows: int) -> Chance:
        """One key among K + 1; in v3 among those of N rows, in both directions, times 2 T as the loss is."""
        if self.form == "v2":
            keys = len(self.queue) + 1
            return Chance(math.log(keys), {"accuracy": 1 / keys}, self.queue.filled(rows, "loss", "accuracy"))
        return Chance(4 * self.temperature * math.log(rows), {"accuracy": 1 / rows})

    def predict(self, inputs: Batch) -> Batch:
        """`q` and `k`, unit vectors (B, 1, width), in v3 (B, 2, width); `k[:, i]` is the key for `q[:, i]`."""
        if self.form == "v2":
            query, key = self.query_and_key(inputs, self.teacher["encoder"], lambda features: features.pooled)
            q = self.projection(query)[:, None]
            with torch.no_grad():
                k = self.teacher["projection"](key)[:, None]
        else:
            q = self.each_view(inputs, self.encoder(self.name), self.projection, self.prediction)
            with torch.no_grad():
                k = self.each_view(inputs, self.teacher["encoder"], self.teacher["projection"]).flip(1)
        return {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy of each query over the keys; accuracy: how often its own is the nearest one."""
        q, k = outputs["q"], gather(outputs["k"].detach())
        own = own_rows(len(q), q.device)
        if self.form == "v2":
            if len(k) > len(self.queue):
                raise RecipeError(f"moco: queue = {len(self.queue)} should hold the keys of a batch, {len(k)} rows")
            self.queue.put(k[:, 0])
            logits, target, accuracy = found_among((q * k[own]).sum(2)[:, 0], q[:, 0] @ self.queue.rows.T)
            scale = 1.0
        else:
            logits = torch.einsum("bvd,nvd->bvn", q, k).flatten(0, 1)
            target, scale = own.repeat_interleave(2), 4 * self.temperature
            accuracy = found(logits, target)
        return {
            "loss": scale * F.cross_entropy(logits / self.temperature, target),
            "accuracy": accuracy,
            "spread": spread(q),
        }

    def before_step(self, step: Step) -> None:
        """See `Teacher.begin`."""
        self.teacher.begin(step.number, self._student())

    def after_step(self, progress: float) -> None:
        """The copy follows; in v2 the keys of this batch replace the oldest in the queue."""
        momentum = self.momentum if self.form == "v2" else cosine_momentum(self.momentum, progress)
        self.teacher.follow(self._student(), momentum)
        if self.form == "v2":
            self.queue.advance()

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both views, and for the query from view 1 the row whose key, from view 2, is nearest."""
        return self.nearest_panels(inputs["views"], outputs["q"][:, 0] @ outputs["k"][:, 0].T, "query", "key")


def _views(form: str, patches: bool) -> list[dict[str, Any]]:
    """The published views: for v3 with larger crops where the network is convolutional."""
    if form == "v2":
        return [{"strength": 0.5, "area": (0.2, 1.0)}]
    both = {"strength": 0.5, "saturation": 0.4, "area": (0.08 if patches else 0.2, 1.0)}
    return [both | {"blur": 1.0}, both | {"blur": 0.1, "solarize": 0.2}]


def _patch_embedding(encoder: Encoder) -> nn.Module:
    """The convolution that cuts an input into patches."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == encoder.patch_size:
            return module
    raise RecipeError("moco: no patch embedding to freeze was found; set freeze_patch_embedding = false")
