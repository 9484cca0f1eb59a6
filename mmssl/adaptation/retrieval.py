"""Retrieval between the two sides of a pair: given an `a`, at which rank does its `b` stand?

Chunked over queries, so that memory grows with the gallery and not with its square. A tie counts against the model:
a wrong item with the score of the right one stands before it, so that a constant model gets nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1024


@dataclass(frozen=True)
class Retrieval:
    """Ranks of one direction.

    Attributes:
        recall: k -> share of queries with a right item among the k best.
        chance: k -> the same for a random order.
        median_rank: from 1.
        queries, gallery: their numbers.
    """

    recall: dict[int, float]
    chance: dict[int, float]
    median_rank: float
    queries: int
    gallery: int


def retrieve(
    queries: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> Retrieval:
    """Rank the gallery for each query by inner product.

    Args:
        queries: (N, D).
        gallery: (M, D).
        query_ids: int64 (N,).
        gallery_ids: int64 (M,); an item is right for a query where their ids are equal, and several may be.
        ks: cut-offs.

    Raises:
        ValueError: where a query has no right item in the gallery.
    """
    ranks, misses = [], dict.fromkeys(ks, 0.0)
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ gallery.T
        right = query_ids[start : start + CHUNK, None] == gallery_ids
        if not right.any(1).all():
            row = start + int((~right.any(1)).nonzero()[0])
            raise ValueError(f"query {row} has no right item in the gallery")
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + ((scores >= best) & ~right).sum(1))
        for k in ks:
            # A random order misses with the probability that k draws without return find none of the right items.
            count, size = right.sum(1).double(), float(len(gallery))
            steps = torch.arange(min(k, len(gallery)), dtype=torch.float64, device=count.device)
            miss = ((size - count[:, None] - steps) / (size - steps)).clamp(min=0).prod(1)
            misses[k] += miss.sum().item()
    rank = torch.cat(ranks)
    return Retrieval(
        recall={k: (rank <= k).double().mean().item() for k in ks},
        chance={k: 1 - misses[k] / len(queries) for k in ks},
        median_rank=rank.double().median().item(),
        queries=len(queries),
        gallery=len(gallery),
    )
