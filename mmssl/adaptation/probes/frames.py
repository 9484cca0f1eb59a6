"""What happens when: one logistic regression for every frame of a sound or clip, on the features of that moment.

Turian et al. 2022, "HEAR: Holistic Evaluation of Audio Representations", arXiv 2203.03022, ask encoders of sound so.
Features of all frequencies or places of a moment are averaged, and then averaged or interpolated to frames that are as
long for every encoder, so that scores of encoders with other strides compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmssl.adaptation.features import depths_of
from mmssl.adaptation.labeled import Question
from mmssl.adaptation.probes.base import Setting, View
from mmssl.adaptation.probes.logistic import Logistic
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import SourceSplit, Split, in_order
from mmssl.adaptation.targets.events import FRAMES, Events
from mmssl.adaptation.targets.labels import Labels
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import DataError, RecipeError, RunError
from mmssl.modules.mode import evaluating
from mmssl.ranges import Positive

TIMED = ("audio", "video")


class Frames(Logistic):
    """One regression for each class against the rest, as `logistic` fits it, on the frames of all training rows.

    Args:
        start: key of an event's first second.
        end: key of its last one; without it an event is one moment.
        length: key of its seconds, in place of `end`.
        classes: key of its class.
        frames: in a second.
        c: candidates for C, the inverse of the penalty on the sum of the frames' losses.
        max_iter: of L-BFGS.
    """

    frozen: ClassVar[bool] = False  # there is more than a vector a row
    learns = ("events",)
    hold_outs = 1

    def __init__(
        self,
        *,
        start: str = "start",
        end: str = "end",
        length: str | None = None,
        classes: str = "label",
        frames: Positive = FRAMES,
        c: tuple[float, ...] = (1e-2, 1.0, 100.0),
        max_iter: int = 1000,
    ) -> None:
        super().__init__(c=c, max_iter=max_iter)
        self.start, self.end, self.length, self.classes, self.rate = start, end, length, classes, frames

    @property
    def tells_depths(self) -> bool:
        """The encoder stays as it is."""
        return True

    def ask(self, model: Model, request: Request) -> Question:
        """See `Learner.ask`."""
        if model.encoder.modality not in TIMED:
            raise RecipeError(f"{self.name} reads sounds or clips, and '{model.name}' reads {model.encoder.modality}")
        question = super().ask(model, request)
        assert isinstance(question.target, Events)  # the one that it learns
        keys = {"start": self.start, "end": self.end, "length": self.length, "classes": self.classes}
        return replace(question, target=question.target.asked(**keys, frames=self.rate))  # type: ignore[arg-type]

    def predict(
        self, target: Any, train: Tensor, labels: Tensor, test: Tensor, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`; rows are (N, F, D), answers (M, F, C)."""
        truth = target.frames(labels).flatten(0, 1)
        flat = super().predict(Labels(target.names), train.flatten(0, 1), truth, test.flatten(0, 1), settings, seed)
        for answers in flat:
            yield answers.unflatten(0, (len(test), -1))

    def _read(
        self, encoders: Sequence[Encoder], split: Split, ids: Tensor, request: Request
    ) -> tuple[list[View], Tensor]:
        """See `Learner`; the features of every frame."""
        assert isinstance(split, SourceSplit)  # events are read of no other
        how = split.spec
        seconds = {"audio": how.audio.seconds, "video": how.video.frames / how.video.fps}[encoders[0].modality]
        number = max(1, round(seconds * self.rate))
        parts: list[dict[str, list[Tensor]]] = [{} for _ in encoders]
        read: list[Tensor] = []
        with evaluating(*encoders), torch.no_grad():
            for batch in split.read(in_order(ids.numpy(), request.batch_size)):
                read.append(batch["id"])
                for encoder, lists in zip(encoders, parts, strict=True):
                    depths = depths_of(encoder, batch, request.layers)
                    span = encoder.span(batch[encoder.modality], how.video.fps) or seconds
                    for depth, features in depths.items():
                        frames = over_time(features, encoder.modality, number, seconds / span)
                        lists.setdefault(depth, []).append(frames.cpu())
        if not read:
            raise DataError(f"{split.where}: no row can be decoded")
        views = [{depth: torch.cat(some) for depth, some in lists.items()} for lists in parts]
        if not all(x.isfinite().all() for view in views for x in view.values()):
            raise RunError("features are not finite: training diverged, or the encoder's precision is too low")
        return [dict(view) for view in views], torch.cat(read)


def moments_of(features: Features, modality: str) -> Tensor:
    """What there is at each moment, (B, t, D), the mean over its places or frequencies; a picture is one moment.

    Raises:
        RecipeError: for tokens that are in no places.
    """
    dimensions = {"audio": 2, "video": 3, "image": 2}
    if len(features.grid) != dimensions[modality]:
        raise RecipeError(f"moments are of tokens in their places, and those of {modality} have a grid {features.grid}")
    places = features.tokens.unflatten(1, features.grid)
    if modality == "image":
        return places.mean((1, 2))[:, None]
    return places.mean(1) if modality == "audio" else places.mean((2, 3))


def over_time(features: Features, modality: str, number: int, share: float = 1.0) -> Tensor:
    """The moments of a sound or clip as `number` of them, (B, number, D): means of more, a line between fewer.

    Args:
        features: of tokens in their places.
        modality: of the encoder.
        number: of frames.
        share: of the moments' time, from its start, that the frames are of; the rest is filling.
    """
    moments = moments_of(features, modality).float()
    there = moments.shape[1] * share
    edges = torch.linspace(0, there, number + 1, dtype=torch.float64)
    place = torch.arange(moments.shape[1], dtype=torch.float64)
    if there >= number:  # as much of each moment as lies in the frame
        part = torch.minimum(edges[1:, None], place + 1) - torch.maximum(edges[:-1, None], place)
    else:
        middle = ((edges[1:] + edges[:-1]) / 2 - 0.5).clamp(0, max(0.0, moments.shape[1] - 1))
        part = 1 - (middle[:, None] - place).abs()
    weight = part.clamp(min=0).to(moments)
    return weight @ moments / weight.sum(1, keepdim=True)
