"""Permutation sets: mean distance the largest possible, smallest distance beyond the published sets'."""

from __future__ import annotations

import math
import time
from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from mmssl.ops import permutations as module
from mmssl.ops.permutations import permutation_set


def distances(orders: torch.Tensor) -> np.ndarray:
    """One a pair, computed by matrix products of indicator vectors: agreements of every pair at once."""
    shown = torch.nn.functional.one_hot(orders).flatten(1).double()
    agreeing = (shown @ shown.T)[tuple(torch.triu_indices(len(orders), len(orders), 1))]
    return orders.shape[1] - agreeing.numpy()


def largest_mean(count: int, tiles: int) -> float:
    """With counts of tiles at a place as even as can be: how many pairs must agree there."""
    q, rest = divmod(count, tiles)
    agreeing = rest * math.comb(q + 1, 2) + (tiles - rest) * math.comb(q, 2)
    return tiles * (1 - agreeing / math.comb(count, 2))


@pytest.mark.parametrize(
    ("count", "tiles", "smallest"),
    [
        (2, 9, 9),
        (24, 9, 7),
        (100, 9, 7),
        (504, 9, 7),
        (505, 9, 6),
        (1000, 9, 6),
        (1512, 9, 6),
        (2000, 9, 4),
        (2, 2, 2),
        (6, 3, 2),
        (4, 4, 4),
        (12, 4, 3),
        (24, 4, 2),
        (30, 6, 4),
        (100, 16, 13),
        (60, 25, 23),
    ],
)
def test_far_apart_and_balanced(count, tiles, smallest):
    orders = permutation_set(count, tiles)
    assert orders.shape == (count, tiles)
    assert orders.dtype == torch.int64
    assert torch.equal(orders.sort(1).values, torch.arange(tiles).expand(count, tiles))
    apart = distances(orders)
    assert apart.min() >= smallest  # so none is there twice
    assert apart.mean() == pytest.approx(largest_mean(count, tiles), abs=1e-12)
    often = torch.nn.functional.one_hot(orders).sum(0)
    assert set(often.unique().tolist()) <= {count // tiles, -(-count // tiles)}


def test_the_figures_of_the_literature():
    assert [round(largest_mean(n, 9), 4) for n in (100, 1000, 2000)] == [8.08, 8.008, 8.004]
    assert [round(distances(permutation_set(n)).mean(), 4) for n in (504, 1512)] == [8.0159, 8.0053]


def test_504_are_the_projective_group_of_the_field_of_8():
    # Sharply 3-transitive: each way to send three places to three tiles happens exactly once; closed under composition.
    group = permutation_set(504)
    for places in combinations(range(9), 3):
        images = {tuple(row) for row in group[:, places].tolist()}
        assert images == set(permutations(range(9), 3))
    known = {tuple(row) for row in group.tolist()}
    some = group[::41]
    assert {tuple(row) for a in some for row in a[group].tolist()} <= known


def test_no_larger_mean_is_possible():
    # All 3-subsets of the permutations of 3 tiles: the closed form is their maximum.
    every = torch.tensor(list(permutations(range(3))))
    best = max(distances(every[list(chosen)]).mean() for chosen in combinations(range(6), 4))
    assert best == pytest.approx(largest_mean(4, 3))


def test_fast_cached_and_safe_to_change():
    took = []
    for _ in range(3):
        module._permutation_set.cache_clear()
        module._blocks_of_pgl.cache_clear()
        start = time.process_time()
        first = permutation_set(100)
        took.append(time.process_time() - start)
    assert min(took) < 0.1
    expected = first.clone()
    first.zero_()
    assert torch.equal(permutation_set(100), expected)
    assert module._permutation_set.cache_info().hits == 1


@pytest.mark.parametrize(("count", "tiles"), [(25, 4), (1, 9), (3, 2), (2, 1)])
def test_refuses_what_there_is_not(count, tiles):
    with pytest.raises(ValueError, match="are possible"):
        permutation_set(count, tiles)
