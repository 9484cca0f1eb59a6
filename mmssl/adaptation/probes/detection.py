"""Boxes and their classes: a detector of torchvision with a frozen or a tuned encoder as its backbone."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmssl.adaptation.average_precision import need_evaluation
from mmssl.adaptation.features import inputs_of
from mmssl.adaptation.labeled import Question
from mmssl.adaptation.maps import MapRows, maps_of
from mmssl.adaptation.probes._dense import Built, DenseLearner, DenseTask, LabelsOf
from mmssl.adaptation.probes._unfinished import Trained
from mmssl.adaptation.probes.base import RawRows, Setting
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.targets.boxes import Boxes
from mmssl.batch import Batch, to_device
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.detectors import BEST, Kind, make_detector
from mmssl.modules.mode import evaluating
from mmssl.modules.pyramid import Pyramid, SimplePyramid
from mmssl.ranges import AboveZero
from mmssl.schema import Pixels

FINEST = 3.0
"""Least distance of places in pixels: finer maps take long, and boxes that need them are too small to tell apart."""
SCALES = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)
LEVELS = 4


class Backbone(nn.Module):
    """An encoder with a pyramid on its maps, as torchvision's detectors take it.

    Args:
        encoder: of pictures.
        depths: that are read.
        pyramid: depth -> map, to name of a level -> map.
        width: of all levels.
    """

    def __init__(self, encoder: Encoder, depths: Sequence[str], pyramid: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.depths, self.pyramid, self.out_channels = encoder, tuple(depths), pyramid, width

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Pictures (B, 3, H, W) in [0, 1] -> level -> map (B, width, h, w)."""
        return self.pyramid(maps_of(self.encoder, {inputs_of(self.encoder)[0]: images}, self.depths))


class Detecting(Built):
    """What builds a `Detector` again.

    Attributes:
        detector: see `Detection`.
        size: side of the square pictures, in pixels.
        strides: distance of places in pixels, of each depth; depths are from fine to coarse.
    """

    probe: Literal["detection"] = "detection"
    detector: Kind
    size: Pixels
    strides: tuple[AboveZero, ...]

    def build(self, encoder: Encoder) -> Detector:
        """See `Built`."""
        pyramid: nn.Module
        if len(self.depths) > 1:
            pyramid, distances = Pyramid(self.depths, self.width), list(self.strides)
        else:
            stride, channels = self.strides[0], next(iter(self.depths.values()))
            scales = [scale for scale in SCALES if stride / scale >= FINEST and stride / scale <= self.size][:LEVELS]
            pyramid = SimplePyramid(channels, self.width, tuple(scales))
            distances = [stride / scale for scale in scales]
        if self.detector == "faster_rcnn" and any(
            abs(math.log2(one) - round(math.log2(one))) > 0.1 for one in distances
        ):
            told = ", ".join(f"{one:g}" for one in distances)
            raise RecipeError(
                f"faster_rcnn takes maps whose places are powers of two apart, and these are {told} pixels apart; use "
                "fcos or retinanet"
            )
        backbone = Backbone(encoder, list(self.depths), pyramid, self.width)
        return Detector(self, make_detector(self.detector, backbone, len(self.names), self.size, distances), encoder)


class Detector(DenseTask):
    """The losses of a detector of torchvision, summed.

    Args:
        built: its arguments.
        network: see `make_detector`.
        encoder: in the network.
    """

    def __init__(self, built: Detecting, network: nn.Module, encoder: Encoder) -> None:
        super().__init__(built)
        self.network, self.key = network, inputs_of(encoder)[0]
        self.inputs, self.needs = (self.key,), (self.key, "label")

    @property
    def reads(self) -> Encoder:  # type: ignore[override]
        """See `DenseTask`; it is part of the network, under one name."""
        return self.network.backbone.encoder  # type: ignore[union-attr, return-value]

    def predict(self, inputs: Batch) -> Batch:
        """`pictures` float32 (B, 3, H, W) in [0, 1]: torchvision's networks make their losses where they see boxes."""
        return {"pictures": inputs[self.key].float() / 255}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Sum of the network's own losses, which are logged as well."""
        rows = [row[row[:, 4] >= 0] for row in inputs["label"]]
        targets = [{"boxes": row[:, :4], "labels": row[:, 4].long() + 1} for row in rows]
        losses: dict[str, Tensor] = self.network(list(outputs["pictures"]), targets)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def answer(self, inputs: Batch) -> Tensor:
        """Boxes, float32 (B, 100, 6), see `Boxes`."""
        found = []
        for boxes in self.network(list(self.predict(inputs)["pictures"])):
            row = boxes["boxes"].new_full((BEST, 6), -1.0)
            columns = [boxes["boxes"], boxes["scores"][:, None], boxes["labels"][:, None].float() - 1]
            row[: len(boxes["scores"])] = torch.cat(columns, dim=1)
            found.append(row)
        return torch.stack(found)


class Detection(DenseLearner):
    """AdamW with a cosine schedule; without augmentation, and at the size to which pictures are decoded.

    Maps of several resolutions become a feature pyramid, the one of a plain transformer a simple one (Li et al. 2022).
    Settings are chosen by AP.

    Args:
        detector: FCOS, RetinaNet or Faster R-CNN; the last one takes distances of places that are powers of two.
        tune: train a copy of the encoder along, with layer-wise learning rates as `finetune` does.
        classes: column of the class of each box; all boxes are of one where there is no such column.
        form: whether boxes are `corners`, left, top, right, bottom, or `extents`, left, top, width, height; the latter
            of cells with the key `bbox`, and the former of others, where left out.
        depths: names of `Encoder.layers`.
        lr: candidates for the peak learning rate.
        decay: candidates for the factor between a layer of a tuned encoder and the next; 0.75 and 1.0 where left out.
        steps: optimizer steps.
        batch_rows: rows of a step, at most all of them.
        weight_decay: of AdamW.
        width: of the pyramid and the heads, a multiple of 32 from 64 on.
    """

    column: ClassVar[str] = "boxes"
    learns = ("boxes",)
    keeps: ClassVar[bool] = False
    finest: ClassVar[float] = FINEST

    def __init__(
        self,
        *,
        detector: Literal["fcos", "retinanet", "faster_rcnn"] = "fcos",
        tune: bool = False,
        classes: str = "classes",
        form: Literal["corners", "extents"] | None = None,
        depths: tuple[str, ...] = (),
        lr: tuple[float, ...] = (1e-3,),
        decay: tuple[float, ...] = (),
        steps: int = 500,
        batch_rows: int = 8,
        weight_decay: float = 0.05,
        width: int = 128,
    ) -> None:
        super().__init__(
            tune=tune,
            depths=depths,
            lr=lr,
            decay=decay,
            steps=steps,
            batch_rows=batch_rows,
            weight_decay=weight_decay,
        )
        if width % 32 or width < 64:  # heads have 32 groups of channels, and one channel of one place has no variance
            raise RecipeError(f"detection: width = {width} should be a multiple of 32 from 64 on")
        self.detector, self.classes, self.form, self.width = detector, classes, form, width

    def ask(self, model: Model, request: Request) -> Question:
        """See `Learner.ask`."""
        need_evaluation()
        question = super().ask(model, request)
        assert isinstance(question.target, Boxes)  # the one that it learns
        return replace(question, target=question.target.asked(classes=self.classes, form=self.form))

    def predict(
        self, target: Any, train: MapRows, labels: Tensor, test: MapRows, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`; answers are boxes, float32 (M, 100, 6), see `Boxes`."""
        seen, unseen = (RawRows(rows.encoder, rows.split, rows.ids) for rows in (train, test))
        key, _ = inputs_of(train.encoder)
        (first,) = seen.read([torch.arange(1)])
        with evaluating(train.encoder), torch.no_grad():
            built = self._built(maps_of(train.encoder, first, train.depths), target.names, first[key].shape[-1])
        for setting in settings:
            objective, answers = self.learn(
                built,
                partial(self._untrained, built, train.encoder, setting, seed),
                seen,
                LabelsOf(target.padded, labels),
                unseen,
                partial(_answers, rows=unseen, batch_size=self.options["batch_rows"]),
                setting,
                seed,
                last=len(settings) == 1,
            )
            if objective is not None:
                self.trained = Trained(objective, train.split)
            yield answers

    def _untrained(self, built: Detecting, encoder: Encoder, setting: Setting, seed: int) -> Detector:
        own = self.copy_of(encoder, setting)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return built.build(own).to(next(encoder.parameters()).device)

    def _built(self, maps: Mapping[str, Tensor], names: Sequence[str | int], size: int) -> Detecting:
        strides = {depth: size / one.shape[-1] for depth, one in maps.items()}
        levels = dict(sorted(strides.items(), key=lambda item: item[1]))
        if len(set(levels.values())) < len(levels):
            raise RecipeError("depths: those of a pyramid are of different resolutions; name one of each")
        return Detecting(
            depths={depth: maps[depth].shape[1] for depth in levels},
            width=self.width,
            names=tuple(names),
            detector=self.detector,
            size=size,
            strides=tuple(levels.values()),
        )


def _answers(objective: Detector, rows: RawRows, batch_size: int) -> Tensor:
    """See `Detection.predict`; on the CPU."""
    device = next(objective.parameters()).device
    found = []
    with evaluating(objective), torch.no_grad():
        for batch in rows.read(torch.arange(len(rows)).split(batch_size)):
            found.append(objective.answer(to_device(batch, device)).cpu())
    return torch.cat(found)
