"""MoCo: which of many keys was made from the same image, or the same sound?

v2: Chen, Fan, Girshick & He 2020, arXiv 2003.04297, after He et al. 2020, arXiv 1911.05722. A query from one view looks
for the key of the other among the keys of earlier batches, which a queue keeps; a slowly moving copy of the network
makes them. v3: Chen, Xie & He 2021, arXiv 2104.02057. No queue: the keys of the other rows of a large batch, both ways,
and a predictor on the queries' side.

Known traps. The query is compared before its batch's keys enter the queue. Only parameters follow by momentum.
BatchNorm betrays the key: where a query shares its batch statistics with its own key, and keys in the queue come from
other batches, the network finds the key without looking at the picture (v3 has no queue, hence no such difference).
The paper shuffles keys between GPUs; SyncBatchNorm is no remedy, it is the leak at full size. Here each network runs in
several groups of rows, one forward pass each: queries with every `groups`-th row, keys in an order drawn inside each
block of `groups` neighbors, so that those that share statistics with a query are not those that share them with its
key, on one process or many, synchronized or not, without communication. Under accumulation a group is one of a
micro-batch; with fewer than four rows there is but one. A copy that follows fast betrays the key as well: new keys
differ from those in the queue by what the network has drifted since, so `accuracy` leaves chance before anything is
learned.

v3 with a vision transformer differs from the published one in its positions, which are learned here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.objectives.invariance._views import Given, Views, nearest_panels
from mmssl.ops.draws import Draws
from mmssl.ops.gather import gather, process_share
from mmssl.ops.losses import spread
from mmssl.ops.momentum import cosine_momentum, enqueue, follow, momentum_copy


class MoCo(Objective):
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
        groups: of rows that share BatchNorm statistics in v2, the published number of GPUs; without effect where the
            encoder has no BatchNorm.
        freeze_patch_embedding: whether v3 leaves the patch embedding as it was initialized, where the encoder has one:
            its gradient is what makes transformers unstable.
        views: what differs from the published views: settings of `ImageView` or `AudioView`, for both or one each.
    """

    meets = "loss"
    queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        form: Literal["v2", "v3"] = "v2",
        width: int | None = None,
        hidden: int | None = None,
        temperature: float | None = None,
        momentum: float | None = None,
        queue: int = 65536,
        groups: int = 8,
        freeze_patch_embedding: bool = True,
        views: Given = None,
    ) -> None:
        super().__init__(encoders)
        net = self.encoder(encoder)
        patches = net.patch_size is not None
        self.name, self.form = encoder, form
        width = width or (128 if form == "v2" else 256)
        if form == "v2":
            hidden = hidden or net.dim
            published = [{"strength": 0.5, "area": (0.2, 1.0)}]
            self.temperature, self.momentum = temperature or 0.2, 0.999 if momentum is None else momentum
            self.groups = max(1, groups) if any(isinstance(m, _BatchNorm) for m in net.modules()) else 1
            self.projection = nn.Sequential(nn.Linear(net.dim, hidden), nn.ReLU(), nn.Linear(hidden, width))
            self.register_buffer("queue", F.normalize(torch.randn(queue, width), dim=1))
            self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
            self._keys: Tensor | None = None
        else:
            hidden = hidden or 4096
            both = {"strength": 0.5, "saturation": 0.4, "area": (0.08 if patches else 0.2, 1.0)}
            published = [both | {"blur": 1.0}, both | {"blur": 0.1, "solarize": 0.2}]
            self.temperature = temperature or (0.2 if patches else 1.0)
            self.momentum = 0.99 if momentum is None else momentum
            self.groups = 1
            self.projection = _mlp(net.dim, *[hidden] * (2 if patches else 1), width, last_norm=True)
            self.prediction = _mlp(width, hidden, width, last_norm=patches)
            if patches and freeze_patch_embedding:
                _patch_embedding(net).requires_grad_(False)
        self.views = Views(net, views, image=published)
        self.needs = self.views.needs
        self.teacher = momentum_copy(nn.ModuleDict({"encoder": net, "projection": self.projection}))

    def chance(self, rows: int) -> Chance:
        """One key among K + 1; in v3 among those of N rows, in both directions, times 2 T as the loss is."""
        if self.form == "v2":
            keys = len(self.queue) + 1
            return Chance(math.log(keys), {"accuracy": 1 / keys})
        return Chance(4 * self.temperature * math.log(rows), {"accuracy": 1 / rows})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`views` (B, 2, 3, h, h), or (B, 2, M, T) of sounds of which `valid` (B, 2, T) frames are no padding.

        With groups, `place` (B,) in [0, 1): what the keys of a block are ordered by.
        """
        inputs = dict(zip(("views", "valid"), self.views(batch, draws, self.encoder(self.name)), strict=False))
        return inputs if self.groups == 1 else inputs | {"place": draws.uniform()}

    def predict(self, inputs: Batch) -> Batch:
        """`q` and `k`, unit vectors (B, 1, width), in v3 (B, 2, width); `k[:, i]` is the key for `q[:, i]`."""
        views, valid = inputs["views"], inputs.get("valid")
        if self.form == "v2":
            q = self.projection(self._encode(self.encoder(self.name), views, valid, 0, None))
            with torch.no_grad():
                pooled = self._encode(cast(Encoder, self.teacher["encoder"]), views, valid, 1, inputs.get("place"))
                k = self.teacher["projection"](pooled)
        else:
            images, inside = views.flatten(0, 1), None if valid is None else valid.flatten(0, 1)
            q = self.prediction(self.projection(self.encoder(self.name)(images, inside).pooled))
            with torch.no_grad():
                k = self.teacher["projection"](self.teacher["encoder"](images, inside).pooled)
        q, k = (F.normalize(z, dim=1).unflatten(0, (len(views), -1)) for z in (q, k))
        return {"q": q, "k": k.flip(1)}

    def _encode(self, encoder: Encoder, views: Tensor, valid: Tensor | None, view: int, place: Tensor | None) -> Tensor:
        """Pooled vectors (B, D) of one view, in groups of rows that share BatchNorm statistics."""
        rows = len(views)
        groups = min(self.groups, max(1, rows // 2))
        order = torch.arange(rows, device=views.device)
        if place is not None:
            order = (order // groups + place).argsort(stable=True)
        parts = [order[start::groups] for start in range(groups)]
        pooled = [encoder(views[part, view], None if valid is None else valid[part, view]).pooled for part in parts]
        return torch.cat(pooled)[torch.cat(parts).argsort()]

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy of each query over the keys; accuracy: how often its own is the nearest one."""
        q, k = outputs["q"], gather(outputs["k"].detach())
        rank = process_share()[0]
        own = torch.arange(len(q), device=q.device) + rank * len(q)
        if self.form == "v2":
            if len(k) > len(self.queue):
                raise RecipeError(f"moco: queue = {len(self.queue)} should hold the keys of a batch, {len(k)} rows")
            if self.training:
                self._keys = k[:, 0]
            logits = torch.cat([(q * k[own]).sum(2), q[:, 0] @ self.queue.T], dim=1)
            target, scale = torch.zeros_like(own), 1.0
        else:
            logits = torch.einsum("bvd,nvd->bvn", q, k).flatten(0, 1)
            target, scale = own.repeat_interleave(2), 4 * self.temperature
        nearest = logits == logits.amax(1, keepdim=True)
        found = nearest.gather(1, target[:, None])[:, 0] / nearest.sum(1)  # a tie is a guess
        return {
            "loss": scale * F.cross_entropy(logits / self.temperature, target),
            "accuracy": found.to(q.dtype).mean(),
            "spread": spread(q),
        }

    def after_step(self, progress: float) -> None:
        """The copy follows; in v2 the keys of this batch replace the oldest in the queue."""
        momentum = self.momentum if self.form == "v2" else cosine_momentum(self.momentum, progress)
        follow(self.teacher, {"encoder": self.encoder(self.name), "projection": self.projection}, momentum)
        if self.form == "v2" and self._keys is not None:
            enqueue(self.pointer, [(self.queue, self._keys)])
            self._keys = None

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both views, and for the query from view 1 the row whose key, from view 2, is nearest."""
        return nearest_panels(inputs["views"], outputs["q"][:, 0] @ outputs["k"][:, 0].T, "query", "key")


def _mlp(*widths: int, last_norm: bool) -> nn.Sequential:
    """Linear layers without bias, BatchNorm and ReLU between them; the last BatchNorm has no scale and shift."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers[:-2], *([nn.BatchNorm1d(widths[-1], affine=False)] if last_norm else []))


def _patch_embedding(encoder: Encoder) -> nn.Module:
    """The convolution that cuts an input into patches."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == encoder.patch_size:
            return module
    raise RecipeError("moco: no patch embedding to freeze was found; set freeze_patch_embedding = false")
