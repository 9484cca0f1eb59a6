"""The class of every pixel: a linear or small convolutional head on feature maps, of a frozen or a tuned encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.adaptation.features import inputs_of
from mmssl.adaptation.labeled import Question
from mmssl.adaptation.maps import MapRows, maps_of
from mmssl.adaptation.probes import _trained
from mmssl.adaptation.probes._dense import DenseLearner, LabelsOf
from mmssl.adaptation.probes.base import RawRows, Setting
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.targets.masks import Masks
from mmssl.batch import Batch, to_device
from mmssl.encoders.base import Encoder
from mmssl.media.mask import IGNORED
from mmssl.modules.dense import ConvolutionalMaps, LinearMaps
from mmssl.modules.mode import evaluating
from mmssl.objectives.base import Chance, Objective
from mmssl.ops.draws import Draws

HEAD_RATE = 10.0
"""Of the head next to a tuned encoder: it starts from nothing, as the segmentation heads of MMSegmentation do."""


class PixelClasses(Objective):
    """Cross-entropy of every pixel that has a class. It reads labels, which no pretext task does.

    Args:
        head: depth -> map, size of the picture -> logits of the classes.
        classes: their numbers, int64 (C,).
        depths: that the head reads.
        encoder: trained along; None where rows come as maps.
    """

    def __init__(self, head: nn.Module, classes: Tensor, depths: Sequence[str], encoder: Encoder | None = None) -> None:
        super().__init__({})
        self.head, self.depths, self.tuned = head, tuple(depths), encoder
        self.inputs = self.depths if encoder is None else (inputs_of(encoder)[0],)
        self.needs = (*self.inputs, "label")
        # Class number -> number of the logit; the classes that no training row has are never learned.
        numbers = torch.full((IGNORED + 1,), IGNORED)
        numbers[classes] = torch.arange(len(classes))
        self.classes, self.numbers = nn.Buffer(classes), nn.Buffer(numbers)

    def chance(self, rows: int) -> Chance:
        """Not known before the labels are."""
        return Chance(None)

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Rows as they are; no augmentation."""
        return {key: batch[key] for key in (*self.inputs, "label")}

    def logits(self, inputs: Mapping[str, Tensor], size: Sequence[int]) -> Tensor:
        """(B, C, *size)."""
        maps = inputs if self.tuned is None else maps_of(self.tuned, inputs, self.depths)
        return self.head({depth: maps[depth] for depth in self.depths}, size)

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, C, H, W)."""
        return {"logits": self.logits(inputs, inputs["label"].shape[-2:])}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Mean over the pixels that have a class."""
        target = self.numbers[inputs["label"].long()]
        total = F.cross_entropy(outputs["logits"], target, ignore_index=IGNORED, reduction="sum")
        return {"loss": total / (target != IGNORED).sum().clamp(min=1)}


class Segmentation(DenseLearner):
    """AdamW with a cosine schedule; without augmentation, and at the size to which pictures are decoded.

    Of the maps of all depths the deepest of each resolution are read together, or those of `depths`. Settings are
    chosen by mean IoU.

    Args:
        head: `linear`: normalization and a linear map, enlarged; `conv`: two 3 x 3 convolutions of `width` as well.
        tune: train a copy of the encoder along, with layer-wise learning rates as `finetune` does; the head's is ten
            times as high.
        depths: names of `Encoder.layers`.
        boundary: score Boundary IoU as well.
        lr: candidates for the peak learning rate; 1e-3 and 1e-2 where left out, 3e-4 and 1e-3 where the encoder is
            tuned.
        decay: candidates for the factor between a layer of a tuned encoder and the next; 0.75 and 1.0 where left out.
        steps: optimizer steps.
        batch_rows: rows of a step, at most all of them.
        weight_decay: of AdamW.
        width: of the convolutions.
    """

    learns = ("masks",)

    def __init__(
        self,
        *,
        head: Literal["linear", "conv"] = "linear",
        tune: bool = False,
        depths: tuple[str, ...] = (),
        boundary: bool = False,
        lr: tuple[float, ...] = (),
        decay: tuple[float, ...] = (),
        steps: int = 300,
        batch_rows: int = 16,
        weight_decay: float = 1e-4,
        width: int = 64,
    ) -> None:
        super().__init__(
            tune=tune,
            depths=depths,
            lr=lr or ((3e-4, 1e-3) if tune else (1e-3, 1e-2)),
            decay=decay,
            steps=steps,
            batch_rows=batch_rows,
            weight_decay=weight_decay,
        )
        self.head, self.boundary, self.width = head, boundary, width

    def ask(self, model: Model, request: Request) -> Question:
        """See `Learner.ask`."""
        question = super().ask(model, request)
        assert isinstance(question.target, Masks)  # the one that it learns
        return replace(question, target=question.target.scored(boundary=self.boundary))

    def predict(
        self, target: Any, train: MapRows, labels: Tensor, test: MapRows, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`; answers are class numbers, uint8 (M, H, W)."""
        classes = target.classes(labels)
        (first,) = train.read([torch.arange(1)])
        widths = {depth: first[depth].shape[1] for depth in train.depths}
        size = target.masks(labels[:1]).shape[-2:]
        device = next(train.encoder.parameters()).device
        # Maps, or pictures where the encoder is trained.
        seen, unseen = (RawRows(x.encoder, x.split, x.ids) if self.tune else x for x in (train, test))
        for setting in settings:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                head = self._head(widths, len(classes))
            encoder = self.copy_of(train.encoder, setting) if self.tune else None
            for parameter in head.parameters() if self.tune else ():
                parameter.lr_scale = HEAD_RATE  # type: ignore[attr-defined]
            objective = PixelClasses(head, classes, train.depths, encoder).to(device)
            reads = LabelsOf(target.masks, labels)
            _trained.train(objective, seen, reads, lr=setting["lr"], seed=seed, **self.options)
            yield _answers(objective, unseen, size, 4 * self.options["batch_rows"])

    def _head(self, widths: Mapping[str, int], classes: int) -> nn.Module:
        return LinearMaps(widths, classes) if self.head == "linear" else ConvolutionalMaps(widths, classes, self.width)


def _answers(objective: PixelClasses, rows: RawRows, size: Sequence[int], batch_size: int) -> Tensor:
    """Class numbers, uint8 (M, H, W) on the CPU."""
    device = next(objective.parameters()).device
    found = []
    with evaluating(objective), torch.no_grad():
        for batch in rows.read(torch.arange(len(rows)).split(batch_size)):
            logits = objective.logits(to_device(batch, device), size)
            found.append(objective.classes[logits.argmax(1)].to(torch.uint8).cpu())
    return torch.cat(found)
