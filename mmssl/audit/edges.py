"""Do tiles show where they belong by edges that continue each other? A solver that looks at nothing else.

A small network misses this shortcut where a large one that trains for weeks may find it, so it is asked by hand: the
last line of pixels of a tile is compared with the first of every other. In 1/f² noise nothing else tells their places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.audit.nulls import Arm
from mmssl.audit.shortcuts import Finding, finding, small, unseen
from mmssl.batch import Batch
from mmssl.errors import RecipeError
from mmssl.objectives.base import Objective
from mmssl.objectives.transformation.jigsaw import Jigsaw
from mmssl.objectives.transformation.relative_position import DIRECTIONS, RelativePosition
from mmssl.recipe import Recipe

NATURAL = Arm("natural")
SIDES = torch.tensor([DIRECTIONS.index(name) for name in ("right", "left", "below", "above")])


@torch.no_grad()
def edges(recipe: Recipe, arm: Arm = NATURAL, *, rows: int = 1024, seed: int = 0) -> Finding:
    """What the solver gets right of a jigsaw, or of the relative position of patches side by side (chance 1/4).

    There is no control: the solver is one where tiles touch, and 1/f² noise is what it needs.

    Args:
        recipe: of one of these tasks; see `mmssl.audit.shortcuts.measure`.
        arm: kind of pictures.
        rows: pictures.
        seed: of pictures and draws.

    Raises:
        RecipeError: for any other task.
    """
    task = small(recipe, seed)
    right = torch.cat([_solved(task, inputs) for inputs in unseen(recipe, task, arm, rows, seed)])
    chance = 1 / len(task.orders) if isinstance(task, Jigsaw) else 1 / len(SIDES)
    return finding(arm, right.mean().item(), chance, rows)


def _solved(task: Objective, inputs: Batch) -> Tensor:
    """Share of right answers, one a row."""
    if isinstance(task, Jigsaw):
        right, down = _distances(inputs["tiles"])
        place = task.orders.argsort(1).view(-1, task.grid, task.grid)  # order, place in the image -> place of the tile
        costs = right[:, place[:, :, :-1], place[:, :, 1:]].sum((2, 3))
        costs = costs + down[:, place[:, :-1], place[:, 1:]].sum((2, 3))
        return (costs.argmin(1) == inputs["order"]).float()
    if isinstance(task, RelativePosition):
        right, down = _distances(inputs["patches"])
        row = torch.arange(len(right))[:, None]
        a, b = inputs["pairs"].unbind(-1)
        costs = torch.stack([right[row, a, b], right[row, b, a], down[row, a, b], down[row, b, a]], -1)
        aside = torch.isin(inputs["direction"], SIDES)
        return ((SIDES[costs.argmin(-1)] == inputs["direction"]) & aside).sum(1) / aside.sum(1)
    raise RecipeError(f"edges are compared for jigsaw and relative_position; {type(task).__name__} cuts no tiles")


def _distances(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, K) twice: how badly the left edge of b continues the right one of a, and the upper of b the lower of a.

    Edges are gray, for each tile may have kept a channel of its own.
    """
    gray = tiles.float().mean(2)

    def squares(first: Tensor, second: Tensor) -> Tensor:
        return (first[:, :, None] - second[:, None]).square().mean(-1)

    return squares(gray[..., -1], gray[..., 0]), squares(gray[..., -1, :], gray[..., 0, :])
