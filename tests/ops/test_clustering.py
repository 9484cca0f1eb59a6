"""k-means against scikit-learn; empty clusters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.cluster import KMeans
from torch import Tensor

from mmssl.ops.clustering import balanced_kmeans, choose_centers, kmeans, nearest_center, sinkhorn


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


def test_a_transport_has_equal_rows_and_columns_and_is_that_of_a_written_out_loop():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    plan, factors = sinkhorn(scores, torch.zeros(5, dtype=torch.float64), 200)
    np.testing.assert_allclose(plan.sum(1).numpy(), 1 / 40)
    np.testing.assert_allclose(plan.sum(0).numpy(), 1 / 5)
    kernel, u, v = scores.exp().numpy(), np.ones(40), np.ones(5)
    for _ in range(200):
        u = (1 / 40) / (kernel @ v)
        v = (1 / 5) / (kernel.T @ u)
    np.testing.assert_allclose(plan.numpy(), u[:, None] * kernel * v)
    np.testing.assert_allclose(factors.exp().numpy(), v)


def test_balanced_centers_have_even_shares_where_those_of_kmeans_have_not():
    generator = torch.Generator().manual_seed(0)
    stretch = torch.tensor([3.0, 1, 1, 0.1], dtype=torch.float64)
    points = torch.randn(1200, 4, generator=generator, dtype=torch.float64) * stretch
    points = points / points.norm(dim=1, keepdim=True)
    start = choose_centers(points, 6, 0)
    _, counts = kmeans(points, start)
    centers, offsets = balanced_kmeans(points, start)
    even = torch.bincount(nearest_center(points, centers, offsets)[0], minlength=6)
    assert counts.max() > 1.4 * 200
    assert even.max() < 1.1 * 200
    assert even.min() > 0.9 * 200
    assert torch.isfinite(balanced_kmeans(points[:1].expand(20, -1), start)[1]).all()
