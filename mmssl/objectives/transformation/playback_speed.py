"""Playback speed: how many times as fast as the others is this clip played?

Wang, Jiao & Liu 2020, "Self-supervised Video Representation Learning by Pace Prediction", arXiv 2008.05861: of a video
every p-th frame is taken, with p one of a few paces, and a linear head says which. All clips have the same number of
frames and lie anywhere in a span that is as long as the quickest one's at every pace. Each frame is jittered in color
on its own, so that no sum of differences between frames tells the pace. The paper's contrastive term is not followed.

Known traps. The released code goes on with the first frame when a video ends, and does so more often the higher the
pace: the cut tells the label. Here no clip reaches the end, and none the still in which a video ends that is shorter
than its row: a row without room before it does not count (`valid` is the share that does). In that code clips of all
paces begin anywhere alike, and what comes late in a video is seen by the quicker ones alone. Who knows of one frame of
16 its moment in a row of 75 is then right 46 % of the time (of the last frame always), and 32 % (at most 53 %) with
`equal_span`; chance is 25 %. Of longer rows it is less. Frames that were stored twice tell the pace at which
they repeat: take no `data.video.fps` above that of the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.augment import color_jitter, draw_jitter
from mmssl.ops.clips import draw_start, frames_at
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.losses import classified
from mmssl.ranges import Positive, Share

VIEWS = {"flip": 0.5}


class PlaybackSpeed(Objective):
    """Classification of the pace at which frames were taken.

    Args:
        encoders: holds the video encoder.
        encoder: its name.
        paces: P; a clip is every frame, every second ... or every P-th frame of the row.
        frames: of a clip, from 2.
        equal_span: whether clips of all paces lie in spans of one length, slower ones anywhere in theirs; else each
            begins where the span does.
        jitter: probability that a frame is jittered in color, each on its own, as strongly as SimCLR does it.
        views: how clips are cropped, all frames alike; see `Crop`.
    """

    needs = ("video",)
    divisors = ("valid_rows",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "video",
        paces: Positive = 4,
        frames: Positive = 16,
        equal_span: bool = True,
        jitter: Share = 0.8,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders)
        if paces < 2 or frames < 2:
            raise RecipeError(
                f"playback_speed: {paces} paces of {frames} frames say nothing of speed; take 2 or more of both"
            )
        self.name, self.paces, self.frames, self.equal_span, self.jitter = encoder, paces, frames, equal_span, jitter
        self.crop = Crop.of(VIEWS, views)
        self.head = nn.Linear(self.encoder(encoder, "video").dim, paces)

    def chance(self, rows: int) -> Chance:
        """P paces, equally often."""
        return Chance(math.log(self.paces), {"accuracy": 1 / self.paces})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`video` (B, T, 3, H, W) -> `video` (B, f, 3, h, w), `pace` (B,) from 0, `start` (B,), `valid` bool (B,)."""
        video = batch["video"]
        span = (self.frames - 1) * self.paces + 1
        if span > video.shape[1]:
            raise RecipeError(
                f"playback_speed: {self.frames} frames, {self.paces} apart, need {span} of a row, and it has "
                f"{video.shape[1]}: raise data.video.frames, or lower frames or paces"
            )
        start, valid = draw_start(video, span, draws)
        pace = draws.integers(self.paces)
        if self.equal_span:
            free = span - ((self.frames - 1) * (pace + 1) + 1)
            start = start + (draws.uniform() * (free + 1)).long().minimum(free)
        places = start[:, None] + (pace[:, None] + 1) * torch.arange(self.frames, device=video.device)
        clip = self.crop(frames_at(video, places), draws)
        if self.jitter:
            clip = self._recolored(as_floats(clip), draws)
        return {"video": clip, "pace": pace, "start": start, "valid": valid, "valid_rows": valid.sum()}

    def _recolored(self, clip: Tensor, draws: Draws) -> Tensor:
        """Each frame on its own, (B, f, 3, h, w)."""
        factors, order = draw_jitter(draws, self.frames)
        chosen = draws.chance(self.jitter, self.frames)
        changed = color_jitter(clip.flatten(0, 1), factors.flatten(0, 1), order.flatten(0, 1)).view_as(clip)
        return torch.where(chosen[:, :, None, None, None], changed, clip)

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, P)."""
        return {"logits": self.head(self.encoder(self.name)(inputs["video"]).pooled)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy over the rows that count; `valid`, their share."""
        return classified(outputs["logits"], inputs["pace"], inputs["valid"], inputs["valid_rows"])

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The clip as it is played, its pace, and the one that the network takes it for."""
        pace, said, valid = inputs["pace"].tolist(), outputs["logits"].argmax(1).tolist(), inputs["valid"].tolist()
        return [
            Panel("input", list(as_floats(inputs["video"]))),
            Panel(
                "target", [f"× {k + 1}" if counts else "does not count" for k, counts in zip(pace, valid, strict=True)]
            ),
            Panel(
                "prediction",
                [f"× {k + 1}" for k in said],
                [a == b if counts else None for a, b, counts in zip(pace, said, valid, strict=True)],
            ),
        ]
