"""Can a task on clips, or on clips and their sound, be answered where there is nothing to see or to hear?

Clips are made of noise and go through real files: encoder, container, decoder, crop and transform. Each frame is noise
of its own, or one frame stands still; the sound is noise or silence; or pictures and sounds are the user's own, each
pair from two clips. So no moment comes before another, and no sound belongs to what is seen, and what a small network
gets right above chance it knows from files or from the transform: what a codec does between key frames, the priming of
a sound's beginning, how long tracks are. Noise is also trained on in files of one kind and tested in those of another:
what is known of a codec does not carry over, and what is known of the transform does. And of tasks that say where they
cut, a network sees and hears that place alone. What is decoded, and the control in it, is in `mmssl.audit.clip_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch

from mmssl.audit.clip_rows import (
    MOVING,
    MUTE,
    POSITION,
    RECODED,
    STILL,
    SWAPPED,
    TO,
    TONE,
    Kept,
    Rows,
    blank,
    codecs_of,
    muted,
    noise_part,
    noise_rows,
    swapped_rows,
    with_clock,
)
from mmssl.audit.networks import stand_in
from mmssl.audit.nulls import CLOCK, Arm
from mmssl.audit.shortcuts import Finding, accuracy_of, judge, train_on, with_control
from mmssl.batch import Batch, count_rows
from mmssl.data.loader import Loader
from mmssl.errors import RecipeError
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws
from mmssl.recipe import Recipe

PAIRS_ONLY = (MUTE, SWAPPED)
USUAL = {True: "mp4 h264+aac", False: "mp4 h264"}
"""Of clips with sound, and without."""
OTHER = {True: ("avi mpeg4+aac", "webm vp9+opus"), False: ("avi mpeg4", "webm vp9")}
"""Codecs that are planted: of AVI files the first 50 ms of sound are priming."""
PERIOD = 16  # samples of the tone of a position
KINDS = 3  # of file that have an arm each
EARLY = 1 / 3  # of the steps, after which most clocks are found


class PositionAlone(Objective):
    """Mixed into a task that says where it cuts, by `start`: it sees and hears that, and nothing of what is there.

    With sound, each is a tone that is the louder the later it was cut, and what is seen is gray: a code on both sides
    would be the answer of a task that compares moments. Without, all frames are the brighter the later the first of
    them was: which of the clips is the first would be the answer of a task on order.
    """

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """The task's own, with another content."""
        inputs = super().transform(batch, draws)
        if "start" not in inputs:
            raise RecipeError(
                "the task does not say where in a clip it cuts, so that there is no arm of position alone"
            )
        level, sounds = inputs["start"] / batch["video"].shape[1], inputs.get("audio")
        gray = torch.full_like(level, 0.5) if sounds is not None else level
        shown = gray.flatten(1).amin(1) if gray.ndim > 1 else gray
        coded = {
            key: shown.view(-1, *[1] * (value.ndim - 1)).expand_as(value)
            for key, value in inputs.items()
            if value.ndim > 3  # pictures and clips
        }
        if sounds is not None:
            tone = TONE * torch.sin(2 * math.pi / PERIOD * torch.arange(sounds.shape[-1], device=sounds.device))
            coded["audio"] = (level.view(*level.shape, *[1] * (sounds.ndim - level.ndim)) * tone).expand_as(sounds)
        return inputs | coded


def reads_clips(objective: Objective) -> bool:
    """Whether a task reads clips, or clips and their sound, and nothing else."""
    return "video" in objective.needs and set(objective.needs) <= {"video", "audio"}


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
    task = stand_in(recipe, seed=seed)
    accuracy_of(task, _matched(task, batch_size))
    sound = "audio" in task.needs
    files = [kind for kind in kinds if codecs_of(kind, sound)][:KINDS] or [USUAL[sound]]
    other = next(kind for kind in (*files, *OTHER[sound]) if kind != files[0])
    arms = [Arm(MOVING, file) for file in files]
    arms += [Arm(MOVING, file) for file in OTHER[sound] if planted and file not in files]
    arms += [Arm(null, files[0]) for null in (STILL, *PAIRS_ONLY, POSITION) if sound or null not in PAIRS_ONLY]
    arms.append(Arm(RECODED, files[0] + TO + other))
    notes = [f"no arm has files of the kind {kind}, which are not written here" for kind in kinds if kind not in files]
    found: list[Finding] = []
    controls: dict[str, Finding] = {}
    moving: Rows | None = None
    for arm in arms:
        try:
            given = rows_of(recipe, arm, moving, rows, batch_size, seed, sound=sound)
            moving = moving or given  # the first arm is moving noise
            if arm.null == POSITION:
                next(_unseen(_position_alone(task), given.test, batch_size, batch_size, seed))
            if arm.null not in controls:
                controls[arm.null] = measure_control(recipe, arm, given, steps, batch_size, seed)
                found.append(controls[arm.null])
                report(found[-1])
            one = measure_clips(recipe, arm, given, steps, batch_size, seed)
        except RecipeError as error:
            notes.append(str(error))
            continue
        found.append(with_control(one, controls[arm.null]))
        report(found[-1])
    return found, notes


def rows_of(
    recipe: Recipe, arm: Arm, moving: Rows | None, rows: int, batch_size: int, seed: int, *, sound: bool
) -> Rows:
    """What an arm trains on and tests; but for noise and swapped clips that is made of the rows of `moving` noise.

    Raises:
        RecipeError: for pairs of too few clips.
    """
    if arm.null == SWAPPED:
        if (own := swapped_rows(recipe, rows)) is None:
            raise RecipeError("pairs of the user's own clips take four clips at least")
        return own
    if moving is None or arm.null in (MOVING, STILL):
        return noise_rows(recipe, arm, rows, batch_size, seed, sound=sound)
    if arm.null == RECODED:
        other = Arm(MOVING, arm.file.split(TO)[1])
        return moving._replace(test=noise_part(recipe, other, "test", rows, batch_size, seed, sound=sound))
    return muted(moving) if arm.null == MUTE else moving


def measure_control(recipe: Recipe, arm: Arm, rows: Rows, steps: int, batch_size: int, seed: int) -> Finding:
    """Of the rows of an arm with a clock in them; what is found early is looked for no longer, as arms are.

    Of `POSITION` the clock runs where nothing else is, so that moments are told by what stands still in the arm.
    """
    control = Arm(arm.null, arm.file, CLOCK)
    bare = blank(rows) if arm.null == POSITION else rows
    planted = with_clock(bare, recipe.sources()[""].audio.rate, seed)
    early = measure_clips(recipe, control, planted, max(1, round(EARLY * steps)), batch_size, seed)
    return early if early.verdict == "leaks" else measure_clips(recipe, control, planted, steps, batch_size, seed)


def _position_alone(objective: Objective) -> Objective:
    """The task, which sees and hears nothing but where it cuts."""
    objective.__class__ = type("PositionAlone", (PositionAlone, type(objective)), {})
    return objective


def _matched(objective: Objective, batch_size: int) -> int | None:
    """Rows among which a task finds the sound of what is seen, which are strangers here; None for other tasks."""
    return batch_size if objective.meets == "loss" and {"video", "audio"} == set(objective.needs) else None


def measure_clips(recipe: Recipe, arm: Arm, rows: Rows, steps: int, batch_size: int, seed: int) -> Finding:
    """What the task over small networks learns on one kind of clips; see `audit_clips`.

    Raises:
        RecipeError: where the task asks nothing of such clips.
    """
    objective = stand_in(recipe, seed=seed)
    if arm.null == POSITION and not arm.is_control:
        objective = _position_alone(objective)
    return measure_task_on_clips(objective, arm, rows, steps, batch_size, seed)


def measure_task_on_clips(
    objective: Objective, arm: Arm, rows: Rows, steps: int, batch_size: int, seed: int
) -> Finding:
    """`measure_clips` of a task as it is, over whatever networks it has."""
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
