"""Can a task on clips, or on clips and their sound, be answered where there is nothing to see or to hear?

Clips are made of noise and go through real files: encoder, container, decoder, crop and transform. Each frame is noise
of its own, or one frame stands still; the sound is noise or silence; or pictures and sounds are the user's own, each
pair from two clips. So no moment comes before another, and no sound belongs to what is seen, and what a small network
gets right above chance it knows from files or from the transform: what a codec does between key frames, the priming of
a sound's beginning, how long tracks are. What is decoded, and the control in it, is in `mmssl.audit.clip_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from mmssl.audit.clip_rows import (
    MOVING,
    MUTE,
    STILL,
    SWAPPED,
    Kept,
    Rows,
    codecs_of,
    muted,
    noise_rows,
    swapped_rows,
    with_clock,
)
from mmssl.audit.nulls import CLOCK, Arm
from mmssl.audit.shortcuts import Finding, SmallNetwork, accuracy_of, judge, train_on, with_control
from mmssl.batch import Batch, count_rows
from mmssl.data.loader import Loader
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws
from mmssl.recipe import Recipe

PAIRS_ONLY = (MUTE, SWAPPED)
USUAL = {True: "mp4 h264+aac", False: "mp4 h264"}
"""Of clips with sound, and without."""
OTHER = {True: ("avi mpeg4+aac", "webm vp9+opus"), False: ("avi mpeg4", "webm vp9")}
"""Codecs that are planted: of AVI files the first 50 ms of sound are priming."""
KINDS = 3  # of file that have an arm each
EARLY = 1 / 3  # of the steps, after which most clocks are found


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
    files = [kind for kind in kinds if codecs_of(kind, sound)][:KINDS] or [USUAL[sound]]
    arms = [Arm(MOVING, file) for file in files]
    arms += [Arm(MOVING, file) for file in OTHER[sound] if planted and file not in files]
    arms += [Arm(null, files[0]) for null in (STILL, *PAIRS_ONLY) if sound or null not in PAIRS_ONLY]
    notes = [f"no arm has files of the kind {kind}, which are not written here" for kind in kinds if kind not in files]
    found: list[Finding] = []
    controls: dict[str, Finding] = {}
    first: Rows | None = None
    for arm in arms:
        if arm.null == SWAPPED:
            given = swapped_rows(recipe, rows)
        elif arm.null == MUTE:
            assert first is not None  # moving noise is the first arm
            given = muted(first)
        else:
            given = noise_rows(recipe, arm, rows, batch_size, seed, sound=sound)
        if given is None:
            notes.append("pairs of the user's own clips take four clips at least")
            continue
        first = first or given
        try:
            if arm.null not in controls:
                controls[arm.null] = _control(recipe, arm, given, steps, batch_size, seed)
                found.append(controls[arm.null])
                report(found[-1])
            one = measure_clips(recipe, arm, given, steps, batch_size, seed)
        except RecipeError as error:
            notes.append(str(error))
            continue
        found.append(with_control(one, controls[arm.null]))
        report(found[-1])
    return found, notes


def _control(recipe: Recipe, arm: Arm, rows: Rows, steps: int, batch_size: int, seed: int) -> Finding:
    """Of the rows of an arm with a clock in them; what is found early is looked for no longer, as arms are."""
    control = Arm(arm.null, arm.file, CLOCK)
    planted = with_clock(rows, recipe.sources()[""].audio.rate, seed)
    early = measure_clips(recipe, control, planted, max(1, round(EARLY * steps)), batch_size, seed)
    return early if early.verdict == "leaks" else measure_clips(recipe, control, planted, steps, batch_size, seed)


def _matched(objective: Objective, batch_size: int) -> int | None:
    """Rows among which a task finds the sound of what is seen, which are strangers here; None for other tasks."""
    return batch_size if objective.meets == "loss" and {"video", "audio"} == set(objective.needs) else None


def measure_clips(recipe: Recipe, arm: Arm, rows: Rows, steps: int, batch_size: int, seed: int) -> Finding:
    """What the task over small networks learns on one kind of clips; see `audit_clips`.

    Raises:
        RecipeError: where the task asks nothing of such clips.
    """
    objective = small_clips(recipe, seed)
    loader = cast(Loader, Kept(rows.train, batch_size, seed))
    train_on(objective, loader, steps=steps, batch_size=batch_size, seed=seed)
    # Whole batches of a task that matches: among fewer rows it is right more often.
    size = min(batch_size, count_rows(rows.test))
    matched = _matched(objective, size)
    stop = count_rows(rows.test) // size * size if matched else count_rows(rows.test)
    return judge(arm, objective, _unseen(objective, rows.test, size, stop, seed), matched=matched)


def _unseen(objective: Objective, rows: Batch, size: int, stop: int, seed: int) -> Iterator[Batch]:
    for step, start in enumerate(range(0, stop, size)):
        batch = {key: value[start : min(start + size, stop)] for key, value in rows.items()}
        yield objective.transform(batch, Draws(seed, step, count_rows(batch), stream="unseen"))
