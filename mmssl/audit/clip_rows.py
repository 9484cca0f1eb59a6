"""Clips without structure, decoded once for all arms that read them: noise in files of a kind, and swapped pairs.

Noise is written and read as the recipe reads it. Silence is the same pictures without a sound, and a pair of the user's
own clips has the pictures of one and the sound of another. Of a codec swap those clips that are trained on are in files
of one kind, and those that are tested in files of another.

The control has a clock in it: rings, brightness and a tone that grow from the beginning of what is read of a clip to
its end, from another level in each clip. It tells order, direction and speed, place and turn, and which sound belongs
to a picture. It is planted in what was decoded, so that an arm and its control have the same noise.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmssl.audit.nulls import Arm, natural, white, zone_plate
from mmssl.batch import Batch, count_rows
from mmssl.data.base import MapSource
from mmssl.data.columns import find_column
from mmssl.data.loader import Loader, read
from mmssl.data.sources import open_source
from mmssl.errors import DataError
from mmssl.media.clip import write_clip
from mmssl.media.track import Track
from mmssl.ops.draws import mix_seed
from mmssl.recipe import Data, Recipe

MOVING, STILL, MUTE, SWAPPED = "moving noise", "still noise", "silence", "own clips, swapped"
POSITION, RECODED = "position alone", "codec swap"
TO = " to "  # of a codec swap: from the kind of file that is trained on to the kind that is tested
PICTURES = {"h264": "libx264", "mpeg4": "mpeg4", "vp8": "libvpx", "vp9": "libvpx-vp9", "flv1": "flv", "mjpeg": "mjpeg"}
SOUNDS = {"aac": "aac", "mp3": "libmp3lame", "opus": "libopus", "flac": "flac", "pcm_s16le": "pcm_s16le"}
SAMPLE = 50  # files that are looked at
FPS = 25.0
SPARE = 1.0  # seconds by which a clip is longer than what is taken of it
LOUD = 0.1  # standard deviation of noise
BRIGHTER, TONE, PITCH = 0.2, 0.3, 1000.0  # of the clock: half its range of brightness, its loudest tone, in Hz
OWN = 256  # of the user's clips, half of them for testing
PAIRS = 4  # of their pairs as many times the rows: of 47 clips a clock was found by 600 pairs, and not by 128
KEPT = 2**30  # bytes of decoded clips in memory, of training and of testing each


class Rows(NamedTuple):
    """What is trained on, and what is tested.

    Attributes:
        train: batch of all rows, on the CPU.
        test: likewise.
    """

    train: Batch
    test: Batch


class Kept:
    """Batches of other rows at every step, of rows that were decoded once, since noise takes long.

    Args:
        rows: of all clips, on the CPU.
        batch_size: rows of a batch.
        seed: of what is drawn.
    """

    def __init__(self, rows: Batch, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, min(batch_size, count_rows(rows)), seed

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Those of steps `start` to `stop`."""
        for step in range(start, stop):
            rng = np.random.default_rng(mix_seed(self.seed, step))
            chosen = torch.from_numpy(rng.choice(count_rows(self.rows), self.batch_size, replace=False))
            yield {key: value[chosen] for key, value in self.rows.items()}


def noise_rows(recipe: Recipe, arm: Arm, rows: int, batch_size: int, seed: int, *, sound: bool = True) -> Rows:
    """Write and read `rows` clips to train on and as many to test, whole batches, or as many as are kept."""
    train, test = (noise_part(recipe, arm, part, rows, batch_size, seed, sound=sound) for part in ("train", "test"))
    return Rows(train, test)


def noise_part(
    recipe: Recipe, arm: Arm, part: str, rows: int, batch_size: int, seed: int, *, sound: bool = True
) -> Batch:
    """`train` or `test` of `noise_rows`: of each clip a random window, as training reads it, or the one of probes."""
    needs = ("video", "audio") if sound else ("video",)
    most = max(2, KEPT // (batch_size * _bytes(recipe.sources()[""])))
    count = min(most, math.ceil(rows / batch_size))
    with tempfile.TemporaryDirectory() as folder:
        written = write_noise(Path(folder) / part, recipe, arm, count * batch_size, mix_seed(seed, part), sound=sound)
        if part == "test":
            return joined(read(written, needs, batch_size=batch_size))
        return joined(Loader({"": written}, needs, batch_size=batch_size, seed=seed).batches(0, count))


def blank(rows: Rows) -> Rows:
    """As many rows of gray in silence, for a clock that runs where nothing else is."""
    empty = {"video": 128, "audio": 0, "audio_mask": 1}
    return Rows(*({key: torch.full_like(value, empty.get(key, 0)) for key, value in part.items()} for part in rows))


def muted(rows: Rows) -> Rows:
    """The same pictures in silence."""
    return Rows(*({**part, "audio": torch.zeros_like(part["audio"])} for part in rows))


def swapped_rows(recipe: Recipe, rows: int) -> Rows | None:
    """Pairs of the user's own clips, each with the sound of another; None where there are fewer than four clips.

    Half of the clips are for testing, each in one pair, since pairs that share a clip are not independent.
    """
    data = recipe.sources()[""]
    most = min(OWN, 2 * rows, max(4, KEPT // _bytes(data)), data.limit or OWN)
    own = joined(read(data.model_copy(update={"cache": None, "limit": most}), ("video", "audio")))
    middle = count_rows(own) // 2
    if middle < 2:
        return None
    train, test = ({key: value[part] for key, value in own.items()} for part in (slice(middle), slice(middle, None)))
    pairs = min(PAIRS * rows, max(2, KEPT // _bytes(data)), middle * (middle - 1))
    return Rows(swapped(train, pairs), swapped(test, count_rows(test)))


def swapped(batch: Batch, pairs: int) -> Batch:
    """As many pairs of pictures and the sound of another row; no pair twice while there are others."""
    count, row = count_rows(batch), torch.arange(pairs)
    other = (row + 1 + row // count % (count - 1)) % count
    return {key: value[other if key.startswith("audio") else row % count] for key, value in batch.items()}


def with_clock(rows: Rows, rate: int, seed: int) -> Rows:
    """The control: the same rows with a clock in what is seen and heard; `rate` is that of sounds, in Hz."""
    return Rows(*(_clock(part, rate, mix_seed(seed, name)) for part, name in zip(rows, ("train", "test"), strict=True)))


def _clock(batch: Batch, rate: int, seed: int) -> Batch:
    """Half of the range is passed in each clip, from a random level on."""
    level = np.random.default_rng(seed).random(count_rows(batch), dtype=np.float32) / 2

    def grown(n: int) -> Tensor:
        return torch.from_numpy(level[:, None] + np.arange(n, dtype=np.float32) / n / 2)

    video = batch["video"].clone()
    rings = torch.from_numpy(zone_plate(np.full((*video.shape[3:], 3), 0.5, np.float32)) - 0.5).permute(2, 0, 1)
    brighter = BRIGHTER * (2 * grown(video.shape[1]) - 1)
    for clip, brightness in zip(video, brighter, strict=True):  # one by one, since floats take four times as much
        clip.copy_(((clip / 255 + rings + brightness[:, None, None, None]).clamp(0, 1) * 255).round())
    planted = {**batch, "video": video}
    if "audio" in batch:
        moments = torch.arange(batch["audio"].shape[1]) / rate
        tone = TONE * grown(len(moments)).square() * torch.sin(2 * math.pi * PITCH * moments)
        planted["audio"] = (batch["audio"] + tone).clamp(-1, 1)
    return planted


def write_noise(folder: Path, recipe: Recipe, arm: Arm, rows: int, seed: int, *, sound: bool = True) -> Data:
    """Write `rows` clips; returns how to read them, with the recipe's decode settings."""
    folder.mkdir(parents=True)
    data = recipe.sources()[""]
    codecs = codecs_of(arm.file, sound)
    assert codecs is not None  # such arms are made of kinds that are written here
    for row in range(rows):
        frames, samples = draw_noise(arm, data, mix_seed(seed, row))
        path = folder / f"{row:06d}.{arm.file.split()[0]}"
        heard = samples if sound else None
        write_clip(path, frames, _fps(data), heard, data.audio.rate, video_codec=codecs[0], audio_codec=codecs[1])
    return Data(source=str(folder), audio=data.audio, video=data.video, start=data.start)


def draw_noise(arm: Arm, data: Data, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 (T, H, W, 3), of 4:3 and even sides, and samples float32 (S,) of one clip."""
    rng = np.random.default_rng(seed)
    seconds = max(data.video.frames / data.video.fps, data.audio.seconds) + SPARE
    height = max(16, 2 * round(data.video.size / 2))
    width = 2 * round(height * 2 / 3)
    count = round(seconds * _fps(data))
    draw, moments = (natural, 1) if arm.null == STILL else (white, count)
    frames = np.stack([draw(rng, height, width, None) for _ in range(moments)])
    frames = np.repeat(frames, count // moments, 0)
    samples = LOUD * rng.standard_normal(round(seconds * data.audio.rate), dtype=np.float32)
    return (frames * 255).round().astype(np.uint8), samples.clip(-1, 1)


def _fps(data: Data) -> float:
    return max(FPS, data.video.fps)


def clip_kinds(data: Data) -> dict[str, int]:
    """Container and codecs of a sample of a source's clips, the most frequent first: `mp4 h264+aac`."""
    return kinds_of(data, "video", lambda track: track.kind)


def kinds_of(data: Data, key: str, name: Callable[[Track], str]) -> dict[str, int]:
    """What files of a sample of a source are called, the most frequent name first; none of made rows and streams.

    Args:
        data: the source.
        key: `video` or `audio`.
        name: of an opened file.
    """
    source = open_source(data)
    try:
        column = find_column(data, key, source.columns)
    except DataError:
        return {}
    if not isinstance(source, MapSource):
        return {}
    counts: Counter[str] = Counter()
    chosen = source.select([column])
    for place in range(0, len(source), max(1, len(source) // SAMPLE)):
        cell = chosen.row(place)[column]
        if isinstance(cell, Mapping) and cell.keys() & {"frames", "array"}:
            continue
        try:
            track = Track(cell, key)
        except DataError:
            continue
        counts[name(track)] += 1
        track.close()
    return dict(counts.most_common())


def codecs_of(kind: str, sound: bool) -> tuple[str, str] | None:
    """FFmpeg's encoders for a kind of file, of pictures and of sound; None for one that is not written here."""
    seen, _, heard = kind.partition(" ")[2].partition("+")
    if seen not in PICTURES or (sound and heard not in SOUNDS):
        return None
    return PICTURES[seen], SOUNDS.get(heard, "")


def _bytes(data: Data) -> int:
    """Of a decoded row."""
    return 3 * data.video.frames * data.video.size**2 + 5 * round(data.audio.seconds * data.audio.rate)


def joined(batches: Iterator[Batch]) -> Batch:
    """All rows in one batch."""
    every = list(batches)
    return {key: torch.cat([batch[key] for batch in every]) for key in every[0]} if every else {}
