"""Cross-modal clustering: which cluster of its sound does this clip belong to, and which of its picture this sound?

Alwassel, Mahajan, Korbar, Torresani, Ghanem & Tran 2020, "Self-Supervised Learning by Cross-Modal Audio-Video
Clustering", arXiv 1911.12667 (XDC): every so often the vectors of each encoder are clustered, and the clusters of the
one are the classes that the other learns. Assignment `kmeans` is the paper's. Assignment `sinkhorn` makes all clusters
equally large, by optimal transport, as in Asano, Patrick, Rupprecht & Vedaldi 2020, arXiv 2006.13662 (SeLaVi; without
its Gaussian sizes, its ten heads and its sharing of labels).

A row's cluster is that of a copy of the encoders which is renewed along with the clusters: it stays the same from one
renewal to the next, for streams as well, and no table of rows is kept. Copies and clusters see the crops of the step.

Known traps. A single cluster solves the task: an empty one moves to the vector that is farthest from its own, and each
cluster counts the same in the loss, however large it is. A second clustering numbers the clusters anew, so that
DeepCluster (arXiv 1807.05520) starts a new head; here it goes on from the centers there are, and heads keep their
meaning. The
first clusters are those of untrained networks. Clusters may say what one of the two alone has, such as a microphone's
hum: the other cannot learn those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.codebook import BalancedCodebook, Codebook
from mmssl.modules.mode import evaluating
from mmssl.modules.side import SIDES
from mmssl.modules.teacher import Teacher
from mmssl.modules.views import Crop
from mmssl.objectives._two_sides import TwoSides
from mmssl.objectives.base import Chance, Panel, Step
from mmssl.ops.draws import Draws
from mmssl.ops.gather import process_share
from mmssl.ranges import Positive

OTHER = {"a": "b", "b": "a"}
VIEWS = {"area": (0.5, 1.0), "flip": 0.5}


class CrossModalClustering(TwoSides):
    """Classify each side of a pair by the clusters of the other.

    Args:
        encoders: holds both encoders.
        a: name of the first encoder.
        b: name of the second.
        clusters: of each, K.
        every: steps from one clustering to the next; the first is before step 0.
        points: vectors for each cluster that a clustering looks at, where there are as many.
        assignment: `kmeans`, or `sinkhorn` for clusters of equal size.
        views: of images and clips: how they are cropped, see `Crop`.
    """

    divisors = ("a_total", "b_total")

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        a: str = "video",
        b: str = "audio",
        clusters: Annotated[int, Ge(2)] = 256,
        every: Positive = 1000,
        points: Positive = 64,
        assignment: Literal["kmeans", "sinkhorn"] = "kmeans",
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders, a, b, Crop.of(VIEWS, views))
        if a == b:
            raise RecipeError(f"cross_modal_clustering is of two encoders, a and b are both '{a}'")
        self.clusters, self.every, self.points = clusters, every, points
        kind = BalancedCodebook if assignment == "sinkhorn" else Codebook
        self.copy = Teacher({key: side.encoder for key, side in self.sides.items()})
        dims = {key: side.encoder.dim for key, side in self.sides.items()}
        self.codebooks = nn.ModuleDict({key: kind(clusters, dim) for key, dim in dims.items()})
        self.heads = nn.ModuleDict({key: nn.Linear(dim, clusters) for key, dim in dims.items()})
        self.names = {"a": a, "b": b}

    def chance(self, rows: int) -> Chance:
        """All clusters are equally likely, for each counts the same."""
        metrics = {f"accuracy_{name}": 1 / self.clusters for name in self.names.values()}
        return Chance(2 * math.log(self.clusters), metrics)

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        """Where it is due, renew the copies and cluster what they make of the data, on as many batches as that takes.

        Raises:
            RecipeError: where each process holds a part of every weight.
        """
        if step.number % self.every:
            return
        if step.sharded:
            raise RecipeError(
                "cross_modal_clustering copies whole networks, and these are sharded; set training.sharded=false"
            )
        self.copy.renew({key: side.encoder for key, side in self.sides.items()})
        share, shares = process_share()
        found: dict[str, list[Tensor]] = {key: [] for key in SIDES}
        for number, batch in enumerate(step.data()):
            rows = batch[self.needs[0]]
            place: dict[str, Any] = {"share": share, "shares": shares, "device": rows.device}
            draws = Draws(int(self._codebook("a").seed), number, len(rows), **place, stream=f"clusters {step.number}")
            inputs = self.read(batch, draws)
            for key in SIDES:
                found[key].append(self._vectors(key, inputs))
            if (number + 1) * len(rows) * shares >= self.points * self.clusters:
                break
        for key, vectors in found.items():
            self._codebook(key).fit(vectors, self.points)
        step.log({f"perplexity_{self.names[key]}": self._codebook(key).perplexity() for key in SIDES})

    def _codebook(self, key: str) -> Codebook:
        return cast(Codebook, self.codebooks[key])

    def _vectors(self, key: str, inputs: Batch) -> Tensor:
        """What the copy makes of side `a` or `b`: unit vectors (B, D), one row whatever the others are."""
        copied = self.copy[key]
        with evaluating(copied):
            pooled: Tensor = copied(inputs[key], inputs.get(f"{key}_valid")).pooled
        return F.normalize(pooled, dim=-1)

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Both sides, see `Side`; of each its clusters, `a_code` int64 (B,), and how much a row counts, `a_weight`."""
        inputs = self.read(batch, draws)
        for key in SIDES:
            code = self._codebook(key)(self._vectors(key, inputs))
            weight = (-self._codebook(key).log_shares()[code]).exp() / self.clusters
            inputs |= {f"{key}_code": code, f"{key}_weight": weight, f"{key}_total": weight.sum()}
        return inputs

    def predict(self, inputs: Batch) -> Batch:
        """`a` and `b` (B, K), logits of the other one's clusters."""
        return {key: self.heads[key](side.features(inputs).pooled) for key, side in self.sides.items()}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The sum of both cross-entropies, and accuracies, in which every cluster counts the same."""
        losses: list[Tensor] = []
        logs: dict[str, Tensor] = {}
        for key, logits in outputs.items():
            code, weight, total = (inputs[f"{OTHER[key]}_{what}"] for what in ("code", "weight", "total"))
            weight = weight.to(logits.dtype)
            losses.append((F.cross_entropy(logits, code, reduction="none") * weight).sum() / total)
            logs[f"accuracy_{self.names[key]}"] = ((logits.argmax(1) == code) * weight).sum() / total
        return {"loss": torch.stack(losses).sum(), **logs}

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Each side with its own cluster, and which cluster the other side says that it is."""
        panels = []
        for key, side in self.sides.items():
            code, said = inputs[f"{key}_code"].tolist(), outputs[OTHER[key]].argmax(1).tolist()
            panels.append(Panel(side.name, side.cells(inputs), scale=side.scale(inputs)))
            panels.append(Panel(f"cluster of {side.name}", [f"{number}" for number in code]))
            right = [a == b for a, b in zip(code, said, strict=True)]
            panels.append(Panel(f"predicted from {self.names[OTHER[key]]}", [f"{number}" for number in said], right))
        return panels
