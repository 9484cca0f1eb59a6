"""SwAV: to which prototype is the other view of this image assigned, when all prototypes get equally many?

Caron, Misra, Mairal, Goyal, Bojanowski & Joulin 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments", arXiv 2006.09882. Scores are the cosines of each view with K prototypes. The large views of the global
batch are assigned to prototypes by optimal transport, so that each gets the same share (Sinkhorn, three iterations),
and from every other view of a row, large or small, a softmax over its scores is to say the assignment. No prototype can
take all rows, whence no collapse, and no pairs of rows are compared. For sounds, crops are windows of one recording, as
in `dino`; no such setting is published.

Known traps. The last of the iterations makes the assignment of each row sum to 1; where prototypes come last, it does
not. It is over the rows of all processes: of a process's own, too few for K prototypes, it makes other assignments. A
batch smaller than K cannot be spread over all prototypes either: `queue` holds vectors of earlier batches, which take
part in the transport, assigned by the prototypes as they are now, and enters late, when vectors no longer move fast.
Assignments carry no gradient. Prototypes are unit vectors after each step, and stay as they are for the first share of
the run. An `epsilon` near that of the temperature makes all assignments alike, and the loss stays at ln K.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.heads import mlp
from mmssl.modules.queue import Queue
from mmssl.modules.views import Given
from mmssl.objectives.base import Chance, Panel
from mmssl.objectives.invariance._multi_crop import MultiCrop, over_others
from mmssl.ops.clustering import balanced_assignment
from mmssl.ops.gather import average, gather, process_share
from mmssl.ops.losses import ranking, spread
from mmssl.ranges import Count, Positive, Share, Temperature, Width

GLOBAL_VIEWS = ({"area": (0.14, 1.0)},)
LOCAL_VIEWS = ({"area": (0.05, 0.14), "size": 96 / 224},)


class SwAV(MultiCrop):
    """Say from one view to which prototype another view of the row is assigned.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images or sound decides the crops.
        prototypes: K.
        hidden: width of the head's hidden layer.
        width: of the unit vectors that are compared with the prototypes.
        local_crops: small crops of each row.
        temperature: divides the scores that say the assignment.
        epsilon: divides those that it is made of: the larger, the more alike are the shares of a row.
        iterations: of Sinkhorn.
        queue: vectors of each large view of earlier batches that take part in the assignment; 3840 as published for
            batches of 256, and none for large ones.
        queue_start: share of the run after which they do, once there are so many; 15 epochs of 200 as published.
        freeze: share of the run in which prototypes do not learn; one epoch of 200 as published.
        views: what differs from the published large crops: settings of `ImageView` or `AudioView`, for both or each.
        local_views: the same for the small crops.
    """

    meets = "loss"
    progress: Tensor

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        prototypes: Width = 3000,
        hidden: Width = 2048,
        width: Width = 128,
        local_crops: Count = 6,
        temperature: Temperature = 0.1,
        epsilon: Temperature = 0.05,
        iterations: Positive = 3,
        queue: Count = 0,
        queue_start: Share = 0.075,
        freeze: Share = 0.005,
        views: Given = None,
        local_views: Given = None,
    ) -> None:
        super().__init__(encoders, encoder, views, local_views, local_crops, large=GLOBAL_VIEWS, small=LOCAL_VIEWS)
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.queue_start, self.freeze = queue_start, freeze
        self.projection = mlp(self.encoder(encoder).dim, hidden, width, last_bias=True)
        self.prototypes = nn.Linear(width, prototypes, bias=False)
        self.normalize_prototypes()
        self.queue = Queue(queue, 2 * width)
        self.queue.rows.zero_()  # the last of them tells whether it is full
        self.register_buffer("progress", torch.zeros(()))

    def chance(self, rows: int) -> Chance:
        """Any of K prototypes."""
        return Chance(math.log(len(self.prototypes.weight)), {"ranking": 0.5})

    def predict(self, inputs: Batch) -> Batch:
        """Scores (B, V, K) of all crops, and `z` (B, 2, width), unit vectors of the large ones."""
        pooled = self.encode_crops(inputs)
        weight = self.prototypes.weight
        # A gradient of 0, which all processes can average.
        weight = torch.where(self.progress < self.freeze, weight.detach(), weight)
        hidden = self.projection(pooled.flatten(0, 1)).to(weight.dtype)
        with torch.autocast(
            hidden.device.type, enabled=False
        ):  # a cosine in half precision, divided by 0.05, is coarse
            z = F.normalize(hidden, dim=-1)
            scores = F.linear(z, weight)
        z, scores = (value.unflatten(0, pooled.shape[:2]) for value in (z, scores))
        return {"scores": scores, "z": z[:, :2]}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy over the pairs of an assigned large crop and another crop.

        `perplexity` says to how many prototypes the softmax gives rows of the global batch, on average over them: K, or
        1 where all rows are one.
        """
        scores = outputs["scores"]
        large = scores[:, :2].detach()
        self.queue.put(gather(outputs["z"].detach()).flatten(1))
        said = average((large / self.temperature).softmax(-1).mean((0, 1)))
        terms = -(self.assigned(large) @ (scores / self.temperature).log_softmax(-1).mT)
        return {
            "loss": over_others(terms).mean(),
            "perplexity": torch.special.entr(said).sum().exp(),
            "ranking": ranking(outputs["z"][:, 0], outputs["z"][:, 1]),
            "spread": spread(outputs["z"]),
        }

    @torch.no_grad()
    def assigned(self, scores: Tensor) -> Tensor:
        """Shares of prototypes, of which each row's sum to 1, for scores (B, 2, K) of this process's rows: the same."""
        earlier = F.linear(self.queue.rows.unflatten(1, (2, -1)), self.prototypes.weight)
        ready = (self.progress >= self.queue_start) & self.queue.rows[-1:].any()
        # All processes hold the queue, and one counts it.
        counts = (ready & (process_share()[0] == 0)).expand(len(earlier))
        counted = torch.cat([torch.ones_like(scores[:, 0, 0], dtype=torch.bool), counts])
        views = torch.cat([scores, earlier]).unbind(1)
        return torch.stack([self.balanced(view, counted)[: len(scores)] for view in views], dim=1)

    def balanced(self, scores: Tensor, counted: Tensor) -> Tensor:
        """One view alone, (N, K), over the rows of all processes that are `counted` (N,)."""
        return balanced_assignment(scores / self.epsilon, counted, self.iterations).exp()

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Each a unit vector."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def after_step(self, progress: float) -> None:
        """Prototypes are unit vectors again; the large views of this batch replace the oldest in the queue."""
        self.progress.fill_(progress)
        self.normalize_prototypes()
        self.queue.advance()

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The crops, and the likeliest prototype of each large one: as it is assigned, and as the other says."""
        scores = outputs["scores"][:, :2]
        wanted, said = self.assigned(scores).argmax(-1).tolist(), scores.argmax(-1).flip(1).tolist()
        lines = [f"assigned {a[0]}, {a[1]}; said {b[0]}, {b[1]}" for a, b in zip(wanted, said, strict=True)]
        right = [a == b for a, b in zip(wanted, said, strict=True)]
        return [*self.crop_panels(inputs), Panel("prototypes of 1 and 2", lines, right)]
