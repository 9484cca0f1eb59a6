"""Temporal alignment: does this sound belong to this moment of the video, or to another one of the same clip?

Form `match`: Owens & Efros 2018, "Audio-Visual Scene Analysis with Self-Supervised Multisensory Features", arXiv
1804.03641. A window of the video is seen once, with the sound of the same moment and with that of another: one right
and one wrong answer from each clip. Encoders' tokens meet early, moment by moment, and a small temporal network gives
one logit. The pairs of starts (i, j) are those of the published code: all that lie far enough apart, in both orders. So
the sound of the right and of the wrong answer starts anywhere with the same probability, and where it was cut says
nothing.

Form `shift`: Iashin et al. 2022, "Sparse in Space and Time" (SparseSync), arXiv 2210.07055: which one of the offsets
-2 to 2 s, 0.2 apart, is it? Positive is a sound that is early: it is of a later moment than the picture. The start is
drawn evenly among all that are possible for that offset, as published. No way to draw hides both places: their means
differ by the offset. Here each of the two bears half of it, and who knows one place alone is right P / (P - M) times as
often as chance at most, P being the number of starts and M the largest offset in frames: clips should be long. Jitter
moves the sound within its class, on the grid of samples. The paper's transformer alone stays at chance for long. So the
logits start as the correlation of both sides over lags, and it adds to that.

Form `contrast`: the segments of Iashin et al. 2024, "Synchformer", arXiv 2401.16423, compared within their clip alone,
where who or what is in it is the same for all: which of n sounds belongs to which of n windows? A softmax over cosines
in a common space, either way.

A second of a metronome sounds like the next. With `ambiguity` a wrong moment is not drawn where it is loud at the same
times as the right one (the correlation of their loudness is above that), and a row counts for nothing where there is no
other, or, of `shift` and `contrast`, where any of the answers sounds like the right one.

A curriculum is two recipes: the second one's encoders start from the first one's run, `pretrained: runs/slow`, with
more pictures a second, a smaller `min_shift`, or another form. The network that compares them starts anew. That of the
first paper goes from every fourth picture to all; `temporal_alignment_skirmish` and `temporal_alignment_skirmish_fine`
are an example.

Known traps. The loss stays at chance for long, and the share of clips whose right sound scores higher (`ranking`) moves
before the accuracy does. Of form `shift` the paper's authors train on talking faces first, and those of Synchformer
train the encoders by contrast before. Both sounds of a clip belong into one batch: in two, batch norm's
statistics give them away. Recipes decode sound and picture of the same length, `audio.seconds = video.frames /
video.fps`, and no longer than the clips are: where a short one ends, sound and picture both say so.
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
from mmssl.modules.alignment import HEADS, Fusion, OffsetNetwork
from mmssl.modules.views import Crop
from mmssl.objectives.base import Chance, Objective, Pair, Panel
from mmssl.ops.clips import frames_at
from mmssl.ops.clock import samples_per_frame
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over
from mmssl.ops.moments import draw_allowed, draw_apart, loudness, sound_alike
from mmssl.ops.transfers import upload
from mmssl.ranges import AboveZero, Positive, Ratio, Seconds, Weight, Width

VIEWS = {"flip": 0.5}
WINDOW = {"match": 4.2, "shift": 5.0, "contrast": 0.64}
MIN_SHIFT = {"match": 2.17, "shift": 0.0, "contrast": 0.64}
TEMPERATURE, COLDEST = 0.07, 0.01


class TemporalAlignment(Objective):
    """Tell a video's own sound from that of another moment.

    Args:
        encoders: holds the video and the audio encoder, which has a `rate` in samples a second.
        video: name of the video encoder.
        audio: name of the audio encoder.
        form: `match`, `shift` or `contrast`.
        window: length of what is seen and heard, in seconds, rounded to whole frames; 4.2, 5 and 0.64 where left out.
        min_shift: smallest distance between the starts of two moments, in seconds; 2.17 for match and 0.64 for contrast
            where left out.
        offsets: of shift, how many there are to either side of 0.
        step: of shift, from one offset to the next, in seconds.
        jitter: of shift, largest distance from the middle of a class, in seconds; no more than half a step.
        moments: of contrast, how many windows of a clip are compared.
        ambiguity: correlation of loudness above which two sounds cannot be told apart; None compares all.
        width: of the network that compares; of shift a multiple of 8; of contrast that of the common space.
        views: how frames are cropped, alike in all windows of a clip; see `Crop`.
    """

    needs = ("video", "audio")
    divisors = ("valid_rows",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        video: str = "video",
        audio: str = "audio",
        form: Literal["match", "shift", "contrast"] = "match",
        window: Seconds | None = None,
        min_shift: Seconds | None = None,
        offsets: Positive = 10,
        step: AboveZero = 0.2,
        jitter: Weight = 0.05,
        moments: Positive = 14,
        ambiguity: Ratio | None = None,
        width: Width = 128,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders)
        for name, modality in ((video, "video"), (audio, "audio")):
            if self.encoder(name).modality != modality:
                raise RecipeError(
                    f"temporal_alignment: {modality} = '{name}' is an encoder that reads {self.encoder(name).modality}"
                )
        if form == "shift" and min_shift is not None:
            raise RecipeError(
                "temporal_alignment: min_shift is of match and contrast; offsets and step say it of shift"
            )
        if form == "shift" and 2 * jitter > step:
            raise RecipeError(
                f"temporal_alignment: jitter = {jitter:g} s leads out of a class; take at most half of step = {step:g}"
            )
        if form == "shift" and width % HEADS:
            raise RecipeError(f"temporal_alignment: width = {width} of form shift should be a multiple of {HEADS}")
        if form == "contrast" and moments < 2:
            raise RecipeError("temporal_alignment: moments = 1 leaves nothing to compare; take 2 or more")
        self.video, self.audio, self.form = video, audio, form
        self.window = WINDOW[form] if window is None else window
        self.min_shift = MIN_SHIFT[form] if min_shift is None else min_shift
        self.offsets, self.step, self.jitter, self.moments = offsets, step, jitter, moments
        self.ambiguity = ambiguity
        self.crop = Crop.of(VIEWS, views)
        self.rate = float(cast(AudioEncoder, self.encoder(audio)).rate)
        dims = self.encoder(video).dim, self.encoder(audio).dim
        if form == "match":
            self.fusion = Fusion(*dims, width)
        elif form == "shift":
            self.network = OffsetNetwork(*dims, width, offsets, self.window / step)
        else:
            self.project_video, self.project_audio = (nn.Linear(dim, width, bias=False) for dim in dims)
            self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / TEMPERATURE)]))

    def chance(self, rows: int) -> Chance:
        """A coin; one of the offsets, and for what counts distances the middle one; one of the moments."""
        if self.form == "match":
            return Chance(math.log(2), {"accuracy": 0.5, "ranking": 0.5})
        if self.form == "contrast":
            return Chance(math.log(self.moments), {"accuracy": 1 / self.moments})
        classes = 2 * self.offsets + 1
        error = self.offsets * (self.offsets + 1) / classes
        scores = {"accuracy": 1 / classes, "accuracy_within_one": 3 / classes, "error_in_steps": error}
        return Chance(math.log(classes), scores)

    def _frames(self, frames: int, samples: int) -> tuple[int, int, int]:
        """Samples a frame, frames of the window, frames of the smallest shift."""
        per_frame = samples_per_frame("temporal_alignment", frames, samples)
        fps = self.rate * frames / samples
        window, gap = max(1, round(self.window * fps)), max(1, math.ceil(self.min_shift * fps - 1e-6))
        reach, what = gap, f"min_shift {self.min_shift:g} s"
        if self.form == "contrast":
            reach, what = (self.moments - 1) * gap, f"{self.moments - 1} times {what}"
        elif self.form == "shift":
            farthest = round(self.offsets * self.step * self.rate) + self._slack
            reach, what = -(-farthest // per_frame), f"the largest offset {farthest / self.rate:g} s"
        if window + reach > frames:
            raise RecipeError(
                f"temporal_alignment: window {self.window:g} s and {what} are {window + reach} frames, the clips have "
                f"{frames} ({frames / fps:g} s): take longer clips or lower either"
            )
        return per_frame, window, gap

    @property
    def _slack(self) -> int:
        """Largest jitter in samples."""
        return math.floor(self.jitter * self.rate + 1e-6)

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`video` (B, T, 3, H, W), `audio` (B, S) -> `video` (B, n, 3, h, h) and `audio` (B, 2, s), right sound first.

        Of form `shift` one sound, (B, s), and `offset` int64 (B,), the class; of `contrast` k windows of both, (B, k,
        n, ...) and (B, k, s), in the same order. Also `start`, the frame at which each window of pictures starts (B,
        1) or (B, k), or of `match` each sound (B, 2), the right one with the pictures; `audio_mask` where the batch has
        one; `valid` bool (B,), whether the row counts, and how many do.
        """
        video, audio = batch["video"], batch["audio"]
        frames, samples = video.shape[1], audio.shape[1]
        per_frame, window, gap = self._frames(frames, samples)
        inputs: Batch = {}
        if self.form == "match":
            start, inputs["valid"] = self._draw_pairs(audio, per_frame, window, gap, draws)
            seen, heard = start[:, :1], start * per_frame
        elif self.form == "shift":
            seen, heard, inputs["offset"], inputs["valid"] = self._draw_offsets(audio, per_frame, window, draws)
            start = seen
        else:
            start = seen = draw_apart(frames - window + 1, self.moments, gap, draws)
            heard = start * per_frame
            inputs["valid"] = self._told_apart(_cut(audio, heard, window * per_frame), per_frame).all(1)
        clips = frames_at(video, seen[..., None] + torch.arange(window, device=video.device)).flatten(1, 2)
        clips = self.crop(clips, draws)
        sounds: Batch = {
            key: _cut(batch[key], heard, window * per_frame) for key in ("audio", "audio_mask") if key in batch
        }
        if self.form == "shift":
            sounds = {key: value[:, 0] for key, value in sounds.items()}
        inputs |= {"video": clips.unflatten(1, (-1, window)) if self.form == "contrast" else clips, **sounds}
        return inputs | {"start": start, "valid_rows": inputs["valid"].sum()}

    def _draw_pairs(self, audio: Tensor, per_frame: int, window: int, gap: int, draws: Draws) -> tuple[Tensor, Tensor]:
        """Frames at which the right and the wrong sound start, (B, 2), and whether there is a wrong one."""
        places = audio.shape[1] // per_frame - window + 1
        place = torch.arange(places, device=audio.device)
        allowed = ((place[:, None] - place).abs() >= gap).expand(len(audio), -1, -1)
        if self.ambiguity is not None:
            windows = loudness(audio, per_frame).unfold(1, window, 1)
            allowed = allowed & ~sound_alike(windows, self.ambiguity)
        pair, valid = draw_allowed(allowed.flatten(1), draws)
        return torch.stack([pair // places, pair % places], dim=1), valid

    def _draw_offsets(
        self, audio: Tensor, per_frame: int, window: int, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frame of the picture (B, 1), sample of the sound (B, 1), class (B,), whether it is like no other (B,)."""
        middles = [round(k * self.step * self.rate) for k in range(-self.offsets, self.offsets + 1)]
        offset = draws.integers(len(middles))
        jitter = draws.integers(self._slack + 1, low=-self._slack)
        early = upload(middles, audio.device) + jitter[:, None]
        own = early.gather(1, offset[:, None])
        first = -(own.clamp(max=0) // per_frame)
        last = (audio.shape[1] - window * per_frame - own.clamp(min=0)) // per_frame
        seen = first + (draws.uniform(1) * (last - first + 1)).long().minimum(last - first)
        valid = torch.ones_like(offset, dtype=torch.bool)
        if self.ambiguity is not None:
            length, heard = window * per_frame, seen * per_frame + early
            inside = (heard >= 0) & (heard <= audio.shape[1] - length)
            others = _cut(audio, heard.clamp(0, audio.shape[1] - length), length)
            alike = sound_alike(loudness(others, per_frame), self.ambiguity) & inside[:, None]
            valid = alike[torch.arange(len(audio), device=audio.device), offset].sum(1) == 1
        return seen, seen * per_frame + own, offset, valid

    def _told_apart(self, sounds: Tensor, per_frame: int) -> Tensor:
        """Which of a row's sounds (B, n, s) are like no other, bool (B, n); all where that does not matter."""
        if self.ambiguity is None:
            return torch.ones(sounds.shape[:2], dtype=torch.bool, device=sounds.device)
        return sound_alike(loudness(sounds, per_frame), self.ambiguity).sum(2) == 1

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, 2 sounds) or (B, offsets), the video encoded once; of contrast unit vectors (B, k, width)."""
        video, audio, mask = inputs["video"], inputs["audio"], inputs.get("audio_mask")
        if self.form == "contrast":
            video = video.flatten(0, 1)
        if self.form != "shift":
            audio, mask = audio.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
        seen, heard = self.encoder(self.video)(video), self.encoder(self.audio)(audio, mask)
        if self.form == "contrast":
            sides = {"video": seen, "audio": heard}
            return {key: self.embed(key, side).unflatten(0, (-1, self.moments)) for key, side in sides.items()}
        return {"logits": self._compare(seen, heard)}

    def _compare(self, seen: Features, heard: Features) -> Tensor:
        """Logits of both forms that have some; of match as many a row as there are sounds to each video."""
        moments = seen.tokens.unflatten(1, seen.grid).mean((2, 3))
        over_time = heard.tokens.unflatten(1, heard.grid).mean(1)
        if self.form == "shift":
            offsets: Tensor = self.network(moments, over_time)
            return offsets
        logits: Tensor = self.fusion(moments, over_time.unflatten(0, (len(moments), -1)))
        return logits

    def embed(self, side: str, features: Features) -> Tensor:
        """Unit vectors (B, width) in the common space of form contrast, of side `video` or `audio`."""
        return F.normalize(self.get_submodule(f"project_{side}")(features.pooled), dim=-1)

    def match(self, seen: Features, heard: Features) -> Tensor:
        """Logits (B,) that the sound of a whole clip belongs to the video; of shift, that the offset is 0."""
        logits = self._compare(seen, heard)
        if self.form == "match":
            return logits[:, 0]
        others = torch.cat([logits[:, : self.offsets], logits[:, self.offsets + 1 :]], dim=1)
        return logits[:, self.offsets] - others.logsumexp(1)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Video and sound: by the cosine in the space of form contrast, else by the network that sees both."""
        if self.form == "contrast":
            return (Pair(self.video, self.audio, embed=(partial(self.embed, "video"), partial(self.embed, "audio"))),)
        return (Pair(self.video, self.audio, match=self.match),)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy; with `ambiguity` also `valid`, the share of rows that count.

        Of match, how often the right sound scores higher, too (a tie counts half); of shift the mean distance from the
        right offset in steps, and how often it is no more than one; of contrast the mean of both directions.
        """
        score = {"match": self._score_pairs, "shift": self._score_offsets, "contrast": self._score_moments}[self.form]
        valid, count = inputs["valid"][:, None], inputs["valid_rows"]
        found = {key: mean_over(value, valid, count) / value.shape[1] for key, value in score(outputs, inputs).items()}
        return found if self.ambiguity is None else {**found, "valid": valid.to(found["loss"].dtype).mean()}

    def _score_pairs(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        logits = outputs["logits"]
        right, wrong = logits.unbind(1)
        return {
            "loss": torch.stack([F.softplus(-right), F.softplus(wrong)], dim=1),
            "accuracy": torch.stack([right > 0, wrong <= 0], dim=1).to(logits.dtype),
            "ranking": ((right > wrong).to(logits.dtype) + (right == wrong).to(logits.dtype) / 2)[:, None],
        }

    def _score_offsets(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        logits, offset = outputs["logits"], inputs["offset"]
        error = (logits.argmax(1) - offset).abs()[:, None]
        return {
            "loss": F.cross_entropy(logits, offset, reduction="none")[:, None],
            "accuracy": (error == 0).to(logits.dtype),
            "accuracy_within_one": (error <= 1).to(logits.dtype),
            "error_in_steps": error.to(logits.dtype),
        }

    def _score_moments(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        logits = self.logit_scale[0].exp() * outputs["video"] @ outputs["audio"].mT
        own, right = logits.diagonal(dim1=1, dim2=2), torch.arange(self.moments, device=logits.device)
        hits = (logits.argmax(2) == right).to(logits.dtype) + (logits.argmax(1) == right).to(logits.dtype)
        return {"loss": (logits.logsumexp(2) + logits.logsumexp(1)) / 2 - own, "accuracy": hits / 2}

    def after_step(self, progress: float) -> None:
        """Keep the temperature of contrast in [0.01, 1]."""
        if self.form == "contrast":
            with torch.no_grad():
                self.logit_scale.clamp_(0, math.log(1 / COLDEST))

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What is seen, what is heard, and what the network says of it."""
        video, audio, valid = inputs["video"], inputs["audio"], inputs["valid"].tolist()
        if self.form == "contrast":
            video, audio = video.flatten(1, 2), audio.flatten(1)
        sounds = (
            {"its sound": audio} if audio.ndim == 2 else {"its sound": audio[:, 0], "another moment's": audio[:, 1]}
        )
        scale = self.encoder(self.audio).scale(next(iter(sounds.values()))[0])
        if self.form == "match":
            chances = outputs["logits"].sigmoid().tolist()
            texts = [f"belongs: {own:.0%} / {other:.0%}" for own, other in chances]
            right = [own > other for own, other in chances]
        elif self.form == "shift":
            said, truth = (
                ((x - self.offsets) * self.step).tolist() for x in (outputs["logits"].argmax(1), inputs["offset"])
            )
            texts = [f"early by {t:+.2f} s, found {s:+.2f} s" for s, t in zip(said, truth, strict=True)]
            right = [s == t for s, t in zip(said, truth, strict=True)]
        else:
            orders = (outputs["video"] @ outputs["audio"].mT).argmax(2).tolist()
            texts = ["sounds " + " ".join(map(str, order)) for order in orders]
            right = [order == sorted(set(order)) for order in orders]
        marks = [hit if counts else None for hit, counts in zip(right, valid, strict=True)]
        return [
            Panel("video", list(as_floats(video))),
            *(Panel(title, list(sound), scale=scale) for title, sound in sounds.items()),
            Panel("prediction", texts, marks),
        ]


def _cut(sounds: Tensor, starts: Tensor, length: int) -> Tensor:
    """(B, S) from starts int64 (B, n) on -> (B, n, length)."""
    row = torch.arange(len(sounds), device=sounds.device)[:, None, None]
    return sounds[row, starts[..., None] + torch.arange(length, device=sounds.device)]
