"""Can a task on clips, or on clips and their sound, be answered where there is nothing to see or to hear?

Clips are made of noise and go through real files: encoder, container, decoder, crop and transform. Each frame is noise
of its own, or one frame stands still; the sound is noise or silence; or pictures and sounds are the user's own, each
pair from two clips. So no moment comes before another, and no sound belongs to what is seen, and what a small network
gets right above chance it knows from files or from the transform: what a codec does between key frames, the priming of
a sound's beginning, how long tracks are.

The control has a clock in it: rings, brightness and a tone that grow from the beginning of a clip to its end, from
another level in each clip. It tells order, direction and speed, place and turn, and which sound belongs to a picture.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from mmssl.audit.nulls import CLOCK, Arm, natural, white, zone_plate
from mmssl.audit.shortcuts import Finding, SmallNetwork, accuracy_of, finding, judge, train_on, with_control
from mmssl.batch import Batch, count_rows
from mmssl.data.base import MapSource
from mmssl.data.columns import find_column
from mmssl.data.loader import Loader, read
from mmssl.data.sources import open_source
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import DataError, RecipeError
from mmssl.media.clip import write_clip
from mmssl.media.track import Track
from mmssl.objectives import create
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws, mix_seed
from mmssl.recipe import Data, Recipe

MOVING, STILL, MUTE, SWAPPED = "moving noise", "still noise", "silence", "own clips, swapped"
PAIRS_ONLY = (MUTE, SWAPPED)
USUAL = {True: "mp4 h264+aac", False: "mp4 h264"}
"""Of clips with sound, and without."""
PICTURES = {"h264": "libx264", "mpeg4": "mpeg4", "vp8": "libvpx", "vp9": "libvpx-vp9", "flv1": "flv", "mjpeg": "mjpeg"}
SOUNDS = {"aac": "aac", "mp3": "libmp3lame", "opus": "libopus", "flac": "flac", "pcm_s16le": "pcm_s16le"}
OTHER = {True: ("avi mpeg4+aac", "webm vp9+opus"), False: ("avi mpeg4", "webm vp9")}
"""Codecs that are planted: of AVI files the first 50 ms of sound are priming."""
SAMPLE, KINDS = 50, 3  # files that are looked at; kinds of file that have an arm each
FPS = 25.0
SPARE = 1.0  # seconds by which a clip is longer than what is taken of it
LOUD = 0.1  # standard deviation of noise
BRIGHTER, TONE, PITCH = 0.2, 0.3, 1000.0  # of the clock: half its range of brightness, its loudest tone, in Hz
OWN = 256  # of the user's clips, half of them for testing
KEPT = 2**30  # bytes of decoded clips in memory


class SmallClipNetwork(Encoder):
    """`SmallNetwork` on every frame: what it sees, what has changed since the first frame, and how much at each step.

    A token a frame, grid (T, 1, 1); pooled over time.
    """

    modality = "video"

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.frame = SmallNetwork(width)
        self.dim = 3 * self.frame.dim

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Clips (B, T, 3, H, W), as for `VideoEncoder`."""
        seen = self.frame(x.flatten(0, 1)).pooled.unflatten(0, x.shape[:2])
        since, step = seen - seen[:, :1], seen.diff(dim=1, prepend=seen[:, :1]).abs()
        pooled = torch.cat([seen.mean(1), since[:, -1], step.mean(1)], 1)
        return Features(torch.cat([seen, since, step], 2), pooled, (x.shape[1], 1, 1))


class SmallSoundNetwork(Encoder):
    """Two convolutions over time on log-mel bands; grid (1, T).

    Args:
        rate: of sounds, in Hz.
        width: of a token.
    """

    modality = "audio"

    def __init__(self, rate: int, width: int = 64) -> None:
        super().__init__()
        self.rate, self.dim = rate, width
        self.mel = MelSpectrogram(rate, n_fft=512, hop_length=max(1, rate // 100), n_mels=32)
        self.convolutions = nn.Sequential(
            *(nn.Conv1d(32, width, 5, 2, 2, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Conv1d(width, width, 3, 2, 1, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Waveforms (B, S), as for `AudioEncoder`."""
        over_time = self.convolutions((self.mel(x) + 1e-6).log() / 4)
        return Features(over_time.mT, over_time.mean(2), (1, over_time.shape[2]))


class Kept:
    """Clips that were decoded once, since noise takes long: batches of other rows at every step.

    Args:
        rows: of all clips, on the CPU.
        batch_size: rows of a batch.
        seed: of what is drawn.
    """

    def __init__(self, rows: Batch, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, min(batch_size, count_rows(rows)), seed

    @classmethod
    def of(cls, data: Data, needs: Sequence[str], rows: int, batch_size: int, seed: int) -> Kept:
        """A random window of each row, or of as many as are kept, as training decodes it."""
        loader = Loader({"": data}, needs, batch_size=batch_size, seed=seed)
        most = max(2, KEPT // (batch_size * _bytes(data)))
        every = list(loader.batches(0, min(most, math.ceil(rows / batch_size))))
        return cls({key: torch.cat([batch[key] for batch in every]) for key in every[0]}, batch_size, seed)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Those of steps `start` to `stop`."""
        for step in range(start, stop):
            rng = np.random.default_rng(mix_seed(self.seed, step))
            chosen = torch.from_numpy(rng.choice(count_rows(self.rows), self.batch_size, replace=False))
            yield {key: value[chosen] for key, value in self.rows.items()}


@dataclass(frozen=True)
class OwnClips:
    """Some of the user's, decoded as the recipe does.

    Attributes:
        video: uint8 (N, T, 3, H, W).
        audio: float32 (N, S).
    """

    video: np.ndarray
    audio: np.ndarray

    def half(self, test: bool) -> OwnClips:
        """Those of training, or the others."""
        middle = len(self.video) // 2
        part = slice(middle, None) if test else slice(0, middle)
        return OwnClips(self.video[part], self.audio[part])


def reads_clips(objective: Objective) -> bool:
    """Whether a task reads clips, or clips and their sound, and nothing else."""
    return "video" in objective.needs and set(objective.needs) <= {"video", "audio"}


def small_clips(recipe: Recipe, seed: int) -> Objective:
    """The recipe's task over small networks, with fresh weights.

    Raises:
        RecipeError: for several sources.
    """
    if len(recipe.sources()) > 1:
        raise RecipeError("clips without structure stand for one source, and this recipe has several")
    torch.manual_seed(seed)
    rate = recipe.sources()[""].audio.rate
    made: dict[str, Callable[[], Encoder]] = {
        "image": SmallNetwork,
        "video": SmallClipNetwork,
        "audio": lambda: SmallSoundNetwork(rate),
    }
    networks = {name: made[str(given.get("modality", name))]() for name, given in recipe.encoders.items()}
    hyper = {key: value for key, value in recipe.objective.items() if key != "name"}
    return create(recipe.objective["name"], networks, **hyper)


def audit_clips(
    recipe: Recipe,
    kinds: Mapping[str, int],
    *,
    planted: bool = False,
    steps: int = 300,
    batch_size: int = 16,
    rows: int = 256,
    seed: int = 0,
    report: Callable[[Finding], None] = lambda finding: None,
) -> tuple[list[Finding], list[str]]:
    """Every arm after the control of its kind of clips, and notes on those that ask nothing.

    Args:
        recipe: of a task that `reads_clips`, with one source.
        kinds: of the user's files, the most frequent first; see `clip_kinds`.
        planted: write the clips with other codecs as well.
        steps: of each small training.
        batch_size: clips a step.
        rows: clips that are trained on, and as many others that are tested; whole batches.
        seed: of clips, initialization and draws.
        report: called with each finding as soon as it is there.

    Raises:
        RecipeError: for several sources, or a task that has no right answers.
    """
    task = small_clips(recipe, seed)
    accuracy_of(task, _matched(task, batch_size))
    sound = "audio" in task.needs
    files = [kind for kind in kinds if _codecs(kind, sound)][:KINDS] or [USUAL[sound]]
    arms = [Arm(MOVING, file) for file in files]
    arms += [Arm(MOVING, file) for file in OTHER[sound] if planted and file not in files]
    arms += [Arm(null, files[0]) for null in (STILL, *PAIRS_ONLY) if sound or null not in PAIRS_ONLY]
    own = _own(recipe) if sound else None
    notes = [f"no arm has files of the kind {kind}, which are not written here" for kind in kinds if kind not in files]
    found: list[Finding] = []
    controls: dict[str, Finding] = {}
    for arm in arms:
        if arm.null == SWAPPED and own is None:
            notes.append("pairs of the user's own clips take four clips at least")
            continue
        try:
            if arm.null not in controls:
                control = Arm(arm.null, files[0], CLOCK)
                controls[arm.null] = measure_clips(recipe, control, steps, batch_size, rows, seed, own)
                found.append(controls[arm.null])
                report(found[-1])
            one = measure_clips(recipe, arm, steps, batch_size, rows, seed, own)
        except RecipeError as error:
            notes.append(str(error))
            continue
        found.append(with_control(one, controls[arm.null]))
        report(found[-1])
    return found, notes


def _matched(objective: Objective, batch_size: int) -> int | None:
    """Rows among which a task finds the sound of what is seen, which are strangers here; None for other tasks."""
    return batch_size if objective.meets == "loss" and {"video", "audio"} == set(objective.needs) else None


def measure_clips(
    recipe: Recipe, arm: Arm, steps: int, batch_size: int, rows: int, seed: int, own: OwnClips | None = None
) -> Finding:
    """What the task over small networks learns on one kind of clips; see `audit_clips`.

    Raises:
        RecipeError: where the task asks nothing of such clips.
    """
    return measure_clip_task(small_clips(recipe, seed), recipe, arm, steps, batch_size, rows, seed, own)


def measure_clip_task(
    objective: Objective,
    recipe: Recipe,
    arm: Arm,
    steps: int,
    batch_size: int,
    rows: int,
    seed: int,
    own: OwnClips | None = None,
) -> Finding:
    """`measure_clips` of a task as it is, over whatever networks it has."""
    with tempfile.TemporaryDirectory() as folder:
        given, asked = (
            write_arm(
                Path(folder) / part,
                recipe,
                arm,
                rows,
                mix_seed(seed, part),
                own.half(part == "test") if own else None,
                sound="audio" in objective.needs,
            )
            for part in ("train", "test")
        )
        loader = cast(Loader, Kept.of(given, objective.needs, rows, batch_size, seed))
        train_on(objective, loader, steps=steps, batch_size=batch_size, seed=seed)
        found = judge(
            arm, objective, _unseen(objective, asked, batch_size, seed), matched=_matched(objective, batch_size)
        )
    if arm.null != SWAPPED or own is None:
        return found
    # A clip is in several pairs, which are not independent: a trial a clip.
    return finding(arm, found.accuracy, found.chance, min(rows, len(own.half(True).video)))


def _unseen(objective: Objective, data: Data, batch_size: int, seed: int) -> Iterator[Batch]:
    for step, batch in enumerate(read(data, objective.needs, batch_size=batch_size)):
        yield objective.transform(batch, Draws(seed, step, count_rows(batch), stream="unseen"))


def write_arm(
    folder: Path, recipe: Recipe, arm: Arm, rows: int, seed: int, own: OwnClips | None = None, *, sound: bool = True
) -> Data:
    """Write `rows` clips; returns how to read them, with the recipe's decode settings."""
    folder.mkdir(parents=True)
    data = recipe.sources()[""]
    codecs = _codecs(arm.file, sound)
    assert codecs is not None  # such arms are made of kinds that are written here
    fps = data.video.fps if arm.null == SWAPPED else max(FPS, data.video.fps)
    for row in range(rows):
        frames, samples = draw_clip(arm, data, mix_seed(seed, row), row, own)
        path = folder / f"{row:06d}.{arm.file.split()[0]}"
        write_clip(
            path, frames, fps, samples if sound else None, data.audio.rate, video_codec=codecs[0], audio_codec=codecs[1]
        )
    return Data(source=str(folder), audio=data.audio, video=data.video, start=data.start)


def draw_clip(
    arm: Arm, data: Data, seed: int, row: int = 0, own: OwnClips | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 (T, H, W, 3), of 4:3 and even sides, and samples float32 (S,) of one clip."""
    rng = np.random.default_rng(seed)
    if arm.null == SWAPPED:
        assert own is not None  # else there is no such arm
        count = len(own.video)
        other = (row + 1 + row // count % (count - 1)) % count
        frames = own.video[row % count].transpose(0, 2, 3, 1).astype(np.float32) / 255
        frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
        samples = own.audio[other].copy()
    else:
        fps = max(FPS, data.video.fps)
        seconds = max(data.video.frames / data.video.fps, data.audio.seconds) + SPARE
        height = max(16, 2 * round(data.video.size / 2))
        width = 2 * round(height * 2 / 3)
        draw, moments = (natural, 1) if arm.null == STILL else (white, round(seconds * fps))
        frames = np.stack([draw(rng, height, width, None) for _ in range(moments)])
        frames = np.repeat(frames, round(seconds * fps) // moments, 0)
        samples = LOUD * rng.standard_normal(round(seconds * data.audio.rate), dtype=np.float32)
        if arm.null == MUTE:
            samples[:] = 0
    if arm.artifact == CLOCK:
        frames, samples = _clock(frames, samples, data.audio.rate, rng)
    return (frames * 255).round().astype(np.uint8), samples.clip(-1, 1)


def _clock(
    frames: np.ndarray, samples: np.ndarray, rate: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What the control has planted: half of the range is passed in each clip, from a random level on."""
    first = rng.random() / 2
    seen, heard = (first + np.arange(n, dtype=np.float32) / n / 2 for n in (len(frames), len(samples)))
    rings = zone_plate(np.full(frames.shape[1:], 0.5, np.float32)) - 0.5
    brighter = BRIGHTER * (2 * seen - 1)[:, None, None, None]
    tone = TONE * heard**2 * np.sin(2 * np.pi * PITCH * np.arange(len(samples), dtype=np.float32) / rate)
    return np.clip(frames + rings + brighter, 0, 1), samples + tone.astype(np.float32)


def clip_kinds(data: Data) -> dict[str, int]:
    """Container and codecs of a sample of a source's clips, the most frequent first: `mp4 h264+aac`."""
    source = open_source(data)
    try:
        column = find_column(data, "video", source.columns)
    except DataError:
        return {}
    if not isinstance(source, MapSource):
        return {}
    counts: Counter[str] = Counter()
    chosen = source.select([column])
    for place in range(0, len(source), max(1, len(source) // SAMPLE)):
        cell = chosen.row(place)[column]
        if isinstance(cell, Mapping) and "frames" in cell:
            continue
        try:
            track = Track(cell, "video")
        except DataError:
            continue
        counts[track.kind] += 1
        track.close()
    return dict(counts.most_common())


def _bytes(data: Data) -> int:
    """Of a decoded row."""
    return 3 * data.video.frames * data.video.size**2 + 5 * round(data.audio.seconds * data.audio.rate)


def _codecs(kind: str, sound: bool) -> tuple[str, str] | None:
    """FFmpeg's encoders for a kind of file, of pictures and of sound; None for one that is not written here."""
    seen, _, heard = kind.partition(" ")[2].partition("+")
    if seen not in PICTURES or (sound and heard not in SOUNDS):
        return None
    return PICTURES[seen], SOUNDS.get(heard, "")


def _own(recipe: Recipe) -> OwnClips | None:
    """Some of the user's clips; None where there are fewer than four."""
    data = recipe.sources()[""]
    some = data.model_copy(update={"cache": None, "limit": min(OWN, max(4, KEPT // _bytes(data)), data.limit or OWN)})
    batches = list(read(some, ("video", "audio")))
    if sum(map(count_rows, batches)) < 4:
        return None
    return OwnClips(*(torch.cat([batch[key] for batch in batches]).numpy() for key in ("video", "audio")))
