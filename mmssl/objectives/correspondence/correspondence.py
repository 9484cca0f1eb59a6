"""Correspondence: does this picture, or this clip, belong to this sound?

Form `fusion`: Arandjelovic & Zisserman 2017, "Look, Listen and Learn", arXiv 1705.08168 (L3-Net): both vectors go into
a small network with two answers. Form `distance`: Arandjelovic & Zisserman 2018, "Objects that Sound", arXiv 1712.06651
(AVE-Net): the two are unit vectors of one space, and all that the answer sees is how far apart they are, so that the
space serves retrieval. A row is seen once, with its own sound and with that of another row: one right and one wrong
answer each. In the papers a row is one frame with the second of sound around it: `frame` and `window`.

Known traps. The published training code of the embedding that is used most (openl3) cut the right sound at a place of
its own, so that it need not overlap what is seen. Here what is seen and both sounds are of one moment, each of its own
clip: neither answer is told by where in its clip a sound was cut. Both are also cut to the valid length that the two
have in common, or their lengths would tell. Another row is drawn from all with another sound and another picture, and
never by a label; a row for which there is none counts for nothing. Form `distance` stays at chance longer than
`fusion` before it learns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError
from mmssl.modules.heads import mlp
from mmssl.modules.views import Crop
from mmssl.objectives.base import Chance, Objective, Pair, Panel
from mmssl.ops.clock import samples_per_frame
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.gather import gather
from mmssl.ops.losses import mean_over
from mmssl.ops.pairs import draw_negatives, fingerprint
from mmssl.ranges import Seconds, Width

SOUNDS = 2
VIEWS = {"flip": 0.5}


class Correspondence(Objective):
    """Tell a picture's or clip's own sound from that of another row.

    Args:
        encoders: holds both encoders.
        visual: name of the encoder of pictures or clips.
        audio: name of the audio encoder.
        form: `fusion` or `distance`.
        frame: whether an image encoder sees one frame of the row's video, the middle one of the window, and no image.
        window: length of what is seen and heard of a clip, in seconds, rounded to whole frames; None for all of it.
        width: of the fusion's hidden layer, or of the shared space.
        views: how pictures are cropped, alike in the whole window; see `Crop`.
    """

    divisors = ("valid_pairs",)
    meets = "transform"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        visual: str = "image",
        audio: str = "audio",
        form: Literal["fusion", "distance"] = "fusion",
        frame: bool = False,
        window: Seconds | None = None,
        width: Width = 128,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders)
        seen, heard = self.encoder(visual, "image", "video"), self.encoder(audio, "audio")
        if frame and seen.modality == "video":
            raise RecipeError(f"correspondence: '{visual}' sees whole clips; frame is for an encoder of images")
        self.source = "video" if frame else seen.modality
        if window is not None and self.source == "image":
            raise RecipeError(
                "correspondence: window is a part of a clip, and an image has no time; set frame=true for one frame of "
                "the row's video, or leave window out"
            )
        self.needs = (self.source, "audio")
        self.visual, self.audio, self.form, self.frame, self.window = visual, audio, form, frame, window
        self.crop = Crop.of(VIEWS, views)
        self.rate = float(cast(AudioEncoder, heard).rate)
        self.head: nn.Module
        if form == "fusion":
            self.head = nn.Sequential(nn.Linear(seen.dim + heard.dim, width), nn.ReLU(), nn.Linear(width, 2))
        else:
            self.project_visual = mlp(seen.dim, width, width, norm=False, last_bias=True)
            self.project_audio = mlp(heard.dim, width, width, norm=False, last_bias=True)
            # The nearer, the likelier: with the other sign, training would begin with pushing the right ones apart.
            last = self.head = nn.Linear(1, 2)
            nn.init.constant_(last.weight[0], 1.0)
            nn.init.constant_(last.weight[1], -1.0)

    def chance(self, rows: int) -> Chance:
        """A coin."""
        return Chance(math.log(2), {"accuracy": 0.5, "ranking": 0.5})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`visual` (B, ...) as its encoder reads it, `audio` (B, 2, s), the right sound first.

        Also `audio_mask` (B, 2, s) where the batch has one, `valid` bool (B,), whether there was another row, and how
        many there are of those; of clips `start` (B, 1), the frame at which what is seen and both sounds start.
        """
        seen, audio = batch[self.source], batch["audio"]
        # A clip is known by its middle frame.
        still = seen[:, seen.shape[1] // 2] if self.source == "video" else seen
        items = torch.stack([fingerprint(still), fingerprint(audio)], dim=1)

        def everyones(own: Tensor) -> Tensor:
            return gather(own) if draws.shares > 1 else own

        equal = (items[:, None] == everyones(items)).any(2)
        noise = draws.uniform(equal.shape[1])
        other, valid = draw_negatives(torch.zeros_like(noise), equal, noise)

        sounds = {"audio": torch.stack([audio, everyones(audio)[other]], dim=1)}
        if "audio_mask" in batch:
            mask = batch["audio_mask"] & everyones(batch["audio_mask"].to(torch.uint8))[other].bool()
            sounds = {"audio": sounds["audio"] * mask[:, None], "audio_mask": mask[:, None].expand(-1, SOUNDS, -1)}
        if self.source == "video":
            seen, sounds = self._windows(seen, sounds, draws)
        visual = self.crop(seen, draws, batch.get(f"{self.source}_aspect"))
        return {"visual": visual, **sounds, "valid": valid, "valid_pairs": valid.sum()}

    def _windows(self, video: Tensor, sounds: Batch, draws: Draws) -> tuple[Tensor, Batch]:
        """The same moment of the clip and of both sounds; of the clip one frame where that is all that is seen.

        With the sounds, where they start.
        """
        frames, samples = video.shape[1], sounds["audio"].shape[2]
        per_frame = samples_per_frame("correspondence", frames, samples)
        fps = self.rate / per_frame
        length = frames if self.window is None else max(1, round(self.window * fps))
        if length > frames:
            raise RecipeError(
                f"correspondence: window {self.window:g} s is {length} frames, the clips have {frames} "
                f"({frames / fps:g} s): take longer clips or a shorter window"
            )
        row, start = torch.arange(len(video), device=video.device)[:, None], draws.integers(frames - length + 1, 1)
        heard = start * per_frame + torch.arange(length * per_frame, device=video.device)
        seen = start + (length // 2 if self.frame else torch.arange(length, device=video.device))
        cut = {key: sound.gather(2, heard[:, None].expand(-1, SOUNDS, -1)) for key, sound in sounds.items()}
        clip = video[row, seen]
        return clip[:, 0] if self.frame else clip, {**cut, "start": start}

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, 2 sounds, 2): no, it belongs to another one, and yes; both sounds are encoded in one pass."""
        seen = self.encoder(self.visual)(inputs["visual"])
        mask = inputs["audio_mask"].flatten(0, 1) if "audio_mask" in inputs else None
        heard = self.encoder(self.audio)(inputs["audio"].flatten(0, 1), mask)
        return {"logits": self._answers(seen, heard, SOUNDS)}

    def _answers(self, seen: Features, heard: Features, sounds: int) -> Tensor:
        """Logits (B, sounds, 2)."""
        if self.form == "fusion":
            both = seen.pooled[:, None].expand(-1, sounds, -1), heard.pooled.unflatten(0, (-1, sounds))
            compared = torch.cat(both, dim=2)
        else:
            a, b = self.embed("visual", seen)[:, None], self.embed("audio", heard).unflatten(0, (-1, sounds))
            compared = (a - b).norm(dim=2, keepdim=True)
        answers: Tensor = self.head(compared)
        return answers

    def embed(self, side: str, features: Features) -> Tensor:
        """Unit vectors (B, width) in the shared space of form `distance`, of side `visual` or `audio`."""
        return F.normalize(self.get_submodule(f"project_{side}")(features.pooled), dim=-1)

    def match(self, seen: Features, heard: Features) -> Tensor:
        """Logits (B,) that the sound belongs to the picture."""
        no, yes = self._answers(seen, heard, 1)[:, 0].unbind(1)
        return yes - no

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Picture and sound: by the cosine in the space of form `distance`, else by the fusion network."""
        if self.form == "distance":
            return (Pair(self.visual, self.audio, embed=(partial(self.embed, "visual"), partial(self.embed, "audio"))),)
        return (Pair(self.visual, self.audio, match=self.match),)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy, its accuracy, and how often the right sound scores higher (a tie counts half).

        Also `valid`, the share of rows that another one was found for.
        """
        logits, valid, count = outputs["logits"], inputs["valid"][:, None], inputs["valid_pairs"]
        right, wrong = (logits[..., 1] - logits[..., 0]).unbind(1)
        surprise = torch.stack([F.softplus(-right), F.softplus(wrong)], dim=1)
        hits = torch.stack([right > 0, wrong <= 0], dim=1).to(logits.dtype)
        higher = ((right > wrong).to(logits.dtype) + (right == wrong).to(logits.dtype) / 2)[:, None]
        return {
            "loss": mean_over(surprise, valid, count) / SOUNDS,
            "accuracy": mean_over(hits, valid, count) / SOUNDS,
            "ranking": mean_over(higher, valid, count),
            "valid": valid.to(logits.dtype).mean(),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What is seen, its own sound, another row's, and the probability that the network gives to each."""
        chances, audio = outputs["logits"].softmax(2)[..., 1].tolist(), inputs["audio"]
        scale = self.encoder(self.audio).scale(audio[0, 0])
        valid = inputs["valid"].tolist()
        return [
            Panel(self.visual, list(as_floats(inputs["visual"]))),
            Panel("its sound", list(audio[:, 0]), scale=scale),
            Panel("another row's", list(audio[:, 1]), scale=scale),
            Panel(
                "prediction",
                [f"belongs: {own:.0%} / {other:.0%}" for own, other in chances],
                [own > other if counts else None for (own, other), counts in zip(chances, valid, strict=True)],
            ),
        ]
