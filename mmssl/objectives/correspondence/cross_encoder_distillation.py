"""Cross-encoder distillation: how well does a network that sees both say that these candidates fit?

Lei et al. 2022, "LoopITR: Combining Dual and Cross Encoder Architectures for Image-Text Retrieval", arXiv 2203.05465. A
dual encoder compares two vectors, and finds among millions; a cross-encoder looks at a pair together, and is better and
slow. Each helps the other here: the dual encoder finds the hard negatives that the cross-encoder learns to refuse
(`matching`, of which this is an extension), and the cross-encoder's scores of a row's candidates, its own partner and
its hardest negatives in the global batch, are what the dual encoder learns to say, in both directions. `kl` is the
Kullback-Leibler divergence of the two softmaxes over the candidates, as in the paper; `margin_mse` the squared
difference of the two margins between the partner and each negative (Hofstätter et al. 2020, arXiv 2010.02666).

The cross-encoder is the fusion with a linear layer on it, and reads the dual encoder's own towers or others: those that
the fusion's `reads` names. Others can be frozen, and so can the fusion (`frozen: true`, `pretrained: RUN`); then the
linear layer alone learns, and the dual encoder changes nothing of its teacher.

Known traps. The teacher's scores are targets and take no gradient. Candidates that are equal to the row are no
negatives and are left out, as in `matching`. A teacher that knows nothing gives every candidate the same score, and a
student that knows nothing then has no loss: `relative_error` is the loss over that of a student to which all candidates
are alike, `uninformed`. It is 1 for a student that says the same of all, and above where the scores of the student are
further apart than those of a teacher that is flat, or knows less than it. Each of the three terms logs under its name
and has a verdict of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.encoders.fusion import FusionEncoder
from mmssl.errors import RecipeError
from mmssl.modules.side import SIDES, both_sides, find_fusion
from mmssl.objectives.base import Chance, Pair, Panel
from mmssl.objectives.correspondence.matching import COLDEST, VIEWS, WARMEST, Matching
from mmssl.ops.gather import average, gather, own_rows
from mmssl.ops.losses import divergence
from mmssl.ranges import AboveZero, Positive, Temperature, Width


class CrossEncoderDistillation(Matching):
    """Teach two towers the scores of a network that sees both sides.

    Args:
        encoders: holds the two encoders, the fusion, and those that the fusion reads.
        a: name of the first encoder of the dual encoder.
        b: name of the second.
        fusion: name of the fusion.
        form: `kl` or `margin_mse`.
        weight: of the distillation.
        candidates: negatives of each row and direction, the most similar ones; fewer where the batch has fewer.
        teacher_temperature: divides the cross-encoder's scores.
        contrastive: weight of the contrastive term of the dual encoder.
        width: of the space that it compares in.
        temperature: initial value of what its cosines are divided by, learned between 0.001 and 0.5.
        views: of images: how they are cropped, see `Crop`.
        chunk: pairs that the fusion looks at at a time; see `Matching`.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        a: str = "image",
        b: str = "text",
        fusion: str = "fusion",
        form: Literal["kl", "margin_mse"] = "kl",
        weight: AboveZero = 1.0,
        candidates: Positive = 4,
        teacher_temperature: Temperature = 1.0,
        contrastive: AboveZero = 1.0,
        width: Width = 256,
        temperature: Annotated[float, Ge(COLDEST), Le(WARMEST)] = 0.07,
        views: dict[str, Any] = VIEWS,
        chunk: Positive | None = None,
    ) -> None:
        super().__init__(
            encoders,
            a=a,
            b=b,
            fusion=fusion,
            contrastive=contrastive,
            width=width,
            temperature=temperature,
            views=views,
            chunk=chunk,
        )
        self.form, self.candidates = form, candidates
        self.distilled, self.teacher_temperature = weight, teacher_temperature

    def _find_fusion(self, name: str) -> FusionEncoder:
        task = "cross_encoder_distillation"
        fusion = find_fusion(task, name, self.encoder(name), None, None)
        first, second = fusion.reads
        self.readers = both_sides(first, second, self.encoder, self.sides["a"].crop)
        for reader, side in zip(self.readers.values(), self.sides.values(), strict=True):
            if reader.modality != side.modality:
                raise RecipeError(
                    f"{task}: '{side.name}' reads {side.modality}, and '{reader.name}', which the fusion '{name}' "
                    f"reads in its place, {reader.modality}"
                )
        return fusion

    def predict(self, inputs: Batch) -> Batch:
        """See `Matching.predict`; the tokens are those that the fusion reads."""
        outputs = super().predict(inputs)
        for key, reader in self.readers.items():
            if reader.encoder is not self.sides[key].encoder:
                outputs.pop(f"{key}_valid", None)
                outputs |= self._tokens(key, reader.features(inputs))
        return outputs

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The terms of matching, and the distillation: a mean over rows, or over margins, of both directions."""
        found = super().loss(outputs, inputs)
        terms = {(key if key == "loss" else self._named(key)): value for key, value in found.items()}
        taught, said, there = self._scores(outputs, inputs["items"])
        errors, alike = (self._errors(taught, scores, there) for scores in (said, torch.zeros_like(said)))
        count = average((there[:, 1:] if self.form == "margin_mse" else there[:, 0]).sum())
        constant = average(alike.sum())
        terms |= {
            "distillation/loss": errors.sum() / count.clamp(min=1),
            "distillation/uninformed": alike.sum() / count.clamp(min=1),
            "distillation/relative_error": torch.where(
                constant > 0, errors.detach().sum() / constant.clamp(min=1e-12), 1.0
            ),
        }
        return {**terms, "loss": terms["loss"] + self.distilled * terms["distillation/loss"]}

    def chance(self, rows: int) -> Chance:
        """Those of matching, each under the name of its term, and the error of a student that says the same of all."""
        levels = {self._named(key): level for key, level in super().chance(rows).metrics.items()}
        return Chance(None, levels | {"distillation/relative_error": 1.0})

    def _named(self, key: str) -> str:
        """`accuracy` of matching -> `matching/accuracy`, `contrastive` -> `contrastive/loss`."""
        if key in ("matching", "contrastive"):
            return f"{key}/loss"
        return f"{'contrastive' if key in (*self.accuracies, 'temperature') else 'matching'}/{key}"

    def _errors(self, taught: Tensor, said: Tensor, there: Tensor) -> Tensor:
        """Of each row (2B,), or of each margin (2B, K), 0 where there is none."""
        if self.form == "margin_mse":
            wanted, answered = (scores[:, :1] - scores[:, 1:] for scores in (taught, said))
            return torch.where(there[:, 1:], (answered - wanted).square(), 0)
        wanted, answered = (scores.masked_fill(~there, -math.inf).log_softmax(1) for scores in (taught, said))
        return divergence(wanted.exp(), answered)

    def _scores(self, outputs: Batch, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row's partner and its K candidates, for its `a` and then for its `b`, (2B, 1 + K).

        Scores of the cross-encoder, those of the dual encoder, and bool, False where a batch has no such candidate.
        """
        everyones = gather(items)
        equal, own = (items[:, None] == everyones).any(2), own_rows(len(items), items.device)
        number = min(self.candidates, len(everyones))
        places, there = [], []
        for similar in self._similar(outputs, len(everyones)):
            hardest = similar.masked_fill(equal, -math.inf).topk(number)
            places.append(torch.cat([own[:, None], hardest.indices], dim=1))
            there.append(torch.cat([own[:, None] >= 0, hardest.values > -math.inf], dim=1))
        itself = own.repeat_interleave(1 + number)
        to_b, to_a = (place.flatten() for place in places)
        with torch.no_grad():
            logits = self._fused(outputs, torch.cat([itself, to_a]), torch.cat([to_b, itself]))
        taught = ((logits[:, 1] - logits[:, 0]) / self.teacher_temperature).view(-1, 1 + number)
        said = [
            torch.einsum("bd,bkd->bk", outputs[side], gather(outputs[other])[place]) / self.temperature[0]
            for side, other, place in zip(SIDES, SIDES[::-1], places, strict=True)
        ]
        return taught, torch.cat(said), torch.cat(there)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The towers that are compared, and those that the fusion reads, which may be the same."""
        (compared,) = super().pairs
        first, second = (reader.name for reader in self.readers.values())
        if (first, second) == (self.a, self.b):
            return (compared,)
        return (compared._replace(match=None), Pair(first, second, match=self.match))

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Those of matching, and how likely the row's own `b` is among its candidates, to teacher and to student."""
        taught, said, there = (scores[: len(inputs["items"])] for scores in self._scores(outputs, inputs["items"]))
        own = [scores.masked_fill(~there, -math.inf).softmax(1)[:, 0].tolist() for scores in (taught, said)]
        lines = [f"{teacher:.2f} | {student:.2f}" for teacher, student in zip(*own, strict=True)]
        title = f"own {self.b} of {taught.shape[1]}: teacher | student"
        return [*super().preview(inputs, outputs), Panel(title, lines)]
