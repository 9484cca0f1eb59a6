"""k-means against scikit-learn; empty clusters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.cluster import KMeans
from torch import Tensor

from mmssl.ops.clustering import choose_centers, kmeans, nearest_center


def _blobs(rows: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(6, 3, generator=generator, dtype=torch.float64) * 6
    which = torch.randint(0, 6, (rows,), generator=generator)
    return middle[which] + torch.randn(rows, 3, generator=generator, dtype=torch.float64), which


def test_from_the_same_start_it_is_scikit_learns():
    points, _ = _blobs()
    start = points[[0, 7, 33, 90, 150, 200, 301, 402]]
    centers, counts = kmeans(points, start, 300)
    oracle = KMeans(8, init=start.numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(points.numpy())
    np.testing.assert_allclose(centers.numpy(), oracle.cluster_centers_, rtol=1e-9)
    assert counts.tolist() == np.bincount(oracle.labels_, minlength=8).tolist()
    codes, distance = nearest_center(points, centers)
    assert codes.tolist() == oracle.labels_.tolist()
    assert float(distance.sum()) == pytest.approx(oracle.inertia_, rel=1e-9)
    # Cut short it is the same number of iterations.
    once, _ = kmeans(points, start, 1)
    by_hand = torch.stack([points[nearest_center(points, start)[0] == k].mean(0) for k in range(8)])
    torch.testing.assert_close(once, by_hand)


def test_the_start_finds_every_blob_and_prefers_what_is_far():
    points, which = _blobs()
    found = [
        set(which[nearest_center(c, points)[0]].tolist()) for c in (choose_centers(points, 6, s) for s in range(9))
    ]
    assert sum(len(blobs) for blobs in found) > 9 * 5  # six uniform draws would find 4 on average
    # The second of two, on a line: 0 twice, 1 and 3, so that from 0 they have the odds 1 : 9.
    line = torch.tensor([[0.0], [0.0], [1.0], [3.0]])
    second = [
        float(chosen[1]) for seed in range(2000) if float((chosen := choose_centers(line, 2, seed)[:, 0])[0]) == 0
    ]
    assert 0.0 not in second
    assert stats.binomtest(second.count(3.0), len(second), 0.9).pvalue > 1e-4


def test_a_center_without_points_moves_to_the_farthest():
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0], [30.0]])
    centers, counts = kmeans(points, torch.tensor([[0.4], [11.0], [99.0], [98.0]]))
    assert sorted(counts.tolist()) == [1, 1, 1, 2]
    assert float(nearest_center(points, centers)[1].sum()) == pytest.approx(0.5)  # of the two that share a center
    # Three points that differ are not enough for five centers, and that is no error.
    few = torch.tensor([[0.0], [1.0], [5.0]]).repeat(4, 1)
    centers, counts = kmeans(few, choose_centers(few, 5, 0))
    assert centers.isfinite().all()
    assert sorted(counts.tolist()) == [0, 0, 4, 4, 4]
