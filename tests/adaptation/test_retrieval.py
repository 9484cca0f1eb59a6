"""Recall at k: right items, ties, chance."""

from __future__ import annotations

import pytest
import torch

from mmssl.adaptation.retrieval import retrieve


def test_equals_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(30, 8, generator=generator)
    gallery = torch.randn(50, 8, generator=generator)
    gallery_ids = torch.arange(50) // 2
    query_ids = torch.randint(0, 25, (30,), generator=generator)
    got = retrieve(queries, gallery, query_ids, gallery_ids)
    order = (queries @ gallery.T).argsort(1, descending=True)
    for k, share in got.recall.items():
        expected = (gallery_ids[order[:, :k]] == query_ids[:, None]).any(1).double().mean()
        assert share == pytest.approx(expected.item())


def test_chance_is_that_of_a_random_order() -> None:
    got = retrieve(torch.zeros(1, 2), torch.zeros(40, 2), torch.zeros(1).long(), torch.arange(40) // 2, ks=(1, 10))
    assert got.chance[1] == pytest.approx(2 / 40)
    hits = [(torch.randperm(40)[:10] < 2).any().item() for _ in range(4000)]
    assert got.chance[10] == pytest.approx(sum(hits) / 4000, abs=0.03)


def test_ties_count_against_the_model() -> None:
    got = retrieve(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4), torch.arange(4), ks=(1, 4))
    assert got.recall == {1: 0.0, 4: 1.0}
    assert got.median_rank == 4


def test_a_query_without_an_answer_is_named() -> None:
    with pytest.raises(ValueError, match="query 1 has no right item"):
        retrieve(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([0, 9]), torch.arange(2))
