"""Pitch shift: by how many semitones has this sound been moved?

A sound is heard higher and lower at one tempo, and the network tells by how much: to do so it has to know how high such
a sound is. Next to `sound_speed`, which moves pitch and tempo together, nothing is left of it but the pitch; as in
rotation a row is heard under every shift.

The sound is cut into grains of a tenth of a second, each is read at the speed of the shift, and they are put together
again with crossfades of constant power. No two grains share a sample: the source goes on from grain to grain by the
same step under every shift, as long as the longest grain. So the tempo is higher than that of the source, by about 1.6,
and equally for all.

Known traps. The usual ways leave their trace: a phase vocoder (`torchaudio.functional.pitch_shift`) makes noise of
another texture the further it shifts, and none where the shift is 0; overlapping grains repeat what was heard a moment
before, at a distance that tells the shift. Grains that share nothing make of white noise white noise, whatever the
shift. The phase of a tone at a crossfade would tell it, too: grains begin late by a random time, up to `jitter`. All
else is as in `sound_speed`: one filter that cuts all at the same frequency, equal power, one moment at which all begin,
equal length, and rows too short for it, or silent, are left out (`valid` is the share that is not). What is left in
the data: hum of the mains, and what a codec cut off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, cast

import torch
from annotated_types import Ge, Le
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives.transformation._played import EDGE, Played, draw_start
from mmssl.ops.augment_audio import reach, resample
from mmssl.ops.draws import Draws
from mmssl.ranges import Part, Seconds

CLOSEST = 40  # largest denominator of a speed: semitones to within three cents
Semitones = Annotated[int, Ge(-12), Le(12)]


class PitchShift(Played):
    """Classify the shift.

    Args:
        encoders: holds the audio encoder.
        encoder: its name.
        shifts: that are told apart, in semitones.
        window: share of a sound that is heard.
        grain: length of a grain in seconds, without its crossfade.
        crossfade: in seconds.
        jitter: largest delay of a grain's beginning in the source, in seconds; a period of the lowest tone or more.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "audio",
        shifts: tuple[Semitones, ...] = (-4, -2, 0, 2, 4),
        window: Part = 0.75,
        grain: Seconds = 0.1,
        crossfade: Seconds = 0.01,
        jitter: Seconds = 0.01,
    ) -> None:
        super().__init__(encoders, encoder, "semitones", [f"{shift:+d}" for shift in shifts])
        if len(set(shifts)) < max(2, len(shifts)):
            raise RecipeError(f"pitch_shift: shifts = {list(shifts)} should be two or more that differ")
        self.speeds = [Fraction(2 ** (shift / 12)).limit_denominator(CLOSEST) for shift in shifts]
        self.window = window
        rate = cast(AudioEncoder, self.encoder(encoder)).rate
        self.grain, self.crossfade, self.jitter = (max(1, round(x * rate)) for x in (grain, crossfade, jitter))
        if crossfade > grain:
            raise RecipeError(f"pitch_shift: crossfade = {crossfade:g} should be no longer than grain = {grain:g}")
        self.cutoff = EDGE * min(1.0, float(min(self.speeds)))
        self.around = max(reach(speed, self.cutoff) for speed in self.speeds)
        longest = math.ceil((self.grain + self.crossfade) * max(self.speeds))
        whole = max(speed.numerator for speed in self.speeds)  # `resample` reads so many at a time
        self.step = self.jitter + longest + whole + 2 * self.around

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`audio` (B, S) -> `audio` (B, K, s), window k under shift k; `scored` (B,): neither short nor silent."""
        audio = batch["audio"].to(torch.get_default_dtype())
        grains = int(self.window * audio.shape[1]) // self.step
        if grains < 2:
            raise RecipeError(
                f"pitch_shift: {self.window:g} of a sound of {audio.shape[1]} samples holds {grains} grains of "
                f"{self.step}, and two are needed; raise data.audio.seconds or window, or lower grain"
            )
        start, scored = draw_start(batch, grains * self.step, draws)
        late = (draws.uniform(grains) * (self.jitter + 1)).long()
        first = start[:, None] + torch.arange(grains, device=audio.device) * self.step + late
        place = first[:, :, None] + torch.arange(self.step - self.jitter, device=audio.device)
        heard = audio.gather(1, place.flatten(1).clamp(max=audio.shape[1] - 1)).view(-1, place.shape[2])
        views = []
        for speed in self.speeds:
            skipped = self.around - reach(speed, self.cutoff)  # so that all begin at the same sample
            read = resample(heard[:, skipped:], speed, self.cutoff)[:, : self.grain + self.crossfade]
            views.append(self._joined(read.unflatten(0, (-1, grains))))
        return self.inputs_of(torch.stack(views, dim=1), scored)

    def _joined(self, grains: Tensor) -> Tensor:
        """Grains (B, G, grain + crossfade) -> (B, (G - 1) · grain): from the second on, over the end of the last."""
        angle = torch.arange(self.crossfade, device=grains.device, dtype=grains.dtype) + 0.5
        angle = angle / self.crossfade * (math.pi / 2)
        body, tail = grains[:, 1:, : self.grain].clone(), grains[:, :-1, self.grain :]
        body[:, :, : self.crossfade] = body[:, :, : self.crossfade] * angle.sin() + tail * angle.cos()
        return body.flatten(1)
