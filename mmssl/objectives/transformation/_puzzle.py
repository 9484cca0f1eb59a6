"""A task of tiles as a puzzle: which of its answers joins edges that continue each other?

Such a solver looks at nothing else. The audit asks it, because edges are the shortcut that these tasks are known for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIGHT, BELOW = 0, 1  # where the second tile of a joint lies, seen from the first


class Puzzle(NamedTuple):
    """Tiles, questions about them, and what each possible answer would join.

    Attributes:
        tiles: (B, K, 3, s, s).
        joints: int64 (B or 1, Q, A, J, 3): of each of the A answers to a question the J edges that it joins, as
            direction, tile and tile.
        answer: int64 (B, Q), the right one; -1 where none of the answers is right, and nothing is asked.
    """

    tiles: Tensor
    joints: Tensor
    answer: Tensor


def joints(direction: int, first: Tensor, second: Tensor) -> Tensor:
    """Numbers of tiles (...) and (...) -> (..., 3)."""
    return torch.stack([torch.full_like(first, direction), first, second], -1)


def solve(puzzle: Puzzle) -> Tensor:
    """The share of right answers of a row (B,), each answer being the one whose joined edges differ least."""
    costs = _differences(puzzle.tiles)
    direction, first, second = puzzle.joints.unbind(-1)
    row = torch.arange(len(costs), device=costs.device).view(-1, 1, 1, 1)
    answers = costs[row, direction, first, second].sum(-1).argmin(-1)
    asked = puzzle.answer >= 0
    return ((answers == puzzle.answer) & asked).sum(1) / asked.sum(1)


def _differences(tiles: Tensor) -> Tensor:
    """(B, 2, K, K): how badly the left edge of b continues the right one of a, and the upper of b the lower of a.

    Edges are gray, for each tile may have kept a channel of its own.
    """
    gray = tiles.float().mean(2)

    def squares(first: Tensor, second: Tensor) -> Tensor:
        return (first[:, :, None] - second[:, None]).square().mean(-1)

    return torch.stack([squares(gray[..., -1], gray[..., 0]), squares(gray[..., -1, :], gray[..., 0, :])], 1)
