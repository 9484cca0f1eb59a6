"""Matching: do this `a` and this `b` belong together, asked of a network that sees both?

Li et al. 2021, "Align before Fuse", arXiv 2107.07651 (ALBEF): image-text matching, ITM; likewise BLIP (arXiv
2201.12086). Each row gives three pairs: its own, its `a` with another row's `b`, its `b` with another row's `a`. A
fusion looks at each, and a linear layer says whether it is a pair: the mean cross-entropy of all 3B. Hard negatives are
drawn with probability softmax(similarity / temperature) over the global batch. That similarity is what the contrastive
term (ITC) learns, which is part of this task for that reason: both terms see one pass of each tower. With `momentum` it
is ALBEF's, with keys, soft targets and a queue from a slow copy of the towers; without, that of the batch alone.

False negatives are rows with the same `id`, the same `a` or the same `b`, byte by byte before augmentation: they are
never drawn, and the contrastive term counts them as positives. As in BLIP-2 (arXiv 2301.12597) they leave before the
softmax, here with -inf. A row to which every other row is equal has no negative: its two others are left out of the
mean, and `negatives` says which share of them there was.

Known traps. Zeroing after the softmax leaves a row of zeros once similarities saturate, and `multinomial` then stops
the run; so does a batch of one. A small constant inside the softmax changes nothing. Negatives of one's own process
alone get easier with the number of processes. Answering "no" is right for 2 of 3. The fusion runs inside the loss, on
3B pairs and in float32: accumulation does not cut its memory, `chunk` does. ALBEF distils its masked language model,
too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.encoders.fusion import FusionEncoder
from mmssl.errors import RecipeError
from mmssl.modules.side import SIDES, find_fusion
from mmssl.modules.views import Crop
from mmssl.objectives._two_sides import TwoSides
from mmssl.objectives.base import Chance, Pair, Panel, Step
from mmssl.objectives.correspondence._distillation import Distillation
from mmssl.ops.draws import Draws
from mmssl.ops.gather import average, gather, own_rows
from mmssl.ops.pairs import draw_negatives, fingerprint, info_nce
from mmssl.ranges import Count, Positive, Share, Weight, Width

COLDEST, WARMEST = 0.001, 0.5
VIEWS = {"area": (0.9, 1.0)}
PRIOR = math.log(3) - 2 / 3 * math.log(2)  # cross-entropy of answering 1/3 to all of one pair and two negatives


class Matching(TwoSides):
    """Tell pairs from negatives that look like pairs.

    Args:
        encoders: holds both encoders and the fusion that reads them.
        a: name of the first encoder.
        b: name of the second.
        fusion: name of the fusion.
        negatives: `hard` by similarity, or `uniform`.
        contrastive: weight of the contrastive term; 0 for none, with uniform negatives.
        width: of the space that the contrastive term compares in.
        temperature: its initial value, learned between 0.001 and 0.5.
        momentum: share of itself that a slow copy of the towers keeps at a step, 0.995 in ALBEF; None for no copy.
        queue: number of rows whose keys the copy's queue holds, next to those of the batch; any.
        alpha: share of the contrastive target that the copy decides.
        ramp: steps over which that share rises linearly from 0; one epoch in ALBEF.
        views: of images: how they are cropped, see `Crop`.
        chunk: pairs that the fusion looks at at a time, whose activations alone are then held, for a second pass; None
            for all 3B at once. Loss and gradient are the same, but for how dropout falls.
    """

    meets = "loss"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        a: str = "image",
        b: str = "text",
        fusion: str = "fusion",
        negatives: Literal["hard", "uniform"] = "hard",
        contrastive: Weight = 1.0,
        width: Width = 256,
        temperature: Annotated[float, Ge(COLDEST), Le(WARMEST)] = 0.07,
        momentum: Share | None = None,
        queue: Count = 65536,
        alpha: Share = 0.4,
        ramp: Count = 0,
        views: dict[str, Any] = VIEWS,
        chunk: Positive | None = None,
    ) -> None:
        super().__init__(encoders, a, b, Crop.of(VIEWS, views))
        both = self._find_fusion(fusion)
        if not contrastive and (negatives == "hard" or momentum is not None):
            raise RecipeError(
                "matching: without the contrastive term no similarity is learned by which negatives are hard, and "
                "there is nothing to distil; set negatives = uniform and leave momentum out, or contrastive = 1"
            )
        self.fusion, self.negatives, self.weight, self.chunk = fusion, negatives, contrastive, chunk
        self.head = nn.Linear(both.dim, 2)
        self.distillation: Distillation | None = None
        if contrastive:
            self.project_a, self.project_b = (nn.Linear(side.encoder.dim, width) for side in self.sides.values())
            # Of one entry: FSDP2 shards no parameter without dimensions.
            self.temperature = nn.Parameter(torch.tensor([temperature]))
        if momentum is not None:
            self.distillation = Distillation(
                self._towers(), width, 3, momentum=momentum, queue=queue, alpha=alpha, ramp=ramp
            )

    def _find_fusion(self, name: str) -> FusionEncoder:
        return find_fusion("matching", name, self.encoder(name), self.a, self.b)

    def _towers(self) -> dict[str, nn.Module]:
        towers = {key: side.encoder for key, side in self.sides.items()}
        return {**towers, "project_a": self.project_a, "project_b": self.project_b}

    def chance(self, rows: int) -> Chance:
        """Of the matching term 1/3 for every pair; of the contrastive one 1 / (B + K), its accuracies 1 / B."""
        metrics = {"matching": PRIOR, "accuracy": 2 / 3, "ranking": 0.5}
        if self.weight:
            columns = rows + (len(self.distillation.items) if self.distillation else 0)
            metrics |= {"contrastive": math.log(columns)} | dict.fromkeys(self.accuracies, 1 / rows)
        # Where rows are equal to each other there are fewer negatives, and the level of the sum is another.
        return Chance(None, metrics)

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Both sides, see `Side`; `items` int64 (B, 3): numbers of the row, of its `a` and of its `b`.

        `noise` (B, 2, W·B) in [0, 1) decides on the negative `b` and `a` among all rows of the global batch.
        """
        hashes = [fingerprint(batch[side.modality]) for side in self.sides.values()]
        inputs = self.read(batch, draws) | {"items": torch.stack([batch.get("id", hashes[0]), *hashes], dim=1)}
        return inputs | {"noise": draws.uniform(2, draws.rows * draws.shares)}

    def predict(self, inputs: Batch) -> Batch:
        """Of each side `a_tokens` (B, N, D), `a_valid` (B, N) of 0 and 1 where some may be padding.

        With the contrastive term unit vectors `a` (B, width), and `a_key` of the slow copy.
        """
        outputs: Batch = {}
        for key, side in self.sides.items():
            features = side.features(inputs)
            outputs |= self._tokens(key, features)
            if self.weight:
                outputs[key] = self.embed(key, features)
        return outputs if self.distillation is None else outputs | self.distillation.keys(inputs)

    def _tokens(self, key: str, features: Features) -> Batch:
        """What the fusion will read of a side."""
        valid = {} if features.valid is None else {f"{key}_valid": features.valid.to(features.tokens.dtype)}
        return {f"{key}_tokens": features.tokens, **valid}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Both terms, their sum and what each gets right; means over the pairs of the global batch."""
        items = inputs["items"]
        everyones = gather(items)
        equal = (items[:, None] == everyones).any(2)
        terms: dict[str, Tensor] = {}
        if self.weight:
            scale = 1 / self.temperature[0]
            if self.distillation is None:
                terms["contrastive"], *_ = info_nce(outputs["a"], outputs["b"], scale, items=items)
            else:
                terms["contrastive"] = self.distillation.loss(outputs, items, scale)
        similar = self._similar(outputs, len(everyones))
        own = own_rows(len(items), items.device)
        for metric, logits in zip(self.accuracies if self.weight else (), similar, strict=False):
            terms[metric] = (logits.argmax(1) == own).to(logits.dtype).mean()

        (other_b, found_b), (other_a, found_a) = self._draw(similar, equal, inputs["noise"])
        logits = self._three(outputs, other_b, other_a)
        weight = torch.cat([torch.ones_like(found_b), found_b, found_a]).to(logits.dtype)
        answer = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        answer[: len(items)].fill_(1)
        pairs = average(weight.sum())
        terms["matching"] = (F.cross_entropy(logits, answer, reduction="none") * weight).sum() / pairs
        terms["accuracy"] = ((logits.argmax(1) == answer) * weight).sum() / pairs
        pair, with_b, with_a = (logits[:, 1] - logits[:, 0]).detach().chunk(3)
        above = torch.cat([pair - with_b, pair - with_a]).sign() / 2 + 0.5
        negatives = average(weight.sum() - len(items))
        terms["ranking"] = (above * weight[len(items) :]).sum() / negatives.clamp(min=1)
        terms["negatives"] = negatives / (2 * len(items))
        loss = terms["matching"]
        if self.weight:
            loss = loss + self.weight * terms["contrastive"]
            terms["temperature"] = self.temperature[0].detach()
        return {"loss": loss, **terms}

    @torch.no_grad()
    def _similar(self, outputs: Batch, total: int) -> tuple[Tensor, Tensor]:
        """Logits (B, W·B) from a to b and from b to a; zeros without the contrastive term."""
        if not self.weight:
            none = outputs["a_tokens"].new_zeros(len(outputs["a_tokens"]), total)
            return none, none
        a, b = (gather(outputs.get(f"{side}_key", outputs[side])) for side in SIDES)
        return outputs["a"] @ b.T / self.temperature[0], outputs["b"] @ a.T / self.temperature[0]

    def _draw(
        self, similar: tuple[Tensor, Tensor], equal: Tensor, noise: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """For each row another row's `b` and another row's `a`; see `draw_negatives`."""
        to_b, to_a = similar if self.negatives == "hard" else (torch.zeros_like(logits) for logits in similar)
        return draw_negatives(to_b, equal, noise[:, 0]), draw_negatives(to_a, equal, noise[:, 1])

    def _three(self, outputs: Batch, other_b: Tensor, other_a: Tensor) -> Tensor:
        """Logits (3B, 2) of the rows' own pairs, of those with another `b`, of those with another `a`."""
        own = own_rows(len(other_b), other_b.device)
        return self._fused(outputs, torch.cat([own, own, other_a]), torch.cat([own, other_b, own]))

    def _fused(self, outputs: Batch, *rows: Tensor) -> Tensor:
        """Logits (N, 2) of N pairs: `a` of these rows of the global batch, and `b` of those, int64 (N,)."""
        tokens = {side: gather(outputs[f"{side}_tokens"]) for side in SIDES}
        valid = {side: gather(outputs[f"{side}_valid"].detach()) > 0.5 for side in SIDES if f"{side}_valid" in outputs}

        def logits(*rows: Tensor) -> Tensor:
            sides = []
            for side, row in zip(SIDES, rows, strict=True):
                mask = valid[side][row] if side in valid else None
                sides.append(Features(tokens[side][row], tokens[side][row, 0], (), mask))
            return self._logits(*sides)

        if self.chunk is None:
            return logits(*rows)
        parts = zip(*(row.split(self.chunk) for row in rows), strict=True)
        return torch.cat([checkpoint(logits, *part, use_reentrant=False) for part in parts])

    def _logits(self, a: Features, b: Features) -> Tensor:
        """Logits (B, 2) of no pair and of a pair."""
        logits: Tensor = self.head(self.encoder(self.fusion)(a, b).pooled)
        return logits

    def match(self, a: Features, b: Features) -> Tensor:
        """How well given pairs belong together: logits (B,) of the probability that they do."""
        logits = self._logits(a, b)
        return logits[:, 1] - logits[:, 0]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Both encoders: quickly by the cosine of the contrastive term where there is one, slowly by the fusion."""
        embed = (partial(self.embed, "a"), partial(self.embed, "b")) if self.weight else None
        project = (self.project_a, self.project_b) if self.weight else None
        return (Pair(self.a, self.b, embed=embed, match=self.match, project=project),)

    def before_step(self, step: Step) -> None:
        """See `Teacher.begin`."""
        if self.distillation is not None:
            self.distillation.teacher.begin(step.number, self._towers())

    def after_step(self, progress: float) -> None:
        """Clamp the temperature; the slow copy and its queue move on."""
        if self.weight:
            with torch.no_grad():
                self.temperature.clamp_(COLDEST, WARMEST)
        if self.distillation is not None:
            self.distillation.after_step(self._towers())

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both sides, the other `b` and `a` that were drawn, and the probability given to each of the three pairs."""
        equal = (inputs["items"][:, None] == inputs["items"]).any(2)
        noise = inputs["noise"][:, :, : len(equal)]
        (other_b, found_b), (other_a, found_a) = self._draw(self._similar(outputs, len(equal)), equal, noise)
        probability = self._three(outputs, other_b, other_a).detach().softmax(1)[:, 1].view(3, -1)
        known = torch.stack([torch.ones_like(found_b), found_b, found_a])
        answers = [
            " | ".join(
                f"{'✓' if (p > 0.5) == own else '✗'} {float(p):.2f}" if there else "none"
                for p, there, own in zip(*column, (True, False, False), strict=True)
            )
            for column in zip(probability.T, known.T, strict=True)
        ]
        (a, b), (first, second) = zip(*((s.cells(inputs), s.scale(inputs)) for s in self.sides.values()), strict=True)
        return [
            Panel(self.a, a, scale=first),
            Panel(self.b, b, scale=second),
            Panel(f"other {self.b}", [b[int(i)] for i in other_b], scale=second),
            Panel(f"other {self.a}", [a[int(i)] for i in other_a], scale=first),
            Panel(f"a pair? own | other {self.b} | other {self.a}", answers),
        ]
