"""Sound speed: how fast is this sound played?

A sound is played at several speeds, pitch and tempo together as of a record, and the network tells them apart: to do so
it has to know how high and how fast such a sound is. It is `playback_speed` (Wang, Jiao & Liu 2020, arXiv 2008.05861)
for sounds, and as in rotation a row is seen under every transformation.

Known traps. Resampling leaves a band limit where the filter cuts, which tells the speed without any listening: here one
filter cuts all of them at the same frequency, the middle speed as well, and white noise says nothing of its speed. Its
loudness would, so that every window has the same power. All windows of a row start at the same moment and are equally
long, and none reaches beyond the end of the sound: silence there would be longer at a higher speed. Rows too short for
that, or silent, are left out (`valid` is the share that is not). What is left in the data: hum of the mains, and what
a codec cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

import torch
from annotated_types import Ge, Le

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives.transformation._played import EDGE, Played, draw_start
from mmssl.ops.augment_audio import reach, resample
from mmssl.ops.draws import Draws
from mmssl.ranges import Part

Speed = Annotated[float, Ge(0.25), Le(4)]


class SoundSpeed(Played):
    """Classify the speed.

    Args:
        encoders: holds the audio encoder.
        encoder: its name.
        speeds: that are told apart, rounded to fractions of 20.
        window: share of a sound that is heard at the highest speed.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "audio",
        speeds: tuple[Speed, ...] = (0.7, 0.85, 1.0, 1.2, 1.4),
        window: Part = 0.5,
    ) -> None:
        fractions = [Fraction(speed).limit_denominator(20) for speed in speeds]
        super().__init__(encoders, encoder, "speed", [f"{float(speed):g}" for speed in fractions])
        self.speeds, self.window = fractions, window
        if len(set(self.speeds)) < max(2, len(speeds)):
            raise RecipeError(f"sound_speed: speeds = {list(speeds)} should be two or more that differ by a twentieth")
        self.cutoff = EDGE * min(1.0, float(min(self.speeds)))

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`audio` (B, S) -> `audio` (B, K, s), window k at speed k, `scored` (B,): neither short nor silent."""
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
        start, scored = draw_start(batch, span, draws)
        heard = audio.gather(1, start[:, None] + torch.arange(span, device=audio.device))
        views = []
        for speed in self.speeds:
            skipped = around - reach(speed, self.cutoff)  # so that all begin at the same sample
            views.append(resample(heard[:, skipped:], speed, self.cutoff)[:, :size])
        return self.inputs_of(torch.stack(views, dim=1), scored)
