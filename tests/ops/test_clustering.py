"""k-means against scikit-learn; empty clusters; one codebook on any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import stats
from sklearn.cluster import KMeans
from torch import Tensor

from mmssl.ops.clustering import Codebook, choose_centers, kmeans, nearest_center


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


def _codebook(seed: int, codes: int = 6, width: int = 3) -> Codebook:
    torch.manual_seed(seed)
    return Codebook(codes, width).double()


def test_it_encodes_decodes_and_counts():
    points, _ = _blobs()
    book = _codebook(0)
    assert book.perplexity() == pytest.approx(6)
    assert book(points.view(20, 30, 3)).shape == (20, 30)
    book.fit(points.split(100), points=100)
    codes = book(points)
    assert torch.equal(book.counts, codes.bincount(minlength=6))
    assert (points - book.decode(codes)).square().sum(1).mean() < 3.5  # a blob's own variance is 3
    shares = (book.counts + 1).double() / 606
    torch.testing.assert_close(book.log_shares().exp(), shares)
    assert float(book.perplexity()) == pytest.approx(np.exp(stats.entropy(shares.numpy())))


def test_it_is_a_function_of_the_seed_and_a_second_fit_keeps_the_meaning_of_codes():
    points, _ = _blobs()
    one, same, other = _codebook(3), _codebook(3), _codebook(4)
    for book in (one, same, other):
        book.fit([points])
    assert torch.equal(one.centers, same.centers)
    assert not torch.equal(one.centers, other.centers)
    before = one(points)
    one.fit([points + 0.01])
    assert (one(points) == before).float().mean() > 0.99


def test_it_reads_no_more_than_it_needs_and_leaves_out_what_is_missing():
    points, _ = _blobs()
    read = []

    def batches():
        for i in range(6):
            read.append(i)
            some = points[100 * i : 100 * i + 100].clone()
            some[::2] = torch.nan
            yield some

    book = _codebook(0)
    book.fit(batches(), points=20)  # 120 points, 50 a batch
    assert read == [0, 1, 2]
    assert int(book.counts.sum()) == 120
    assert book.centers.isfinite().all()
    with pytest.raises(ValueError, match="no data"):
        book.fit([])


def _fitted(rank: int = 0, world: int = 1) -> Codebook:
    points, _ = _blobs()
    book = _codebook(1, codes=40)
    batches = points.view(4, 150, 3)
    size = 150 // world
    book.fit(list(batches[:, rank * size : (rank + 1) * size]), iterations=50)
    return book


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(_fitted(rank, world).state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_make_the_codebook_of_one(tmp_path: Path, processes):
    processes(_process, (2, str(tmp_path)), 2)
    expected = _fitted().state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)
