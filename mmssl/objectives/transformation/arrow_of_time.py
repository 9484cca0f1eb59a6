"""Arrow of time: is this clip played forward or backward?

Wei, Lim, Zisserman & Freeman 2018, "Learning and Using the Arrow of Time", CVPR (Pickup et al. 2014, "Seeing the Arrow
of Time", asked first). Both directions of a clip go through the encoder together, and a linear head says how much each
looks like the right one. Their network reads optical flow and pools moments late (T-CAM); here it is any network of
clips that reads frames.

Known traps. Both directions belong into one batch: in two, batch norm's statistics give them away. A network that sees
each frame alone cannot know the answer, and is refused unless it is shown differences of frames. What tells the
direction without any physics is left in the data: fades and titles, zooms and pans that cameramen like better than
their reverse, black bars that a codec smears behind motion (cut them with `views: {margin: 0.1}`), and what a codec
does between key frames. A video that is shorter than its row ends in a still, which would be known for the end: nothing
is taken from it, and a row without room before it does not count (`valid` is the share that does). Where nothing falls,
breaks or slows down, as among elastic balls, both directions are alike and the task stays at chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.encoders.video import VideoEncoder
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop, encode_views
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.clips import draw_start, frames_at
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over
from mmssl.ops.transfers import upload
from mmssl.ranges import Positive

VIEWS = {"flip": 0.5}


class ArrowOfTime(Objective):
    """Tell a clip from its reverse.

    Args:
        encoders: holds the video encoder, one that sees in which order frames come.
        encoder: its name.
        frames: of a clip, from 2.
        views: how clips are cropped, all frames and both directions alike; see `Crop`.
    """

    needs = ("video",)
    divisors = ("valid_rows",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "video",
        frames: Positive = 16,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders)
        network = self.encoder(encoder, "video")
        if isinstance(network, VideoEncoder) and not network.sees_order:
            raise RecipeError(
                f"arrow_of_time: {network.spec['model']} sees each frame alone, so that a clip and its reverse are one "
                "to it; show it what changes (difference: true), take temporal: transformer, or a network of clips, "
                "such as torchvision/r3d_18 or transformers/videomae"
            )
        if frames < 2:
            raise RecipeError(f"arrow_of_time: frames = {frames} have no direction; take 2 or more")
        self.name, self.frames, self.crop = encoder, frames, Crop.of(VIEWS, views)
        self.head = nn.Linear(network.dim, 1)

    def chance(self, rows: int) -> Chance:
        """Two directions, one of them right."""
        return Chance(math.log(2), {"accuracy": 0.5, "ranking": 0.5})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`video` (B, T, 3, H, W) -> `clips` (B, 2, f, 3, h, w), forward first, `start` (B,) and `valid` bool (B,)."""
        video = batch["video"]
        if self.frames > video.shape[1]:
            raise RecipeError(
                f"arrow_of_time: frames = {self.frames}, and a row has {video.shape[1]}: raise data.video.frames, or "
                "lower frames"
            )
        start, valid = draw_start(video, self.frames, draws)
        places = start[:, None] + torch.arange(self.frames, device=video.device)
        clip = self.crop(frames_at(video, places), draws)
        both = torch.stack([clip, clip.flip(1)], dim=1)
        return {"clips": both, "start": start, "valid": valid, "valid_rows": valid.sum()}

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, 2) of running forward."""
        return {"logits": self.head(encode_views(self.encoder(self.name), inputs["clips"]))[..., 0]}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Binary cross-entropy and its accuracy over the rows that count; `valid`, their share.

        `ranking` is how often the clip looks more like running forward than its reverse does (a tie counts half).
        """
        logits, valid, count = outputs["logits"], inputs["valid"], inputs["valid_rows"]
        target = upload([1.0, 0.0], logits.device, logits.dtype).expand_as(logits)
        surprise = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        right = ((logits > 0) == (target > 0)).to(logits.dtype).mean(1)
        ahead = (logits[:, 0] - logits[:, 1]).detach().sign() / 2 + 0.5
        return {
            "loss": mean_over(surprise, valid, count),
            "accuracy": mean_over(right, valid, count),
            "ranking": mean_over(ahead, valid, count),
            "valid": valid.to(logits.dtype).mean(),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both directions, and the probability that the network gives to each of being the right one."""
        clips, chances, valid = (
            as_floats(inputs["clips"]),
            outputs["logits"].sigmoid().tolist(),
            inputs["valid"].tolist(),
        )
        return [
            Panel("forward", list(clips[:, 0])),
            Panel("backward", list(clips[:, 1])),
            Panel(
                "prediction",
                [f"forward: {own:.0%} / {other:.0%}" for own, other in chances],
                [own > other if counts else None for (own, other), counts in zip(chances, valid, strict=True)],
            ),
        ]
