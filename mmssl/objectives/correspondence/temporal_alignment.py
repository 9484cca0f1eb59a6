"""Temporal alignment: does this sound belong to this moment of the video, or to another one of the same clip?

Owens & Efros 2018, "Audio-Visual Scene Analysis with Self-Supervised Multisensory Features", arXiv 1804.03641. A window
of the video is seen once, with the sound of the same moment and with that of another: one right and one wrong answer
from each clip. Encoders' tokens meet early, moment by moment, and a small temporal network gives one logit.

The pairs of starts (i, j) are those of the published code: all that lie far enough apart, in both orders. So the sound
of the right and of the wrong answer starts anywhere with the same probability, and where it was cut says nothing.

Known traps. The loss stays at chance for long, and the share of clips whose right sound scores higher (`ranking`) moves
before the accuracy does. Both sounds of a clip belong into one batch: in two, batch norm's statistics give them away.
Recipes decode sound and picture of the same length, `audio.seconds = video.frames / video.fps`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop
from mmssl.objectives.base import Chance, Objective, Pair, Panel
from mmssl.ops.clock import samples_per_frame
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.transfers import upload
from mmssl.ranges import Seconds, Width

SOUNDS = 2
VIEWS = {"flip": 0.5}


class TemporalAlignment(Objective):
    """Tell a video's own sound from that of another moment.

    Args:
        encoders: holds the video and the audio encoder, which has a `rate` in samples a second.
        video: name of the video encoder.
        audio: name of the audio encoder.
        window: length of what is seen and heard, in seconds, rounded to whole frames.
        min_shift: smallest distance between the starts of the right and the wrong sound, in seconds.
        width: of the fusion network.
        views: how frames are cropped, alike in the whole window; see `Crop`.
    """

    needs = ("video", "audio")

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        video: str = "video",
        audio: str = "audio",
        window: Seconds = 4.2,
        min_shift: Seconds = 2.17,
        width: Width = 128,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders)
        for name, modality in ((video, "video"), (audio, "audio")):
            if self.encoder(name).modality != modality:
                raise RecipeError(
                    f"temporal_alignment: {modality} = '{name}' is an encoder that reads {self.encoder(name).modality}"
                )
        self.video, self.audio, self.window, self.min_shift = video, audio, window, min_shift
        self.crop = Crop.of(VIEWS, views)
        self.rate = float(cast(AudioEncoder, self.encoder(audio)).rate)
        self.fusion = Fusion(self.encoder(video).dim, self.encoder(audio).dim, width)

    def chance(self, rows: int) -> Chance:
        """Two sounds, one of them right."""
        return Chance(math.log(2), {"accuracy": 0.5, "ranking": 0.5})

    def _frames(self, frames: int, samples: int) -> tuple[int, int, int]:
        """Samples a frame, frames of the window, frames of the smallest shift."""
        per_frame = samples_per_frame("temporal_alignment", frames, samples)
        fps = self.rate * frames / samples
        window, shift = max(1, round(self.window * fps)), math.ceil(self.min_shift * fps - 1e-6)
        if window + shift > frames:
            raise RecipeError(
                f"temporal_alignment: window {self.window:g} s and min_shift {self.min_shift:g} s are {window + shift} "
                f"frames, the clips have {frames} ({frames / fps:g} s): take longer clips or lower either"
            )
        return per_frame, window, shift

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`video` (B, T, 3, H, W), `audio` (B, S) -> `video` (B, n, 3, h, h), `audio` (B, 2, s), right sound first.

        Also `start` (B, 2), the frame at which each sound starts (the video starts with the first), and `audio_mask`
        (B, 2, s) where the batch has one.
        """
        video, audio = batch["video"], batch["audio"]
        samples, window, shift = self._frames(video.shape[1], audio.shape[1])
        place = torch.arange(video.shape[1] - window + 1)
        pairs = upload(((place[:, None] - place).abs() >= shift).nonzero(), video.device)
        start = pairs[draws.integers(len(pairs))]

        row = torch.arange(len(video), device=video.device)[:, None]
        clip = video[row, start[:, :1] + torch.arange(window, device=video.device)]
        heard = start[..., None] * samples + torch.arange(window * samples, device=video.device)
        inputs = {
            "video": self.crop(clip, draws),
            "audio": audio[row[..., None], heard],
            "start": start,
        }
        if "audio_mask" in batch:
            inputs["audio_mask"] = batch["audio_mask"][row[..., None], heard]
        return inputs

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, 2); the video is encoded once, both sounds in one pass."""
        seen = self.encoder(self.video)(inputs["video"])
        mask = inputs["audio_mask"].flatten(0, 1) if "audio_mask" in inputs else None
        heard = self.encoder(self.audio)(inputs["audio"].flatten(0, 1), mask)
        return {"logits": self._fuse(seen, heard, SOUNDS)}

    def match(self, seen: Features, heard: Features) -> Tensor:
        """Logits (B,) that the sound of a whole clip belongs to the video."""
        return self._fuse(seen, heard, 1)[:, 0]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Video and sound, by the fusion network alone: they have no space in common."""
        return (Pair(self.video, self.audio, match=self.match),)

    def _fuse(self, seen: Features, heard: Features, sounds: int) -> Tensor:
        """Logits (B, sounds)."""
        moments = seen.tokens.unflatten(1, seen.grid).mean((2, 3))
        over_time = heard.tokens.unflatten(1, heard.grid).mean(1)
        return self.fusion(moments, over_time.unflatten(0, (-1, sounds)))

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Binary cross-entropy, its accuracy, and how often the right sound scores higher (a tie counts half)."""
        logits = outputs["logits"]
        target = upload([1.0, 0.0], logits.device, logits.dtype).expand_as(logits)
        right, wrong = logits.unbind(1)
        return {
            "loss": F.binary_cross_entropy_with_logits(logits, target),
            "accuracy": ((logits > 0) == (target > 0)).to(logits.dtype).mean(),
            "ranking": ((right > wrong).to(logits.dtype) + (right == wrong).to(logits.dtype) / 2).mean(),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The window, its own sound, the other one, and the probability that the network gives to each."""
        chances, audio = outputs["logits"].sigmoid().tolist(), inputs["audio"]
        scale = self.encoder(self.audio).scale(audio[0, 0])
        return [
            Panel("video", list(as_floats(inputs["video"]))),
            Panel("its sound", list(audio[:, 0]), scale=scale),
            Panel("another moment's", list(audio[:, 1]), scale=scale),
            Panel(
                "prediction",
                [f"belongs: {own:.0%} / {other:.0%}" for own, other in chances],
                [own > other for own, other in chances],
            ),
        ]


class Fusion(nn.Module):
    """Tokens of both over time -> one logit for each sound.

    Args:
        video_dim: width of the video's tokens.
        audio_dim: width of the sound's tokens.
        width: of the layers.
    """

    def __init__(self, video_dim: int, audio_dim: int, width: int) -> None:
        super().__init__()
        self.norm_video, self.norm_audio = nn.LayerNorm(video_dim), nn.LayerNorm(audio_dim)
        self.layers = nn.Sequential(
            nn.Conv1d(video_dim + audio_dim, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, 1)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        """(B, t, Dv) and (B, S sounds, f, Da) -> (B, S)."""
        video, audio, number = self.norm_video(video), self.norm_audio(audio), audio.shape[1]
        sounds = F.adaptive_avg_pool1d(audio.flatten(0, 1).mT, video.shape[1]).mT.unflatten(0, (-1, number))
        both = torch.cat([video[:, None].expand(-1, number, -1, -1), sounds], dim=-1)
        over_time = self.layers(both.flatten(0, 1).mT).mean(-1)
        return self.head(over_time).view(-1, number)
