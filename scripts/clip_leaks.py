"""Leaks of clips, planted in files that were really encoded, for `scripts/leaks.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from mmssl import recipe as recipes
from mmssl.audit.clip_rows import Rows, joined
from mmssl.audit.clips import measure_task_on_clips
from mmssl.audit.networks import stand_in
from mmssl.audit.nulls import Arm
from mmssl.audit.shortcuts import Finding
from mmssl.batch import Batch
from mmssl.data.loader import read
from mmssl.media.audio import decode_audio
from mmssl.media.clip import write_clip
from mmssl.objectives.base import Objective
from mmssl.objectives.correspondence.temporal_alignment import TemporalAlignment
from mmssl.objectives.transformation.playback_speed import PlaybackSpeed
from mmssl.ops.clips import frames_at
from mmssl.ops.draws import Draws, mix_seed
from mmssl.recipe import Recipe

SIDE, FPS, RATE = 16, 12.5, 16_000
BLACK = 6  # frames of a lead-in
LOUD = 0.1  # standard deviation of noise
ROUND = 4  # frames of a clip that begins anew at its end, so that the fourth pace stands still

Write = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
"""Random numbers and how many frames -> frames uint8 (T, H, W, 3), and samples float32 (S,)."""


class SeeksOneSide(TemporalAlignment):
    """The wrong sound is decoded after a seek and the right one is not: decoders begin a sound with what is missing."""

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        inputs = super().transform(batch, draws)
        sought = batch["sought"][:, : inputs["audio"].shape[2]]
        return inputs | {"audio": torch.stack([inputs["audio"][:, 0], sought], 1)}


class BeginsAnew(PlaybackSpeed):
    """A short clip goes on with its first frame when it ends, as in the released code: the quicker, the more often."""

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        inputs = super().transform(batch, draws)
        steps = (inputs["pace"][:, None] + 1) * torch.arange(self.frames)
        places = (inputs["start"][:, None] + steps) % ROUND
        return inputs | {"video": self.crop(frames_at(batch["video"], places), draws)}


def noise(rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Every frame and every sample drawn on its own."""
    samples = LOUD * rng.standard_normal(round(frames / FPS * RATE)).astype(np.float32)
    return rng.integers(0, 256, (frames, SIDE, SIDE, 3), dtype=np.uint8), samples


def brown(rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """The same pictures, and a sound that jumps where it is cut and joined."""
    steps = rng.standard_normal(round(frames / FPS * RATE)).astype(np.float32)
    samples = np.cumsum(steps - steps.mean())
    samples = 0.5 * samples / np.abs(samples).max() + 0.02 * rng.standard_normal(len(samples)).astype(np.float32)
    return noise(rng, frames)[0], samples.astype(np.float32)


def led_in(rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """The same after a second half of black and of silence."""
    pictures, samples = noise(rng, frames)
    pictures[:BLACK], samples[: round(BLACK / FPS * RATE)] = 0, 0
    return pictures, samples


def alignment() -> Recipe:
    """One of two sounds of half a second, of a clip of two seconds."""
    return _recipe(
        {"name": "temporal_alignment", "window": 0.48, "min_shift": 0.48, "width": 32},
        25,
        {"video": {"model": "timm/resnet10t"}, "audio": {"model": "timm/resnet10t"}},
    )


def order() -> Recipe:
    """Three clips of three frames, one frame apart."""
    task = {"name": "clip_order", "frames": 3, "gap": 1, "width": 32, "dropout": 0.0}
    return _recipe(task, 12, {"video": {"model": "timm/resnet10t"}})


def speed() -> Recipe:
    """Four paces of four frames, as they are."""
    task = {"name": "playback_speed", "frames": 4, "equal_span": False, "jitter": 0.0}
    return _recipe(task, 16, {"video": {"model": "timm/resnet10t"}})


def _recipe(task: dict[str, Any], frames: int, encoders: dict[str, Any]) -> Recipe:
    data = {"source": "toy", "start": "first", "video": {"size": SIDE, "fps": FPS, "frames": frames}}
    sound = {"audio": {"rate": RATE, "seconds": frames / FPS}} if "audio" in encoders else {}
    return recipes.load({"encoders": encoders, "objective": task, "data": data | sound})


def on_files(
    seed: int,
    given: Recipe,
    write: Write = noise,
    kind: type[Objective] | None = None,
    sought: bool | None = None,
    *,
    suffix: str = "mp4",
    steps: int = 150,
    rows: int = 256,
) -> Finding:
    """A task of clips, or a `kind` of it that leaks, on clips that `write` makes.

    Args:
        seed: of clips, weights and draws.
        given: the recipe.
        write: what is in a clip.
        kind: in place of the task.
        sought: whether another sound of each clip is decoded after a seek without a word before it, or from the clip's
            beginning; None for no other sound.
        suffix: of the files; those of AVI keep the priming of a codec.
        steps: of training.
        rows: that are trained on, and as many that are tested.
    """
    objective = stand_in(given, seed=seed)
    if kind is not None:
        objective.__class__ = kind
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for part in Rows._fields:
            paths = _written(Path(folder) / part, given, write, rows, mix_seed(seed, part), suffix)
            parts.append(_decoded(paths, given, mix_seed(seed, part, "other"), sought))
    return measure_task_on_clips(objective, Arm("clips", suffix), Rows(*parts), steps, 16, seed)


def _written(folder: Path, given: Recipe, write: Write, rows: int, seed: int, suffix: str) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{row:04d}.{suffix}" for row in range(rows)]
    for row, path in enumerate(paths):
        frames, samples = write(np.random.default_rng(mix_seed(seed, row)), given.sources()[""].video.frames + 1)
        write_clip(path, frames, FPS, samples if "audio" in given.encoders else None, RATE)
    return paths


def _decoded(paths: list[Path], given: Recipe, seed: int, sought: bool | None) -> Batch:
    data = given.sources()[""].model_copy(update={"source": str(paths[0].parent)})
    needs = ("video", "audio") if "audio" in given.encoders else ("video",)
    batch = joined(read(data, needs, batch_size=len(paths)))
    if sought is None:
        return batch
    moments = np.random.default_rng(seed).uniform(0.2, 1.2, len(paths))
    others = [_other(path, moment, after_seek=sought) for path, moment in zip(paths, moments, strict=True)]
    return batch | {"sought": torch.stack(others)}


def _other(path: Path, moment: float, *, after_seek: bool) -> torch.Tensor:
    """Half a second of sound from a packet on, float32 (S,): decoded from there, or from the beginning of the file."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        container.seek(round(moment / stream.time_base), stream=stream)
        frames, length = [], RATE // 2
        for frame in container.decode(stream):
            frames.append(frame)
            if sum(one.samples for one in frames) >= length:
                break
        first = float(frames[0].time)
        if after_seek:
            return torch.from_numpy(np.concatenate([one.to_ndarray()[0] for one in frames])[:length].clip(-1, 1))
    whole, _ = decode_audio(str(path), RATE, first + 0.5)
    return whole[round(first * RATE) :][:length]
