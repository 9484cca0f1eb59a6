"""Do two views of a row find each other by what was drawn, and not by what is seen? A batch of one row many times.

A task that compares random views tells rows apart by their content. Where a whole batch is one and the same row there
is none to tell, and the two views of a place in the batch are no more alike than those of two places, unless they share
a draw: a crop, a color, a moment. It is asked of the encoder's own vectors, how often the other view of the same place
is nearer than that of another place. The control has batches of rows that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mmssl.audit.networks import stand_in
from mmssl.audit.nulls import UNLIKE, Arm
from mmssl.audit.pairs import own_halves
from mmssl.audit.shortcuts import Finding, finding, train_on, with_control
from mmssl.batch import Batch, count_rows
from mmssl.data.loader import Loader
from mmssl.encoders import create as create_encoder
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import EMBEDDINGS, Objective
from mmssl.ops.draws import Draws, mix_seed
from mmssl.ops.losses import ranking
from mmssl.recipe import Recipe

TWINS = Arm("one own row many times", "as it is")
BATCHES = 32  # that are tested


class Twins:
    """Batches of one row, another one at each step; or of rows that differ.

    Args:
        rows: of all rows, on the CPU.
        batch_size: rows of a batch.
        seed: of which row.
        unlike: whether rows differ.
    """

    def __init__(self, rows: Batch, batch_size: int, seed: int, *, unlike: bool) -> None:
        self.rows, self.batch_size, self.seed, self.unlike = rows, batch_size, seed, unlike
        self.steps_per_epoch = max(1, count_rows(rows) // batch_size)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Those of steps `start` to `stop`."""
        count = count_rows(self.rows)
        for step in range(start, stop):
            rng = np.random.default_rng(mix_seed(self.seed, step))
            size = min(self.batch_size, count) if self.unlike else 1
            chosen = torch.from_numpy(rng.choice(count, size, replace=False))
            chosen = chosen if self.unlike else chosen.expand(self.batch_size)
            yield {key: value[chosen] for key, value in self.rows.items()}


def two_views(objective: Objective, inputs: Batch) -> Tensor | None:
    """Pooled vectors (B, 2, D) of two views of each row that should be alike; None where the task compares none."""
    pooled = [value for key, value in objective.drawn_together(inputs).items() if not key.endswith(EMBEDDINGS)]
    return pooled[0][:, :2] if pooled and pooled[0].shape[1] > 1 else None


def audit_twins(
    recipe: Recipe,
    needs: tuple[str, ...],
    *,
    steps: int = 150,
    batch_size: int = 16,
    rows: int = 256,
    seed: int = 0,
    report: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """The control, and batches of one row.

    Args:
        recipe: of a task that compares `two_views`, with one source.
        needs: of the task.
        steps: of each small training.
        batch_size: rows a step.
        rows: of the user's own, at most; half of them are for testing.
        seed: of rows, initialization and draws.
        report: called with each finding as soon as it is there.

    Raises:
        RecipeError: for several sources, or fewer than four rows.
    """
    stand_in(recipe, seed=seed, hearing=small_hearing)
    train, test = own_halves(recipe, needs, {}, rows)
    if count_rows(train) < 2:
        raise RecipeError(f"views of rows that differ take four rows, and there are {2 * count_rows(train)}")
    found: list[Finding] = []
    for arm in (Arm(TWINS.null, TWINS.file, UNLIKE), TWINS):
        objective = stand_in(recipe, seed=seed, hearing=small_hearing)
        given, asked = (
            Twins(part, batch_size, mix_seed(seed, name), unlike=arm.is_control)
            for part, name in ((train, "train"), (test, "test"))
        )
        one = measure_twins(objective, arm, given, asked, steps, seed)
        found.append(with_control(one, found[0]) if found else one)
        report(found[-1])
    return found


@torch.no_grad()
def _ranked(objective: Objective, asked: Twins, seed: int) -> tuple[float, int]:
    """How often the other view of the same row is the nearer one, and of how many rows."""
    right, count = 0.0, 0
    for step, batch in enumerate(asked.batches(0, BATCHES)):
        rows = count_rows(batch)
        views = two_views(objective, objective.transform(batch, Draws(seed, step, rows, stream="unseen")))
        assert views is not None  # of a task that compares them
        right += rows * ranking(views[:, 0], views[:, 1]).item()
        count += rows
    return right / count, count


def measure_twins(objective: Objective, arm: Arm, given: Twins, asked: Twins, steps: int, seed: int) -> Finding:
    """What the encoder of a task tells of views after a small training; see `audit_twins`."""
    train_on(objective, cast(Loader, given), steps=steps, batch_size=given.batch_size, seed=seed)
    share, count = _ranked(objective.eval(), asked, seed)
    return finding(arm, share, 0.5, count)


def small_hearing(rate: int) -> Encoder:
    """A small network of spectrograms, of which views are crops."""
    return create_encoder("timm/test_resnet", "audio", rate=rate, mels=32)
