"""A codebook: numbers for vectors where a task predicts one of K codes; k-means makes it from the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmssl.ops.clustering import ENTRIES, balanced_kmeans, choose_centers, kmeans, nearest_center
from mmssl.ops.draws import mix_seed
from mmssl.ops.gather import gather, process_share


class Codebook(nn.Module):
    """Vectors -> the number of the nearest of K centers, and back; random until `fit` is called.

    All state is buffers. The seed is drawn when built, so that it is a function of the run's.

    Args:
        codes: K.
        width: D of the vectors.
        unit: whether these are unit vectors, and centers shall be.

    Attributes:
        centers: (K, D).
        counts: int64 (K,), how many of the vectors that it was fitted to have each code; 0 before.
    """

    centers: Tensor
    counts: Tensor
    seed: Tensor

    def __init__(self, codes: int, width: int, *, unit: bool = False) -> None:
        super().__init__()
        self.unit = unit
        self.register_buffer("centers", torch.randn(codes, width))
        self.register_buffer("counts", torch.zeros(codes, dtype=torch.long))
        self.register_buffer("seed", torch.randint(2**62, ()))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], points: int = 64, iterations: int = 25) -> None:
        """k-means on the first vectors of `batches`, which are read no further than needed.

        A second call goes on from the centers there are, so that codes keep their meaning.

        Args:
            batches: (n, D) each, this process's share of a global batch; a vector with a NaN is left out. Every
                process has the same number of them.
            points: for each code; all there are where the batches end before.
            iterations: of Lloyd.

        Raises:
            ValueError: where there is no vector.
        """
        kept: list[Tensor] = []
        for batch in batches:
            everyone = gather(batch)
            kept.append(everyone[~everyone.isnan().any(1)].to(self.centers))
            if sum(map(len, kept)) >= points * len(self.centers):
                break
        if not sum(map(len, kept)):
            raise ValueError("a codebook cannot be fitted to no data")
        self._learn(torch.cat(kept)[: points * len(self.centers)], iterations)

    def _start(self, sample: Tensor, centers: Tensor, *number: int) -> Tensor:
        """Where to go on from: the `centers` there are, or as many points; `number` tells several clusterings apart."""
        if self.counts.any():
            return centers
        return choose_centers(sample, len(centers), mix_seed(int(self.seed), "k-means++", *number))

    def _learn(self, sample: Tensor, iterations: int) -> None:
        centers, counts = kmeans(sample, self._start(sample, self.centers), iterations, unit=self.unit)
        self.centers.copy_(centers)
        self.counts.copy_(counts)

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., D) -> codes int64 (...)."""
        return nearest_center(vectors.flatten(0, -2), self.centers)[0].view(vectors.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """int64 (...) -> their centers (..., D)."""
        return self.centers[codes]

    def log_shares(self) -> Tensor:
        """Log of how frequent each code is, (K,): counts, each with one added, so that none is impossible."""
        smoothed = (self.counts + 1).to(self.centers.dtype)
        return (smoothed / smoothed.sum()).log()

    def perplexity(self) -> Tensor:
        """The exponential of the entropy of the codes' shares, 0-dim: K where all are equally frequent."""
        log_shares = self.log_shares()
        return (-(log_shares.exp() * log_shares).sum()).exp()


class BalancedCodebook(Codebook):
    """One whose codes are about equally frequent: the nearest center after what is taken off each one's distances.

    Attributes:
        offsets: (K,), in squared distance.
    """

    offsets: Tensor

    def __init__(self, codes: int, width: int) -> None:
        super().__init__(codes, width)
        self.register_buffer("offsets", torch.zeros(codes))

    def _learn(self, sample: Tensor, iterations: int) -> None:
        centers, offsets = balanced_kmeans(sample, self._start(sample, self.centers), iterations)
        self.centers.copy_(centers)
        self.offsets.copy_(offsets)
        self.counts.copy_(torch.bincount(self(sample), minlength=len(centers)))

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., D) -> codes int64 (...)."""
        points = vectors.flatten(0, -2).to(self.centers)
        return nearest_center(points, self.centers, self.offsets)[0].view(vectors.shape[:-1])


class HierarchicalCodebook(Codebook):
    """One whose codes are the leaves of a tree: the vectors of each cluster are clustered again, level by level.

    A vector goes down by the nearest of a node's children, so that K codes take sums of the levels' distances and not
    products. Nodes are numbered level by level: the children of node `i` are `n * i` to `n * i + n - 1`.

    Args:
        levels: n of each level, children of a node; K is their product.
        width: D of the vectors.

    Attributes:
        branches: centers of all levels but the last, (n1 + n1 n2 + ..., D); those of the last are `centers`.
    """

    branches: Tensor

    def __init__(self, levels: Sequence[int], width: int) -> None:
        super().__init__(math.prod(levels), width)
        self.levels = tuple(levels)
        self.nodes = [math.prod(levels[: depth + 1]) for depth in range(len(levels))]
        self.register_buffer("branches", torch.randn(sum(self.nodes[:-1]), width))

    def _learn(self, sample: Tensor, iterations: int) -> None:
        nodes, parents = torch.zeros(len(sample), dtype=torch.long, device=sample.device), sample[:1]
        for depth, (children, centers) in enumerate(zip(self.levels, self._centers(), strict=True)):
            for node, own in enumerate(centers.split(children)):
                members = sample[nodes == node]
                # Vectors of fewer kinds than there are codes leave a node empty: its children are where it is.
                members = members if len(members) else parents[node : node + 1]
                own.copy_(kmeans(members, self._start(members, own, depth, node), iterations)[0])
            nodes, parents = self._children(sample, nodes, depth), centers
            if process_share()[1] > 1:  # all cluster the same members
                dist.broadcast(nodes, 0)
        self.counts.copy_(torch.bincount(nodes, minlength=len(self.centers)))

    def _centers(self) -> list[Tensor]:
        """Of each level, as views."""
        return [*self.branches.split(self.nodes[:-1]), self.centers]

    def _children(self, vectors: Tensor, nodes: Tensor, depth: int) -> Tensor:
        """The nearest child of each vector's node: (N, D), int64 (N,) -> int64 (N,)."""
        number = self.levels[depth]
        families = self._centers()[depth].unflatten(0, (-1, number))
        size = max(1, ENTRIES // families[0].numel())
        nearest = [
            (families[own] - some[:, None]).square().sum(2).argmin(1)
            for some, own in zip(vectors.split(size), nodes.split(size), strict=True)
        ]
        return number * nodes + torch.cat(nearest)

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., D) -> codes int64 (...)."""
        flat = vectors.flatten(0, -2).to(self.centers)
        nodes = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
        for depth in range(len(self.levels)):
            nodes = self._children(flat, nodes, depth)
        return nodes.view(vectors.shape[:-1])
