"""Do tiles show where they belong by edges that continue each other? A solver that looks at nothing else.

A small network misses this shortcut where a large one that trains for weeks may find it, so it is asked by hand: the
last line of pixels of a tile is compared with the first of every other. In noise that is a little out of focus nothing
else tells their places, and a gap of some pixels hides them; in 1/f² noise, as in photographs, large shapes reach over
any gap, which is what the task is about.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from mmssl.audit.nulls import Arm
from mmssl.audit.shortcuts import Finding, finding, small, unseen
from mmssl.batch import Batch
from mmssl.errors import RecipeError
from mmssl.objectives.transformation._puzzle import Puzzle, solve
from mmssl.recipe import Recipe

BLURRED = Arm("blurred")


@runtime_checkable
class CutsTiles(Protocol):
    """A task whose answer can be told from which edges it joins."""

    def puzzle(self, inputs: Batch) -> Puzzle:
        """The task's inputs as a puzzle."""
        ...


@torch.no_grad()
def edges(recipe: Recipe, arm: Arm = BLURRED, *, rows: int = 1024, seed: int = 0) -> Finding:
    """What the solver gets right of a jigsaw, or of the relative position of patches side by side (chance 1/4).

    There is no control: the solver is one where tiles touch.

    Args:
        recipe: of a task that cuts tiles; see `mmssl.audit.shortcuts.measure`.
        arm: kind of pictures.
        rows: pictures.
        seed: of pictures and draws.

    Raises:
        RecipeError: for any other task.
    """
    task = small(recipe, seed)
    if not isinstance(task, CutsTiles):
        raise RecipeError(f"edges are compared where tiles are laid; {type(task).__name__} cuts no tiles")
    puzzles = [task.puzzle(inputs) for inputs in unseen(recipe, task, arm, rows, seed)]
    right = torch.cat([solve(puzzle) for puzzle in puzzles])
    return finding(arm, right.mean().item(), 1 / puzzles[0].joints.shape[2], rows)
