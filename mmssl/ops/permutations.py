"""Sets of permutations that differ from each other in as many places as can be.

A set is made of blocks: a permutation and its n images under a group that takes any tile to any other, such as the
shifts. In a block every tile is once at every place, so whole blocks and a part of one more put each tile at each
place floor(N / n) or ceil(N / n) times. That is what makes the mean Hamming distance the largest that N permutations
can have,

    n * (1 - (rest * C(q + 1, 2) + (n - rest) * C(q, 2)) / C(N, 2))        with q = N // n, rest = N % n

which is 8.0800, 8.0080 and 8.0040 for 100, 1000 and 2000 permutations of 9 tiles. What is left to choose is the
smallest distance. The published sets (Noroozi & Favaro 2016; Goyal et al. 2019) have such means and a smallest distance
of 2: classes that differ by one swap.

Blocks come as cosets of a group, chosen one by one, the one furthest from those there are first. Nine tiles are the
points of the projective line over the field of 8 elements, and PGL(2,8), which moves them, is sharply 3-transitive and
contains the shifts: its 504 permutations agree in at most 2 places. The cosets found after it make 1512 that agree in
at most 3, as PΓL(2,8) does. For other numbers of tiles the group is that of the blocks alone.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.int64]

# Point i is the ratio w^i, with w of order 63 in the field of 64 elements: 1 -> 1, w -> w^28 leaves points 0 and 1.
_HOMOTHETY = (0, 1, 3, 7, 2, 4, 5, 8, 6)
_SAMPLED = 1 << 12


def permutation_set(count: int, tiles: int = 9) -> Tensor:
    """`count` different permutations of 0..tiles-1, far apart, and the same on every call.

    Args:
        count: N, from 2 to tiles!.
        tiles: n, at least 2.

    Returns:
        int64 (N, n). The mean Hamming distance is the largest possible. The smallest is, for 9 tiles, 7 or more up to
        N = 504, 6 up to 1512, 4 up to 8000.

    Raises:
        ValueError: where there are not so many permutations.
    """
    if tiles < 2 or not 2 <= count <= math.factorial(tiles):
        there = math.factorial(max(tiles, 0))
        raise ValueError(f"{count} permutations of {tiles} tiles: from 2 to {there} are possible")
    return torch.from_numpy(_permutation_set(count, tiles).copy())


@cache
def _permutation_set(count: int, tiles: int) -> Rows:
    place, step = np.arange(tiles), np.arange(tiles)[:, None]
    # Any group of n permutations that takes a place to every place will do; for 4, 8, 16 this one gets further.
    shifts = place ^ step if tiles & (tiles - 1) == 0 else (place + step) % tiles
    if tiles == 9:
        group = _blocks_of_pgl()
        # The group moves any three points to any three others in one way: a coset has one member that leaves 0, 1, 2.
        cosets = _arrangements(3, 9)
    else:
        group = shifts
        cosets = _arrangements(1, tiles) if tiles < 9 else _sample(tiles, -(-count // tiles))
    chosen = _spread(group, cosets, -(-count // len(group)))
    return group[:, chosen].swapaxes(0, 1).reshape(-1, tiles)[:count]


@cache
def _blocks_of_pgl() -> Rows:
    """PGL(2,8) on 9 points, block by block: (504, 9)."""
    found = {tuple(range(9)): None}
    waiting = list(found)
    for block in waiting:
        for places in ((*range(1, 9), 0), _HOMOTHETY):
            moved = tuple((block[place] - block[places[0]]) % 9 for place in places)
            if moved not in found:
                found[moved] = None
                waiting.append(moved)
    return ((np.array(waiting)[:, None] + np.arange(9)[:, None]) % 9).reshape(-1, 9)


def _arrangements(still: int, tiles: int) -> Rows:
    """All permutations that leave the first `still` tiles where they are."""
    rest = np.array(list(permutations(range(still, tiles))), dtype=np.int64)
    return np.concatenate([np.tile(np.arange(still), (len(rest), 1)), rest], axis=1)


def _sample(tiles: int, blocks: int) -> Rows:
    """Some permutations that leave tile 0 where it is, where all would be too many."""
    scores = np.random.default_rng(0).random((max(_SAMPLED, 4 * blocks), tiles - 1))
    return np.unique(np.pad(scores.argsort(1) + 1, ((0, 0), (1, 0))), axis=0)


def _spread(group: Rows, cosets: Rows, count: int) -> Rows:
    """Representatives of `count` cosets, one by one the one furthest from those chosen, the first one first."""
    closest = np.full(len(cosets), group.shape[1] + 1)
    chosen = [0]
    while len(chosen) < count:
        agreeing = (group[:, cosets] == cosets[chosen[-1]]).sum(-1).max(0)
        np.minimum(closest, group.shape[1] - agreeing, out=closest)
        chosen.append(int(closest.argmax()))
    return cosets[chosen]
