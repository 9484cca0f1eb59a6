"""At which rank is the right item? Ranks, recall at k and the level of a random order, chunk by chunk.

Several items may be right for a query; the best of them counts, so that R@k is the share of queries with a right item
among the first k. A tie counts against the model: a wrong item with the score of the right one comes before it, and a
constant model gets nothing. Memory grows with the gallery, not with queries times gallery.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse.csgraph
import torch
from scipy import sparse
from torch import Tensor

from mmssl.errors import RunError

CELLS = 2**22
"""Scores that are held at a time."""

Scorer = Callable[[int, int], Tensor]
"""First and last + 1 of some queries -> float32 (queries, gallery)."""

Matcher = Callable[[Tensor, Tensor], Tensor]
"""Numbers of queries and of items of the gallery, int64 (P,) each, -> float32 (P,)."""


@dataclass(frozen=True)
class Relation:
    """Which items of two sides belong together: those with a group in common.

    Attributes:
        a: (items, groups), not 0 where an item is of a group.
        b: likewise, the same groups.
    """

    a: sparse.csr_matrix
    b: sparse.csr_matrix

    @classmethod
    def of_rows(cls, a: Tensor, b: Tensor, group: Tensor) -> Relation:
        """From rows, int64 (R,) each: item of side `a`, item of side `b`, and the group that both are of."""
        groups, items = int(group.max()) + 1, (int(a.max()) + 1, int(b.max()) + 1)
        one = np.ones(len(group), dtype=np.float32)
        built = [
            sparse.csr_matrix((one, (item.numpy(), group.numpy())), shape=(number, groups))
            for item, number in zip((a, b), items, strict=True)
        ]
        return cls(*built)

    def transposed(self) -> Relation:
        """With `b` asking."""
        return Relation(self.b, self.a)

    def right(self, start: int, stop: int) -> Tensor:
        """Bool (stop - start, items of `b`): right for those items of `a`."""
        return torch.from_numpy((self.a[start:stop] @ self.b.T).toarray() > 0)

    def parts(self) -> Tensor:
        """Part of each item of `a`, int64 from 0; two parts share nothing, so they are independent trials."""
        memberships = sparse.vstack([self.a, self.b])
        blocks = sparse.bmat([[None, memberships], [memberships.T, None]])
        _, part = scipy.sparse.csgraph.connected_components(blocks, directed=False)
        return torch.from_numpy(part[: self.a.shape[0]]).unique(return_inverse=True)[1]


@dataclass(frozen=True)
class Ranking:
    """Where each query's best right item is.

    Attributes:
        rank: int64 (N,), from 1.
        right: int64 (N,), number of right items.
        gallery: number of items.
    """

    rank: Tensor
    right: Tensor
    gallery: int

    def recall(self, k: int) -> float:
        """Share of queries with a right item among the first k."""
        return (self.rank <= k).double().mean().item()

    @property
    def median(self) -> float:
        """Median rank; of an even number the mean of the middle two."""
        return statistics.median(self.rank.tolist())

    def chance(self) -> Tensor:
        """Recall at 1, 2, ... of a random order, float64 (gallery,), exactly."""
        place = torch.arange(self.gallery, dtype=torch.float64)
        total = torch.zeros(self.gallery, dtype=torch.float64)
        for number, queries in zip(*self.right.unique(return_counts=True), strict=True):
            # Draws without return miss every right item with the product of (M - r - j) / (M - j).
            miss = ((self.gallery - number - place) / (self.gallery - place)).clamp(min=0).cumprod(0)
            total += queries * (1 - miss)
        return total / len(self.right)


def by_vectors(queries: Tensor, gallery: Tensor) -> Scorer:
    """Inner products of (N, D) and (M, D).

    They are summed in double precision and rounded to single, so that equal vectors have equal scores wherever in the
    matrix they are: else the order of summation would break ties.
    """
    left, right = queries.double(), gallery.double().T
    return lambda start, stop: (left[start:stop] @ right).float()


def rank(
    score: Scorer,
    relation: Relation,
    *,
    match: Matcher | None = None,
    top: int = 0,
    cells: int = CELLS,
) -> Ranking:
    """Rank the items of `relation.b` for every item of `relation.a`.

    Args:
        score: the larger, the better.
        relation: what is right.
        match: orders the `top` best by `score` anew; the others stay after them.
        top: how many; 0 for none.
        cells: scores that are held at a time.

    Raises:
        RunError: where scores are not finite, for a comparison with NaN would count for the model.
        ValueError: where a query has no right item.
    """
    queries, gallery = relation.a.shape[0], relation.b.shape[0]
    step = max(1, cells // gallery)
    ranks, numbers = [], []
    for start in range(0, queries, step):
        scores, right = _finite(score(start, min(start + step, queries))), relation.right(start, start + step)
        number = right.sum(1)
        if not number.all():
            raise ValueError(f"query {start + int((number == 0).nonzero()[0])} has no right item in the gallery")
        ranks.append(_reranked(scores, right, match, top, start) if match and top else _rank(scores, right))
        numbers.append(number)
    return Ranking(torch.cat(ranks), torch.cat(numbers), gallery)


def _rank(scores: Tensor, right: Tensor) -> Tensor:
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~right).sum(1)


def _reranked(scores: Tensor, right: Tensor, match: Matcher, top: int, start: int) -> Tensor:
    # Wrong items first among equals: ties count against the model in the choice of candidates, too.
    order = right.byte().argsort(dim=1, stable=True)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
    best = order[:, :top]
    query = torch.arange(start, start + len(best))[:, None].expand_as(best)
    anew, found = _finite(match(query.flatten(), best.flatten())).view_as(best), right.gather(1, best)
    return torch.where(found.any(1), _rank(anew, found), _rank(scores, right))


def _finite(scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise RunError("scores of pairs are not finite: training diverged, or the network's precision is too low")
    return scores
