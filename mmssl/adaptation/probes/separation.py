"""What is heard of what is seen: the sound of a clip is taken out of a mixture with that of another clip.

Owens & Efros 2018, "Audio-Visual Scene Analysis with Self-Supervised Multisensory Features", arXiv 1804.03641: a U-Net
on the spectrogram of the mixture, with the features of a frozen encoder of the picture at its bottom, gives a mask for
the sound of what is on the screen. The network of the paper also predicts the phase; here it is the mixture's, as in
Zhao et al. 2018 ("The Sound of Pixels", arXiv 1804.03160). Clips are mixed at equal loudness.

Known traps. A clip must not be mixed with itself, and silent clips have no score. A network that only hears finds the
sound that is commoner, cleaner or louder, and its row is what seeing has to exceed. The best mask with the mixture's
phase is far from a perfect sound; it is the ceiling. Every sound is on the screen once, and off it once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.adaptation.features import depths_of
from mmssl.adaptation.metrics import Metric
from mmssl.adaptation.placed import need_one_window
from mmssl.adaptation.probes import _trained
from mmssl.adaptation.probes.base import Probe
from mmssl.adaptation.probes.frames import moments_of
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import SourceSplit, Split
from mmssl.adaptation.separated import write_sounds
from mmssl.adaptation.table import CEILING, PRETRAINED, RANDOM, Row, Table
from mmssl.adaptation.targets.base import HELD_OUT, hold_out
from mmssl.batch import Batch
from mmssl.encoders import reinitialized
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder
from mmssl.errors import DataError, RecipeError, counted
from mmssl.modules.mode import evaluating
from mmssl.modules.separator import Separator
from mmssl.objectives.base import Chance, Objective
from mmssl.ops.draws import Draws
from mmssl.ops.moments import audible
from mmssl.ops.sound_separation import ratio_mask, si_sdr, unit_loudness
from mmssl.ranges import AboveZero, Positive

IMPROVEMENT = Metric("si_sdr_improvement", "SI-SDR improvement, dB", percent=False)
RATIO = Metric("si_sdr", "SI-SDR, dB", percent=False)
ALONE, UNCHANGED = "sound alone, trained alike", "unchanged mixture"
SEEN, HEARD = "seen", "label"
PICTURES = ("video", "image")
TOGETHER = 16
"""Clips that are decoded at a time."""


class Separation(Probe):
    """AdamW with a cosine schedule, L1 of the magnitudes; features are averaged over the places of each moment.

    Args:
        steps: optimizer steps.
        batch_rows: clips of a step, each mixed with the next; at most all of them.
        lr: peak learning rate.
        width: channels of the U-Net's finest level.
        levels: how often the U-Net halves the spectrogram.
        n_fft: samples of a window of the spectrogram.
        hop: samples from window to window.
        sounds: folder for what was heard and found in the first test rows, as sounds and as pictures.
        examples: how many of them.
    """

    def __init__(
        self,
        *,
        steps: Positive = 400,
        batch_rows: Positive = 8,
        lr: AboveZero = 1e-3,
        width: Positive = 16,
        levels: Positive = 5,
        n_fft: Positive = 512,
        hop: Positive = 128,
        sounds: str | None = None,
        examples: Positive = 4,
    ) -> None:
        self.training = {"steps": steps, "batch_rows": batch_rows, "lr": lr, "weight_decay": 0.01}
        self.width, self.levels, self.n_fft, self.hop = width, levels, n_fft, hop
        self.sounds, self.examples = sounds, examples
        if batch_rows < 2:
            raise RecipeError("separation: batch_rows = 1 leaves a clip nothing to be mixed with; set 2 or more")

    def ask(self, model: Model, request: Request) -> str:
        """Name of the encoder that sees.

        Raises:
            RecipeError: where there is none, or the request is none of this probe's.
        """
        if request.layers or request.shots or request.target:
            raise RecipeError(f"{self.name} reads no labels and no depths; leave layers, shots and target out")
        names = [model.name] if model.chosen else list(model.encoders)
        fit = [name for name in names if model.encoders[name].modality in PICTURES]
        if not fit:
            found = ", ".join(f"'{name}' reads {model.encoders[name].modality}" for name in names)
            raise RecipeError(f"{self.name} takes an encoder of clips or pictures, and {found}")
        return min(fit, key=lambda name: PICTURES.index(model.encoders[name].modality))

    def check(self, model: Model, request: Request) -> None:
        """See `Probe`."""
        self.ask(model, request)

    def score(self, model: Model, request: Request) -> Table:
        """See `Probe`."""
        name = self.ask(model, request)
        encoder = model.encoders[name]
        device = next(encoder.parameters()).device
        randoms = [reinitialized(encoder, seed).to(device) for seed in request.seeds] if request.baseline else []
        train, test = request.open(model, (encoder.modality, "audio"), learns=True)
        assert train is not None  # a probe that learns has training rows
        need_one_window(train, self.name)
        encoders = [encoder, *randoms]
        learned, lost = _read(encoders, train)
        if test is None:
            held = hold_out(torch.zeros(len(learned), dtype=torch.int64), HELD_OUT, request.seeds[0])
            learned, unseen, where = learned[~held], learned[held], f"a fifth of {train.where}, held out"
        else:
            unseen, more = _read(encoders, test)
            lost, where = lost + more, test.where
        if len(learned) < 2 or len(unseen) < 2:
            raise DataError(
                f"{self.name}: {len(learned)} clips with sound to learn from and {len(unseen)} for the test; "
                "each takes two"
            )
        mixed = _mixtures(unseen)
        rate = _rate(model, train)
        rows = []
        answers: list[list[Tensor]] = []
        kinds: list[tuple[str, list[Clips], list[Clips]]] = [
            (PRETRAINED, [learned.by(0)] * len(request.seeds), [mixed.by(0)] * len(request.seeds)),
            (ALONE, [learned.alone()] * len(request.seeds), [mixed.alone(learned)] * len(request.seeds)),
        ]
        if randoms:
            each = range(1, 1 + len(randoms))
            kinds.append((RANDOM, [learned.by(i) for i in each], [mixed.by(i) for i in each]))
        for kind, trained_on, tested_on in kinds:
            runs = zip(trained_on, tested_on, request.seeds, strict=True)
            answers.append([self._learn(seen, heard, seed, device) for seen, heard, seed in runs])
            rows.append(_row(kind, answers[-1], mixed))
        rows.append(_row(UNCHANGED, [mixed.mixture], mixed))
        rows.append(_row(CEILING, [self._ideal(mixed)], mixed))
        if self.sounds is not None:
            first = range(min(self.examples, len(mixed)))
            for row in first:
                parts = {"mixture": mixed.mixture[row], "truth": mixed.sound[row], "found": answers[0][0][row]}
                write_sounds(Path(self.sounds), f"row {int(mixed.ids[row])}", parts, rate, self.n_fft, self.hop)
        return Table(
            rows=tuple(rows),
            metrics=(IMPROVEMENT, RATIO),
            probe=self.name,
            target="",
            label="",
            encoder=name,
            train_rows=len(learned),
            test_rows=len(mixed),
            counts={},
            shots=None,
            test=where,
            validation="",
            seeds=request.seeds,
            notes=(
                "each sound is mixed with that of another row, equally loud; SI-SDR removes no mean; the ceiling "
                "is the ideal ratio mask with the mixture's phase",
            ),
            warnings=(f"{counted(lost, 'silent row')} left out",) if lost else (),
        )

    def _learn(self, rows: Clips, test: Clips, seed: int, device: torch.device) -> Tensor:
        """Train on rows; what is found in the mixtures of the test, (M, S) on the CPU."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = Separator(rows.seen[0].shape[2], self.width, self.levels)
        objective = OnScreen(network, self.n_fft, self.hop).to(device)
        _trained.train(objective, rows, rows.sound, seed=seed, **self.training)  # type: ignore[arg-type]
        objective.to(device)
        with evaluating(objective), torch.no_grad():
            return torch.cat(
                [
                    objective.separate(test.mixture[pick].to(device), test.seen[0][pick].to(device)).cpu()
                    for pick in torch.arange(len(test)).split(TOGETHER)
                ]
            )

    def _ideal(self, mixed: Clips) -> Tensor:
        """What the ideal ratio mask finds, (M, S)."""
        spectrum = Spectrum(self.n_fft, self.hop)
        own, other = spectrum(mixed.sound), spectrum(mixed.mixture - mixed.sound)
        mask = ratio_mask(own.abs(), other.abs())
        return spectrum.sound(mask * spectrum(mixed.mixture), mixed.sound.shape[1])


class Spectrum(nn.Module):
    """The short-time Fourier transform, and back.

    Args:
        n_fft: samples of a window, of Hann's shape.
        hop: samples from window to window.
    """

    def __init__(self, n_fft: int, hop: int) -> None:
        super().__init__()
        if hop > n_fft // 2:
            raise RecipeError(f"separation: hop = {hop} should be at most half of n_fft = {n_fft}")
        self.n_fft, self.hop = n_fft, hop
        self.window = nn.Buffer(torch.hann_window(n_fft))

    def forward(self, sound: Tensor) -> Tensor:
        """(B, S) -> complex (B, F, T), of unit energy."""
        return torch.stft(sound, self.n_fft, self.hop, window=self.window, return_complex=True, normalized=True)

    def sound(self, spectrum: Tensor, length: int) -> Tensor:
        """Back to (B, length)."""
        return torch.istft(spectrum, self.n_fft, self.hop, window=self.window, normalized=True, length=length)


class OnScreen(Objective):
    """L1 between the masked magnitudes of a mixture and those of the sound that belongs to the picture.

    Args:
        network: see `Separator`.
        n_fft: see `Spectrum`.
        hop: likewise.
    """

    needs = (SEEN, HEARD)
    meets = "transform"

    def __init__(self, network: Separator, n_fft: int, hop: int) -> None:
        super().__init__({})
        self.network, self.spectrum = network, Spectrum(n_fft, hop)

    def chance(self, rows: int) -> Chance:
        """Not known before the sounds are."""
        return Chance(None)

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Each sound mixed with the next of the batch, whose order is random."""
        sound = batch[HEARD]
        return {SEEN: batch[SEEN], "mixture": sound + sound.roll(1, dims=0), "truth": self.spectrum(sound).abs()}

    def predict(self, inputs: Batch) -> Batch:
        """`found`, magnitudes (B, F, T)."""
        magnitude = self.spectrum(inputs["mixture"]).abs()
        return {"found": self.network(magnitude, inputs[SEEN]) * magnitude}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Over the mean magnitude of the truth."""
        return {"loss": (outputs["found"] - inputs["truth"]).abs().mean() / inputs["truth"].mean()}

    def separate(self, mixture: Tensor, seen: Tensor) -> Tensor:
        """Mixtures (B, S) -> what belongs to the picture, (B, S)."""
        spectrum = self.spectrum(mixture)
        return self.spectrum.sound(self.network(spectrum.abs(), seen) * spectrum, mixture.shape[1])


@dataclass(frozen=True)
class Clips:
    """Rows as encoders see them, and their sounds.

    Attributes:
        ids: their numbers, int64 (N,).
        seen: of each encoder, features over time, float32 (N, t, D).
        sound: of root mean square 1, float32 (N, S).
        mixture: with the sound of another row, (N, S); empty where they are mixed as they are learned from.
    """

    ids: Tensor
    seen: list[Tensor]
    sound: Tensor
    mixture: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Tensor) -> Clips:
        mixture = self.mixture[index] if len(self.mixture) else self.mixture
        return Clips(self.ids[index], [one[index] for one in self.seen], self.sound[index], mixture)

    def by(self, encoder: int) -> Clips:
        """As one encoder sees them."""
        return Clips(self.ids, [self.seen[encoder]], self.sound, self.mixture)

    def alone(self, learned: Clips | None = None) -> Clips:
        """As one who sees nothing: the mean of what the first encoder sees in the rows that are learned from."""
        mean = (learned or self).seen[0].mean((0, 1), keepdim=True)
        return Clips(self.ids, [mean.expand(len(self), 1, -1)], self.sound, self.mixture)

    def read(self, picks: Iterable[Tensor]) -> Iterator[Batch]:
        """A batch for each of `picks`, places of rows, int64."""
        return ({SEEN: self.seen[0][pick]} for pick in picks)


def _read(encoders: Sequence[Encoder], split: Split) -> tuple[Clips, int]:
    """All rows that are not silent, and how many are."""
    seen: list[list[Tensor]] = [[] for _ in encoders]
    ids, sounds = [], []
    lost = 0
    with evaluating(*encoders), torch.no_grad():
        for batch in split.read(batch_size=TOGETHER):
            loud = audible(batch["audio"])
            lost += int((~loud).sum())
            ids.append(batch["id"][loud].cpu())
            sounds.append(unit_loudness(batch["audio"][loud].float().cpu()))
            for encoder, parts in zip(encoders, seen, strict=True):
                (features,) = depths_of(encoder, batch, False).values()
                parts.append(moments_of(features, encoder.modality).float().cpu()[loud.cpu()])
    if not ids:
        raise DataError(f"{split.where}: there are no rows that can be decoded")
    return Clips(torch.cat(ids), [torch.cat(parts) for parts in seen], torch.cat(sounds), torch.empty(0)), lost


def _mixtures(clips: Clips) -> Clips:
    """Each clip mixed with the next in a fixed random order, so that none is mixed with itself."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(clips)))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return Clips(clips.ids, clips.seen, clips.sound, clips.sound + clips.sound[other])


def _row(name: str, found: Sequence[Tensor], mixed: Clips) -> Row:
    before = si_sdr(mixed.mixture.double(), mixed.sound.double())
    scores = []
    for sounds in found:
        after = si_sdr(sounds.double(), mixed.sound.double())
        scores.append({IMPROVEMENT.name: float((after - before).mean()), RATIO.name: float(after.mean())})
    return Row.of_seeds(name, "", scores)


def _rate(model: Model, split: Split) -> int:
    """Of the sounds, in Hz; that of an encoder of sound where batches do not say it."""
    if isinstance(split, SourceSplit):
        return split.spec.audio.rate
    known = [encoder for encoder in model.encoders.values() if encoder.modality == "audio"]
    return int(cast(AudioEncoder, known[0]).rate) if known else 16_000
