"""Can a task on sounds be answered where there is nothing to hear?

Sounds are noise of which every sample is drawn on its own, or noise as strong in each octave as in the next; both are
the same at any speed and in any pitch. They go through files as the user has them (encoder, container, sample rate,
decoder, resampler) and through the task's transform, so that what a small network gets right above chance it knows from
there: where a codec or a resampler cuts, a level, a length. The control has a tone of one pitch in the same noise.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch

from mmssl.audit.clip_rows import LOUD, Kept, Rows, joined, kinds_of
from mmssl.audit.networks import stand_in
from mmssl.audit.nulls import HUM, Arm
from mmssl.audit.shortcuts import Finding, accuracy_of, judge, train_on, with_control
from mmssl.batch import Batch, count_rows
from mmssl.data.loader import Loader, read
from mmssl.media.clip import write_clip
from mmssl.media.track import Track
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws, mix_seed
from mmssl.recipe import Data, Recipe

HISS, OCTAVES = "white noise to hear", "1/f noise"
CODECS = {
    **{"aac": "aac", "mp3": "libmp3lame", "opus": "libopus", "vorbis": "libvorbis", "flac": "flac"},
    **{"pcm_s16le": "pcm_s16le", "alac": "alac"},
}
USUAL = "wav pcm_s16le"
OTHER = ("mp3 mp3", "ogg opus")
"""Codecs that are planted: both leave out what is hard to hear."""
AT = " at "  # of a kind of file: before its sample rate
OPUS = 48_000  # the only rate of sounds in it, in Hz
KINDS = 3  # of file that have an arm each
BATCH = 32  # sounds that are tested at a time
TONE, PITCH = 0.1, 1000.0  # of the control: amplitude, and Hz


def reads_sounds(objective: Objective) -> bool:
    """Whether a task reads sounds and nothing else."""
    return set(objective.needs) == {"audio"}


def audit_sounds(
    recipe: Recipe,
    kinds: Mapping[str, int],
    *,
    planted: bool = False,
    steps: int = 150,
    batch_size: int = 16,
    rows: int = 256,
    seed: int = 0,
    report: Callable[[Finding], None] = lambda finding: None,
) -> tuple[list[Finding], list[str]]:
    """The control of each kind of noise, then that noise in files of each kind, and notes on what is not asked.

    Args:
        recipe: of a task that `reads_sounds`, with one source.
        kinds: of the user's files, the most frequent first; see `sound_kinds`.
        planted: write the sounds with other codecs as well.
        steps: of each small training.
        batch_size: sounds a step.
        rows: sounds that are trained on, and as many others that are tested.
        seed: of sounds, initialization and draws.
        report: called with each finding as soon as it is there.

    Raises:
        RecipeError: for several sources, or a task that has no right answers.
    """
    accuracy_of(stand_in(recipe, seed=seed))
    usual = USUAL + AT + str(next(iter(recipe.sources().values())).audio.rate)
    files = [kind for kind in kinds if _codec(kind) in CODECS][:KINDS] or [usual]
    arms = [Arm(HISS, file) for file in files]
    arms += [Arm(HISS, f"{kind}{AT}{_rate(files[0])}") for kind in OTHER if planted]
    arms = [*dict.fromkeys(arms), Arm(OCTAVES, files[0])]
    notes = [f"no arm has files of the kind {kind}, which are not written here" for kind in kinds if kind not in files]
    found: list[Finding] = []
    controls: dict[str, Finding] = {}
    for arm in arms:
        given = sound_rows(recipe, arm, rows, seed)
        if arm.null not in controls:
            control = Arm(arm.null, arm.file, HUM)
            hummed = with_hum(given, recipe, seed)
            controls[arm.null] = measure_sounds(
                stand_in(recipe, seed=seed), control, hummed, steps, batch_size=batch_size, seed=seed
            )
            found.append(controls[arm.null])
            report(found[-1])
        one = measure_sounds(stand_in(recipe, seed=seed), arm, given, steps, batch_size=batch_size, seed=seed)
        found.append(with_control(one, controls[arm.null]))
        report(found[-1])
    return found, notes


def measure_sounds(
    objective: Objective, arm: Arm, rows: Rows, steps: int, *, batch_size: int = 16, seed: int = 0
) -> Finding:
    """What a task over whatever networks it has learns on one kind of sounds; see `audit_sounds`.

    Raises:
        RecipeError: where the task asks nothing of such sounds.
    """
    loader = cast(Loader, Kept(rows.train, batch_size, seed))
    train_on(objective, loader, steps=steps, batch_size=batch_size, seed=seed)
    return judge(arm, objective, _unseen(objective, rows.test, seed))


def _unseen(objective: Objective, rows: Batch, seed: int) -> Iterator[Batch]:
    for step, start in enumerate(range(0, count_rows(rows), BATCH)):
        batch = {key: value[start : start + BATCH] for key, value in rows.items()}
        yield objective.transform(batch, Draws(seed, step, count_rows(batch), stream="unseen"))


def sound_rows(recipe: Recipe, arm: Arm, rows: int, seed: int) -> Rows:
    """Write and read `rows` sounds to train on and as many to test; each is decoded once."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [write_sounds(Path(folder) / part, recipe, arm, rows, mix_seed(seed, part)) for part in Rows._fields]
        return Rows(*(joined(read(part, ("audio",), batch_size=rows)) for part in parts))


def with_hum(rows: Rows, recipe: Recipe, seed: int) -> Rows:
    """The control: the same rows with a tone of one pitch, which begins anywhere in its period."""
    rate = next(iter(recipe.sources().values())).audio.rate
    parts = []
    for name, part in zip(Rows._fields, rows, strict=True):
        phase = np.random.default_rng(mix_seed(seed, "hum", name)).random((count_rows(part), 1))
        moments = np.arange(part["audio"].shape[1]) / rate
        tone = torch.from_numpy(TONE * np.sin(2 * math.pi * (PITCH * moments + phase))).to(part["audio"].dtype)
        parts.append({**part, "audio": (part["audio"] + tone).clamp(-1, 1)})
    return Rows(*parts)


def write_sounds(folder: Path, recipe: Recipe, arm: Arm, rows: int, seed: int) -> Data:
    """Write `rows` sounds; returns how to read them, with the recipe's decode settings."""
    folder.mkdir(parents=True)
    data = next(iter(recipe.sources().values()))
    rate, codec = _rate(arm.file), CODECS[_codec(arm.file)]
    for row in range(rows):
        samples = draw_sound(arm, data.audio.seconds, rate, mix_seed(seed, row))
        write_clip(folder / f"{row:06d}.{arm.file.split()[0]}", None, 0.0, samples, rate, audio_codec=codec)
    return Data(source=str(folder), audio=data.audio, start=data.start)


def draw_sound(arm: Arm, seconds: float, rate: int, seed: int) -> np.ndarray:
    """Samples float32 (S,) of one sound."""
    rng = np.random.default_rng(seed)
    count = round(seconds * rate)
    samples = rng.standard_normal(count)
    if arm.null == OCTAVES:
        # Twice as long as it is kept, since such noise meets itself at its ends.
        spectrum = np.fft.rfft(rng.standard_normal(2 * count))
        spectrum[0], spectrum[1:] = 0, spectrum[1:] / np.sqrt(np.arange(1, len(spectrum)))
        samples = np.fft.irfft(spectrum, 2 * count)[:count]
    return (samples * (LOUD / samples.std())).clip(-1, 1).astype(np.float32)


def sound_kinds(data: Data) -> dict[str, int]:
    """Container, codec and rate in Hz of a sample of a source's sounds, the most frequent first: `mp3 mp3 at 44100`."""
    return kinds_of(data, "audio", _kind)


def _kind(track: Track) -> str:
    container, _, codecs = track.kind.partition(" ")
    return f"{container} {codecs.rpartition('+')[2]}{AT}{track.head[0].sample_rate}"


def _codec(kind: str) -> str:
    return kind.partition(AT)[0].partition(" ")[2]


def _rate(kind: str) -> int:
    return OPUS if _codec(kind) == "opus" else int(kind.partition(AT)[2])
