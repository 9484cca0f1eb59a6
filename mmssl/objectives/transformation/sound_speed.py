"""Sound speed: how fast is this sound played?

A sound is played at several speeds, pitch and tempo together as of a record, and the network tells them apart: to do so
it has to know how high and how fast such a sound is. It is `playback_speed` (Wang, Jiao & Liu 2020, arXiv 2008.05861)
for sounds, and as in rotation a row is seen under every transformation.

Known traps. Resampling leaves a band limit where the filter cuts, which tells the speed without any listening: here one
filter cuts all of them at the same frequency, the middle speed as well, and white noise says nothing of its speed. Its
loudness would, so that every window has the same power. All windows of a row start at the same moment and are equally
long, and none reaches beyond the end of the sound: silence there would be longer at a higher speed. Rows too short for
that are left out (`valid` is the share that is not). What is left in the data: hum of the mains, and what a codec cut
off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.augment_audio import reach, resample
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over
from mmssl.ranges import Part

EDGE = 0.85  # of the lowest speed, where the filter cuts
LEVEL = 0.1  # root mean square of every window
Speed = Annotated[float, Ge(0.25), Le(4)]


class SoundSpeed(Objective):
    """Classify the speed.

    Args:
        encoders: holds the audio encoder.
        encoder: its name.
        speeds: that are told apart, rounded to fractions of 20.
        window: share of a sound that is heard at the highest speed.
    """

    needs = ("audio",)
    divisors = ("scored_rows",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "audio",
        speeds: tuple[Speed, ...] = (0.7, 0.85, 1.0, 1.2, 1.4),
        window: Part = 0.5,
    ) -> None:
        super().__init__(encoders)
        self.name, self.window = encoder, window
        self.speeds = [Fraction(speed).limit_denominator(20) for speed in speeds]
        if len(set(self.speeds)) < max(2, len(speeds)):
            raise RecipeError(f"sound_speed: speeds = {list(speeds)} should be two or more that differ by a twentieth")
        self.cutoff = EDGE * min(1.0, float(min(self.speeds)))
        self.head = nn.Linear(self.encoder(encoder, "audio").dim, len(self.speeds))

    def chance(self, rows: int) -> Chance:
        """Any speed."""
        return Chance(math.log(len(self.speeds)), {"accuracy": 1 / len(self.speeds)})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`audio` (B, S) -> `audio` (B, K, s), window k at speed k, and `scored` (B,), False where a sound is short."""
        audio = batch["audio"].to(torch.get_default_dtype())
        most = max(self.speeds)
        around = max(reach(speed, self.cutoff) for speed in self.speeds)
        length = int(self.window * audio.shape[1])
        size, span = int(length / most), length + 2 * around + most.numerator
        if span > audio.shape[1] or size < 2:
            raise RecipeError(
                f"sound_speed: a window of {length} samples and {2 * around} around it do not fit into sounds of "
                f"{audio.shape[1]}; raise data.audio.seconds or lower window"
            )
        whole = torch.full_like(audio[:, 0], audio.shape[1]).long()
        lengths = batch["audio_mask"].sum(1) if "audio_mask" in batch else whole
        free = (lengths - span).clamp(min=0)
        start = (draws.uniform() * (free + 1)).long().minimum(free)
        heard = audio.gather(1, start[:, None] + torch.arange(span, device=audio.device))
        views = []
        for speed in self.speeds:
            skipped = around - reach(speed, self.cutoff)  # so that all begin at the same sample
            views.append(resample(heard[:, skipped:], speed, self.cutoff)[:, :size])
        windows = torch.stack(views, dim=1)
        power = windows.square().mean(2, keepdim=True).sqrt()
        scored = lengths >= span
        return {
            "audio": windows * (LEVEL / power.clamp(min=1e-6)),
            "scored": scored,
            "scored_rows": scored.sum(),
        }

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, K windows, K speeds)."""
        pooled = self.encoder(self.name)(inputs["audio"].flatten(0, 1)).pooled
        return {"logits": self.head(pooled).unflatten(0, (-1, len(self.speeds)))}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and accuracy over all windows of the rows that are long enough; `valid`, their share."""
        logits, scored, count = outputs["logits"], inputs["scored"][:, None], inputs["scored_rows"]
        number = logits.shape[1]
        speed = torch.arange(number, device=logits.device).expand(len(logits), -1)
        errors = F.cross_entropy(logits.mT, speed, reduction="none")
        right = (logits.argmax(2) == speed).to(logits.dtype)
        return {
            "loss": mean_over(errors, scored, count * number),
            "accuracy": mean_over(right, scored, count * number),
            "valid": scored.to(logits.dtype).mean(),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The sound at each speed, and what the network takes each for."""
        scale = cast(AudioEncoder, self.encoder(self.name)).scale(inputs["audio"][0, 0])
        names = [f"{float(speed):g}" for speed in self.speeds]
        sounds = [Panel(f"speed {n}", list(inputs["audio"][:, k]), scale=scale) for k, n in enumerate(names)]
        guesses = [
            "  ".join(f"{'✓' if k == right else '✗'} {names[k]}" for right, k in enumerate(row))
            for row in outputs["logits"].argmax(-1).tolist()
        ]
        return [*sounds, Panel("prediction", guesses)]
