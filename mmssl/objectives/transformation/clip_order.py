"""Clip order: in which order were the clips of a video shuffled, or is one of them out of place?

Xu, Xiao, Zhao, Shao, Xie & Zhuang 2019, "Self-Supervised Spatiotemporal Learning via Video Clip Order Prediction", CVPR
(form `order`): a few clips of a video, some frames apart, in one of their n! orders; all go through the encoder in one
pass, and a head over all pairs of them says which order it is. Misra, Zitnick & Hebert 2016, "Shuffle and Learn",
arXiv 1603.08561 (form `verification`): of five moments a < b < c < d < e the network sees (b, c, d), and (b, a, d) or
(b, e, d), and says of each whether it is in order; half of the rows run backward. Published with single frames,
`frames: 1`. Their moments are 15 to 60 frames apart where there is much motion; here they are equally far apart, the
head is that of the pairs, and each row gives one right and one wrong answer where they have three wrong ones to a
right one.

Known traps. Clips without a gap are matched by their borders. The ends of a right and of a wrong answer are the same
clips, so that they say nothing. Frames of a clip are cropped alike and clips each on its own: a crop a frame (what the
released code of `order` does with a torchvision of today) destroys the motion, one for all lets the network measure the
background's drift. A video that is too short ends in a still, which would be known for the last clip: nothing is taken
from it, and a row without room before it does not count (`valid` is the share that does). What is left in the data:
fades, titles, a clock in the picture, and what a codec does to the first frames after each key frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations, permutations
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop, encode_views
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.clips import draw_start, frames_at
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over
from mmssl.ops.transfers import upload
from mmssl.ranges import BelowOne, Distance, Positive, Width

MOST = 5  # clips: 120 orders
A, B, C, D, E = range(5)  # moments of `verification`
VIEWS: dict[str, Any] = {}


class ClipOrder(Objective):
    """Classify the order of shuffled clips, or tell clips in order from clips out of order.

    Args:
        encoders: holds the video encoder.
        encoder: its name.
        form: `order`, or `verification`.
        clips: n, of which the n! orders are told apart; from 2 to 5. `verification` has 3.
        frames: of a clip.
        gap: frames between one clip and the next.
        width: of what the head takes from each pair of clips.
        dropout: of that.
        views: how clips are cropped, each on its own and all frames of one alike; see `Crop`.
    """

    needs = ("video",)
    divisors = ("valid_rows",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "video",
        form: Literal["order", "verification"] = "order",
        clips: Positive = 3,
        frames: Positive = 16,
        gap: Distance = 8,
        width: Width = 512,
        dropout: BelowOne = 0.5,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders)
        if not 2 <= clips <= MOST:
            raise RecipeError(f"clip_order: clips = {clips} should be from 2 to {MOST}: n clips have n! orders")
        if form == "verification" and clips != 3:
            raise RecipeError(f"clip_order: verification shows 3 clips, not {clips}; leave clips out")
        self.name, self.form, self.clips, self.frames, self.gap = encoder, form, clips, frames, gap
        self.crop = Crop.of(VIEWS, views)
        self.orders: Tensor
        self.register_buffer("orders", torch.tensor(list(permutations(range(clips)))))
        answers = len(self.orders) if form == "order" else 1
        self.head = PairHead(self.encoder(encoder, "video").dim, clips, width, answers, dropout)

    def chance(self, rows: int) -> Chance:
        """The n! orders, equally often; or two answers, one of them right."""
        if self.form == "order":
            return Chance(math.log(len(self.orders)), {"accuracy": 1 / len(self.orders)})
        return Chance(math.log(2), {"accuracy": 0.5, "ranking": 0.5})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`video` (B, T, 3, H, W) -> `clips` (B, K, f, 3, h, w), `start` (B, K) and `valid` bool (B,).

        `order` has K = n and `order` (B,): place i holds the clip that came as number `orders[order, i]`. With
        `verification` the K = 4 clips are the first, the middle one in order, another in its place, and the last.
        """
        video = batch["video"]
        step = self.frames + self.gap
        moments = self.clips if self.form == "order" else 5
        span = moments * step - self.gap
        if max(span, 2) > video.shape[1]:
            raise RecipeError(
                f"clip_order: {moments} clips of {self.frames} frames with {self.gap} between them are {span} frames, "
                f"and a row has {video.shape[1]}: raise data.video.frames, or lower frames or gap"
            )
        first, valid = draw_start(video, span, draws)
        inputs = {"valid": valid, "valid_rows": valid.sum()}
        if self.form == "order":
            inputs["order"] = draws.integers(len(self.orders))
            moment = self.orders[inputs["order"]]
        else:
            right, wrong = upload([[B, C, D], [D, C, B]], video.device), upload([A, E], video.device)
            ends = right[draws.integers(2)]
            moment = torch.stack([ends[:, 0], ends[:, 1], wrong[draws.integers(2)], ends[:, 2]], dim=1)
        inputs["start"] = first[:, None] + step * moment
        places = inputs["start"][:, :, None] + torch.arange(self.frames, device=video.device)
        clips = [self.crop(clip, draws) for clip in frames_at(video, places).unbind(1)]
        return {"clips": torch.stack(clips, dim=1), **inputs}

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, n!), or (B, 2) of being in order, of the right answer and of the wrong one."""
        pooled = encode_views(self.encoder(self.name), inputs["clips"])
        if self.form == "order":
            return {"logits": self.head(pooled)}
        first, right, wrong, last = pooled.unbind(1)
        both = torch.stack([torch.stack([first, middle, last], dim=1) for middle in (right, wrong)], dim=1)
        return {"logits": self.head(both.flatten(0, 1)).view(-1, 2)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy over the rows that count; `valid`, their share.

        Of `verification` also `ranking`, how often the right answer scores higher (a tie counts half).
        """
        logits, valid, count = outputs["logits"], inputs["valid"], inputs["valid_rows"]
        shares = {"valid": valid.to(logits.dtype).mean()}
        if self.form == "order":
            surprise = F.cross_entropy(logits, inputs["order"], reduction="none")
            right = (logits.argmax(1) == inputs["order"]).to(logits.dtype)
        else:
            target = upload([1.0, 0.0], logits.device, logits.dtype).expand_as(logits)
            surprise = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
            right = ((logits > 0) == (target > 0)).to(logits.dtype).mean(1)
            ahead = (logits[:, 0] - logits[:, 1]).detach().sign() / 2 + 0.5
            shares["ranking"] = mean_over(ahead, valid, count)
        return {"loss": mean_over(surprise, valid, count), "accuracy": mean_over(right, valid, count), **shares}

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The clips as they are fed, which ones they were, and what the network says."""
        clips, logits = as_floats(inputs["clips"]), outputs["logits"]
        if self.form == "order":
            titles = [f"place {i + 1}" for i in range(self.clips)]
            names = [" ".join(str(i + 1) for i in order) for order in self.orders.tolist()]
            answers = [names[order] for order in inputs["order"].tolist()]
            said = [names[order] for order in logits.argmax(1).tolist()]
            right = [a == b for a, b in zip(answers, said, strict=True)]
            asked = [Panel("target", answers)]
        else:
            titles, asked = ["first", "in order", "out of order", "last"], []
            said = [f"in order: {own:.0%} / {other:.0%}" for own, other in logits.sigmoid().tolist()]
            right = (logits[:, 0] > logits[:, 1]).tolist()
        valid = inputs["valid"].tolist()
        said = [words if counts else "does not count" for words, counts in zip(said, valid, strict=True)]
        marks = [mark if counts else None for mark, counts in zip(right, valid, strict=True)]
        seen = [Panel(title, list(clips[:, i])) for i, title in enumerate(titles)]
        return [*seen, *asked, Panel("prediction", said, marks)]


class PairHead(nn.Module):
    """Vectors of clips -> logits, by way of all pairs of them (Xu et al. 2019; Lee et al. 2017, arXiv 1708.01246).

    Args:
        dim: of a clip's vector.
        clips: n.
        width: of what is made of a pair, by one layer for all of them.
        answers: number of logits.
        dropout: of what is made of all pairs.
    """

    def __init__(self, dim: int, clips: int, width: int, answers: int, dropout: float) -> None:
        super().__init__()
        self.pairs = list(combinations(range(clips), 2))
        self.pair = nn.Linear(2 * dim, width)
        self.dropout, self.answer = nn.Dropout(dropout), nn.Linear(len(self.pairs) * width, answers)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, n, D) -> (B, answers)."""
        pairs = torch.stack([torch.cat([clips[:, a], clips[:, b]], dim=1) for a, b in self.pairs], dim=1)
        return self.answer(self.dropout(self.pair(pairs).relu().flatten(1)))
