"""Codes, their counts, and one codebook on any number of processes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import stats
from sklearn.cluster import KMeans
from torch import Tensor

from mmssl.modules.codebook import Codebook, HierarchicalCodebook
from mmssl.ops.clustering import choose_centers
from mmssl.ops.draws import mix_seed

LEVELS = ((), (5, 6, 7))  # one level of 40, and nodes of a few points


def _blobs(rows: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(6, 3, generator=generator, dtype=torch.float64) * 6
    which = torch.randint(0, 6, (rows,), generator=generator)
    return middle[which] + torch.randn(rows, 3, generator=generator, dtype=torch.float64), which


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


def _tree(seed: int, levels: tuple[int, ...]) -> HierarchicalCodebook:
    torch.manual_seed(seed)
    return HierarchicalCodebook(levels, 3).double()


def test_a_tree_is_k_means_within_each_cluster_of_k_means():
    levels, (points, _) = (3, 4, 2), _blobs()
    book = _tree(0, levels)
    book.fit(points.split(100), points=100, iterations=100)
    codes, centers = np.zeros(len(points), dtype=int), []
    for depth, number in enumerate(levels):
        found, own = codes * number, []
        for node in range(math.prod(levels[:depth])):
            members = points[codes == node]
            start = choose_centers(members, number, mix_seed(int(book.seed), "k-means++", depth, node))
            by_hand = KMeans(number, init=start.numpy(), n_init=1, max_iter=100, tol=0).fit(members.numpy())
            found[codes == node] += by_hand.labels_
            own.append(by_hand.cluster_centers_)
        codes, centers = found, [*centers, np.array(own)]
    assert book(points).tolist() == codes.tolist()
    assert book.counts.tolist() == np.bincount(codes, minlength=24).tolist()
    np.testing.assert_allclose(book.decode(torch.arange(24)).numpy(), centers[-1].reshape(24, 3), rtol=1e-10)
    # Another vector goes down by the nearest child, which is not always on the way to the nearest leaf.
    others = torch.randn(200, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 6
    for vector, code in zip(others.numpy(), book(others).tolist(), strict=True):
        node = 0
        for own in centers:
            children = np.square(own[node] - vector).sum(1)
            node = node * len(children) + children.argmin()
        assert node == code
    assert (torch.cdist(others, book.centers).argmin(1) != book(others)).any()
    before = book(points)
    book.fit([points + 0.01])
    assert (book(points) == before).double().mean() > 0.98


def test_a_tree_of_more_codes_than_there_are_vectors_gives_these_back():
    vectors = torch.tensor([[0.0, 0, 0], [1, 0, 0], [9, 9, 9]], dtype=torch.float64)
    book = _tree(0, (4, 3, 2))
    book.fit([vectors.repeat(5, 1)])
    assert torch.equal(book.decode(book(vectors)), vectors)
    assert book.counts.sum() == 15
    assert book.centers.unique(dim=0).shape == (3, 3)


def _fitted(rank: int = 0, world: int = 1, levels: tuple[int, ...] = ()) -> Codebook:
    points, _ = _blobs()
    book = _tree(1, levels) if levels else _codebook(1, codes=40)
    batches = points.view(4, 150, 3)
    size = 150 // world
    book.fit(list(batches[:, rank * size : (rank + 1) * size]), iterations=50)
    return book


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save([_fitted(rank, world, levels).state_dict() for levels in LEVELS], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_make_the_codebook_of_one(tmp_path: Path, processes):
    processes(_process, (2, str(tmp_path)), 2)
    expected = [_fitted(levels=levels).state_dict() for levels in LEVELS]
    for rank in range(2):
        for found, one in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            for key, value in one.items():
                torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)
