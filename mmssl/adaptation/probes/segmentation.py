"""The class of every pixel: a linear or small convolutional head on feature maps, of a frozen or a tuned encoder."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.adaptation.features import inputs_of
from mmssl.adaptation.labeled import Question
from mmssl.adaptation.maps import MapRows, maps_of, read_maps
from mmssl.adaptation.probes import _trained
from mmssl.adaptation.probes.base import Learner, RawRows, Setting
from mmssl.adaptation.probes.finetune import scale_by_depth
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import Split
from mmssl.adaptation.targets.masks import Masks
from mmssl.batch import Batch, to_device
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.media.mask import IGNORED
from mmssl.modules.dense import ConvolutionalMaps, LinearMaps
from mmssl.modules.mode import evaluating
from mmssl.objectives.base import Chance, Objective
from mmssl.ops.draws import Draws

Head = Literal["linear", "conv"]


class PixelClasses(Objective):
    """Cross-entropy of every pixel that has a class. It reads labels, which no pretext task does.

    Args:
        head: depth -> map, size of the picture -> logits of the classes.
        classes: their numbers, int64 (C,).
        depths: that the head reads.
        encoder: trained along; None where rows come as maps.
    """

    def __init__(self, head: nn.Module, classes: Tensor, depths: Sequence[str], encoder: Encoder | None = None) -> None:
        super().__init__({} if encoder is None else {encoder.modality: encoder})
        self.head, self.depths = head, tuple(depths)
        self.tuned = encoder
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


class MasksOf:
    """Masks of rows that are decoded when a step wants them.

    Args:
        target: that reads them.
        labels: of the rows, int64 (N,).
    """

    def __init__(self, target: Masks, labels: Tensor) -> None:
        self.target, self.labels = target, labels

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.target.masks(self.labels[index])


class Segmentation(Learner[MapRows]):
    """AdamW with a cosine schedule; without augmentation, and at the size to which pictures are decoded.

    Of the maps of all depths the deepest of each resolution are read together, or those of `depths`. Settings are
    chosen by mean IoU.

    Args:
        head: `linear`: normalization and a linear map, enlarged; `conv`: two 3 x 3 convolutions of `width` as well.
        tune: train a copy of the encoder along, with layer-wise learning rates as `finetune` does.
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

    frozen: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    learns = ("masks",)

    def __init__(
        self,
        *,
        head: Head = "linear",
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
        super().__init__()
        if decay and not tune:
            raise RecipeError("segmentation: decay is for the layers of an encoder that is tuned; set tune: true")
        self.head, self.tune, self.depths, self.boundary, self.width = head, tune, depths, boundary, width
        self.lr = lr or ((3e-4, 1e-3) if tune else (1e-3, 1e-2))
        self.decay = (decay or (0.75, 1.0)) if tune else ()
        self.steps, self.batch_rows, self.weight_decay = steps, batch_rows, weight_decay

    @property
    def tells_depths(self) -> bool:
        """Where the encoder stays as it is."""
        return not self.tune

    def settings(self) -> Sequence[Setting]:
        """Learning rates, and decays where the encoder is tuned, the least change first."""
        if not self.tune:
            return [{"lr": lr} for lr in sorted(self.lr)]
        return [{"lr": lr, "decay": decay} for lr, decay in itertools.product(sorted(self.lr), sorted(self.decay))]

    def ask(self, model: Model, request: Request) -> Question:
        """See `Learner.ask`."""
        if model.encoder.modality != "image":
            raise RecipeError(f"{self.name} reads pictures, and encoder '{model.name}' reads {model.encoder.modality}")
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
        for setting in settings:
            objective = self._train(target, train, labels, classes, widths, setting, seed)
            yield _answers(objective, self._seen(test), size, 4 * self.batch_rows)

    def _train(
        self,
        target: Masks,
        rows: MapRows,
        labels: Tensor,
        classes: Tensor,
        widths: Mapping[str, int],
        setting: Setting,
        seed: int,
    ) -> PixelClasses:
        device = next(rows.encoder.parameters()).device
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = (
                LinearMaps(widths, len(classes))
                if self.head == "linear"
                else ConvolutionalMaps(widths, len(classes), self.width)
            )
        encoder = copy.deepcopy(rows.encoder).freeze(False) if self.tune else None
        if encoder is not None:
            scale_by_depth(encoder, setting["decay"])
        objective = PixelClasses(head, classes, rows.depths, encoder).to(device)
        _trained.train(
            objective,
            self._seen(rows),
            MasksOf(target, labels),
            lr=setting["lr"],
            weight_decay=self.weight_decay,
            steps=self.steps,
            batch_rows=self.batch_rows,
            seed=seed,
        )
        return objective

    def _seen(self, rows: MapRows) -> RawRows:
        """Maps, or pictures where the encoder is trained."""
        return RawRows(rows.encoder, rows.split, rows.ids) if self.tune else rows

    def _read(
        self, encoders: Sequence[Encoder], split: Split, ids: Tensor, request: Request
    ) -> tuple[list[dict[str, MapRows]], Tensor]:
        """See `Learner`."""
        return read_maps(
            encoders,
            split,
            ids,
            self.depths,
            layers=request.layers,
            keep=not self.tune,
            batch_size=min(request.batch_size, 4 * self.batch_rows),
        )


def _answers(objective: PixelClasses, rows: RawRows, size: Sequence[int], batch_size: int) -> Tensor:
    """Class numbers, uint8 (M, H, W) on the CPU."""
    device = next(objective.parameters()).device
    found = []
    with evaluating(objective), torch.no_grad():
        for batch in rows.read(torch.arange(len(rows)).split(batch_size)):
            logits = objective.logits(to_device(batch, device), size)
            found.append(objective.classes[logits.argmax(1)].to(torch.uint8).cpu())
    return torch.cat(found)
