"""Boxes and their classes: a detector of torchvision with a frozen or a tuned encoder as its backbone."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmssl.adaptation.average_precision import need_evaluation
from mmssl.adaptation.features import inputs_of
from mmssl.adaptation.labeled import Question
from mmssl.adaptation.maps import MapRows, maps_of
from mmssl.adaptation.probes import _trained
from mmssl.adaptation.probes._dense import DenseLearner, LabelsOf
from mmssl.adaptation.probes.base import RawRows, Setting
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.targets.boxes import Boxes
from mmssl.batch import Batch, to_device
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.detectors import BEST, make_detector
from mmssl.modules.mode import evaluating
from mmssl.modules.pyramid import Pyramid, SimplePyramid
from mmssl.objectives.base import Chance, Objective
from mmssl.ops.draws import Draws

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


class Detector(Objective):
    """The losses of a detector of torchvision, summed. It reads labels, which no pretext task does.

    Args:
        network: see `make_detector`.
        key: of the pictures in a batch.
    """

    def __init__(self, network: nn.Module, key: str) -> None:
        super().__init__({})
        self.network, self.key, self.needs = network, key, (key, "label")

    def chance(self, rows: int) -> Chance:
        """Not known before the labels are."""
        return Chance(None)

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Rows as they are; no augmentation."""
        return {key: batch[key] for key in self.needs}

    def predict(self, inputs: Batch) -> Batch:
        """`pictures` float32 (B, 3, H, W) in [0, 1]: torchvision's networks make their losses where they see boxes."""
        return {"pictures": inputs[self.key].float() / 255}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Sum of the network's own losses, which are logged as well."""
        rows = [row[row[:, 4] >= 0] for row in inputs["label"]]
        targets = [{"boxes": row[:, :4], "labels": row[:, 4].long() + 1} for row in rows]
        losses: dict[str, Tensor] = self.network(list(outputs["pictures"]), targets)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


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
        device = next(train.encoder.parameters()).device
        for setting in settings:
            with evaluating(train.encoder), torch.no_grad():
                maps = maps_of(train.encoder, first, train.depths)
            encoder = self.copy_of(train.encoder, setting)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = self._network(encoder, maps, target.width, first[key].shape[-1])
            objective = Detector(network, key).to(device)
            reads = LabelsOf(target.padded, labels)
            _trained.train(objective, seen, reads, lr=setting["lr"], seed=seed, **self.options)
            yield _answers(objective, unseen, self.options["batch_rows"])

    def _network(self, encoder: Encoder, maps: Mapping[str, Tensor], classes: int, size: int) -> nn.Module:
        """With random weights but for the encoder's."""
        strides = {depth: size / one.shape[-1] for depth, one in maps.items()}
        levels = dict(sorted(strides.items(), key=lambda item: item[1]))
        pyramid: nn.Module
        if len(levels) > 1:
            if len(set(levels.values())) < len(levels):
                raise RecipeError("depths: those of a pyramid are of different resolutions; name one of each")
            pyramid = Pyramid({depth: maps[depth].shape[1] for depth in levels}, self.width)
            distances = list(levels.values())
        else:
            ((depth, stride),) = levels.items()
            scales = [scale for scale in SCALES if stride / scale >= FINEST and stride / scale <= size][:LEVELS]
            pyramid = SimplePyramid(maps[depth].shape[1], self.width, tuple(scales))
            distances = [stride / scale for scale in scales]
        if self.detector == "faster_rcnn" and any(
            abs(math.log2(one) - round(math.log2(one))) > 0.1 for one in distances
        ):
            told = ", ".join(f"{one:g}" for one in distances)
            raise RecipeError(
                f"faster_rcnn takes maps whose places are powers of two apart, and these are {told} pixels apart; use "
                "fcos or retinanet"
            )
        return make_detector(
            self.detector, Backbone(encoder, list(levels), pyramid, self.width), classes, size, distances
        )


def _answers(objective: Detector, rows: RawRows, batch_size: int) -> Tensor:
    """See `Detection.predict`; on the CPU."""
    device = next(objective.parameters()).device
    found = []
    with evaluating(objective), torch.no_grad():
        for batch in rows.read(torch.arange(len(rows)).split(batch_size)):
            for boxes in objective.network(list(objective.predict(to_device(batch, device))["pictures"])):
                row = torch.full((BEST, 6), -1.0)
                best = len(boxes["scores"])
                row[:best] = torch.cat(
                    [boxes["boxes"], boxes["scores"][:, None], boxes["labels"][:, None].float() - 1], dim=1
                ).cpu()
                found.append(row)
    return torch.stack(found)
