"""The class of every pixel: a linear or small convolutional head on feature maps, of a frozen or a tuned encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.adaptation.features import inputs_of
from mmssl.adaptation.labeled import Question
from mmssl.adaptation.maps import MapRows, maps_of
from mmssl.adaptation.probes._dense import Built, DenseLearner, DenseTask, LabelsOf
from mmssl.adaptation.probes._unfinished import Trained
from mmssl.adaptation.probes.base import RawRows, Setting
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.targets.masks import Masks
from mmssl.batch import Batch, to_device
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.media.mask import IGNORED
from mmssl.modules.dense import ConvolutionalMaps, LinearMaps
from mmssl.modules.mode import evaluating

HEAD_RATE = 10.0
"""Of the head next to a tuned encoder: it starts from nothing, as the segmentation heads of MMSegmentation do."""


class Pixels(Built):
    """What builds `PixelClasses` again.

    Attributes:
        head: see `Segmentation`.
        classes: class numbers of masks.
    """

    probe: Literal["segmentation"] = "segmentation"
    head: Literal["linear", "conv"]
    classes: tuple[Annotated[int, Ge(0), Lt(IGNORED)], ...]

    def build(self, encoder: Encoder) -> PixelClasses:
        """See `Built`."""
        return PixelClasses(self, self.make_head(), encoder)

    def make_head(self) -> nn.Module:
        """Depth -> map, size of the picture -> logits of the classes; with random weights."""
        if self.head == "linear":
            return LinearMaps(self.depths, len(self.classes))
        return ConvolutionalMaps(self.depths, len(self.classes), self.width)


class PixelClasses(DenseTask):
    """Cross-entropy of every pixel that has a class.

    Args:
        built: its arguments.
        head: see `Pixels.make_head`.
        encoder: of the pictures; None where rows come as maps.
    """

    def __init__(self, built: Pixels, head: nn.Module, encoder: Encoder | None = None) -> None:
        super().__init__(built)
        self.head, self.reads = head, encoder
        self.inputs = tuple(built.depths) if encoder is None else (inputs_of(encoder)[0],)
        self.needs = (*self.inputs, "label")
        # Class number -> number of the logit; the classes that no training row has are never learned.
        classes, numbers = torch.tensor(built.classes), torch.full((IGNORED + 1,), IGNORED)
        numbers[classes] = torch.arange(len(classes))
        self.classes, self.numbers = nn.Buffer(classes), nn.Buffer(numbers)

    def logits(self, inputs: Mapping[str, Tensor], size: Sequence[int]) -> Tensor:
        """(B, C, *size)."""
        depths = tuple(self.built.depths)
        maps = inputs if self.reads is None else maps_of(self.reads, inputs, depths)
        return self.head({depth: maps[depth] for depth in depths}, size)

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, C, H, W)."""
        return {"logits": self.logits(inputs, inputs["label"].shape[-2:])}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Mean over the pixels that have a class."""
        target = self.numbers[inputs["label"].long()]
        total = F.cross_entropy(outputs["logits"], target, ignore_index=IGNORED, reduction="sum")
        return {"loss": total / (target != IGNORED).sum().clamp(min=1)}

    def answer(self, inputs: Batch, size: Sequence[int] = ()) -> Tensor:
        """Class numbers, uint8 (B, *size); of pictures their own size where it is left out."""
        logits = self.logits(inputs, tuple(size) or inputs[self.inputs[0]].shape[-2:])
        return self.classes[logits.argmax(1)].to(torch.uint8)


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
        names: of the classes from number 0 on, for a network that is saved; the numbers where left out.
    """

    column: ClassVar[str] = "mask"
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
        names: tuple[str, ...] = (),
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
        self.head, self.boundary, self.width, self.names = head, boundary, width, names

    def ask(self, model: Model, request: Request) -> Question:
        """See `Learner.ask`."""
        question = super().ask(model, request)
        assert isinstance(question.target, Masks)  # the one that it learns
        return replace(question, target=question.target.scored(boundary=self.boundary))

    def predict(
        self, target: Any, train: MapRows, labels: Tensor, test: MapRows, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`; answers are class numbers, uint8 (M, H, W)."""
        classes = target.classes(labels).tolist()
        if self.names and classes[-1] >= len(self.names):
            raise RecipeError(f"names: masks have class number {classes[-1]}, and there are {len(self.names)} names")
        (first,) = train.read([torch.arange(1)])
        built = Pixels(
            depths={depth: first[depth].shape[1] for depth in train.depths},
            width=self.width,
            names=tuple(self.names[number] if self.names else str(number) for number in classes),
            head=self.head,
            classes=tuple(classes),
        )
        size = target.masks(labels[:1]).shape[-2:]
        device = next(train.encoder.parameters()).device
        # Maps, or pictures where the encoder is trained.
        seen, unseen = (RawRows(x.encoder, x.split, x.ids) if self.tune else x for x in (train, test))
        for setting in settings:
            objective, answers = self.learn(
                built,
                partial(self._untrained, built, train.encoder, setting, seed),
                seen,
                LabelsOf(target.masks, labels),
                unseen,
                partial(_answers, rows=unseen, size=size, batch_size=4 * self.options["batch_rows"]),
                setting,
                seed,
                last=len(settings) == 1,
            )
            if objective is not None:
                whole = objective if self.tune else PixelClasses(built, objective.head, train.encoder).to(device)
                self.trained = Trained(whole, train.split)
            yield answers

    def _untrained(self, built: Pixels, encoder: Encoder, setting: Setting, seed: int) -> PixelClasses:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = built.make_head()
        for parameter in head.parameters() if self.tune else ():
            parameter.lr_scale = HEAD_RATE  # type: ignore[attr-defined]
        own = self.copy_of(encoder, setting) if self.tune else None
        return PixelClasses(built, head, own).to(next(encoder.parameters()).device)


def _answers(objective: PixelClasses, rows: RawRows, size: Sequence[int], batch_size: int) -> Tensor:
    """Class numbers, uint8 (M, H, W) on the CPU."""
    device = next(objective.parameters()).device
    found = []
    with evaluating(objective), torch.no_grad():
        for batch in rows.read(torch.arange(len(rows)).split(batch_size)):
            found.append(objective.answer(to_device(batch, device), size).cpu())
    return torch.cat(found)
