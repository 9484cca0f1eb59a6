"""Codes, their counts, and one codebook on any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch import Tensor

from mmssl.modules.codebook import Codebook


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


@pytest.mark.long
def test_two_processes_make_the_codebook_of_one(tmp_path: Path, processes):
    processes(_process, (2, str(tmp_path)), 2)
    expected = _fitted().state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)
