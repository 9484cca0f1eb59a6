"""k-means over what all processes hold, and the codebook that it fills.

Lloyd 1982 from a k-means++ start (Arthur & Vassilvitskii 2007). Sums are taken over all processes, so that each has the
same centers and any number of them makes the same ones up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmssl.ops.draws import mix_seed
from mmssl.ops.gather import gather, process_share, total

ENTRIES = 2**24  # of the largest matrix of distances that is held at once


def nearest_center(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest center of each point, the first of several.

    Args:
        points: (N, D).
        centers: (K, D).

    Returns:
        int64 (N,), and the squared distances (N,).
    """
    half = centers.square().sum(1) / 2
    codes, scores = [], []
    for some in points.split(max(1, ENTRIES // len(centers))):
        score, code = (some @ centers.T - half).max(1)
        codes.append(code)
        scores.append(some.square().sum(1) - 2 * score)
    return torch.cat(codes), torch.cat(scores).clamp(min=0)


def choose_centers(points: Tensor, number: int, seed: int) -> Tensor:
    """k-means++: each next center is a point, drawn with a probability in proportion to its squared distance.

    Args:
        points: (N, D), the same on every process.
        number: K. Where fewer points differ, some centers are equal.
        seed: of the draws.

    Returns:
        (K, D), the same on every process.
    """
    generator = torch.Generator().manual_seed(seed)
    # Numbers from the CPU: the draws are those of any device.
    dice = torch.rand(number, generator=generator, dtype=torch.float64).to(points.device)
    chosen = (dice[:1] * len(points)).long()
    squared = points.square().sum(1)
    distance = points.new_full((len(points),), math.inf)
    for i in range(1, number):
        last = points[chosen[-1]]
        distance = torch.minimum(distance, (squared - 2 * (points @ last) + last.square().sum()).clamp(min=0))
        weight = distance.double().cumsum(0)
        # Where no point is left apart from the centers, any will do.
        weight = torch.where(weight[-1] > 0, weight, torch.arange(1.0, len(points) + 1, device=points.device))
        place = torch.searchsorted(weight, dice[i : i + 1] * weight[-1], right=True).clamp(max=len(points) - 1)
        chosen = torch.cat([chosen, place])
    centers = points[chosen]
    if process_share()[1] > 1:
        dist.broadcast(centers, 0)
    return centers


def kmeans(points: Tensor, centers: Tensor, iterations: int = 25) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations, until no point changes its center.

    A center without points moves to the point that is farthest from its own, if that has any distance.

    Args:
        points: (N, D), the same on every process, each of which works on a part of them.
        centers: (K, D) to begin with.
        iterations: at most so many.

    Returns:
        (K, D) centers, and the number of points of each, int64 (K,).
    """
    share, shares = process_share()
    size = math.ceil(len(points) / shares)
    own = points[share * size : (share + 1) * size]
    before = own.new_full((len(own),), -1, dtype=torch.long)
    codes, distance = nearest_center(own, centers)
    for _ in range(iterations):
        if not total((codes != before).sum()):
            break
        counts = total(torch.bincount(codes, minlength=len(centers)))
        sums = total(torch.zeros_like(centers).index_add_(0, codes, own))
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            far, far_distance = _farthest(own, distance, len(empty))
            centers[empty[: len(far)]] = torch.where(far_distance[:, None] > 0, far, centers[empty[: len(far)]])
        before, (codes, distance) = codes, nearest_center(own, centers)
    return centers, total(torch.bincount(codes, minlength=len(centers)))


def _farthest(own: Tensor, distance: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Of the points of all processes, up to `number` with the largest distances, and these."""
    # Every process sends the same number of rows; those that it has not got have no distance.
    rows = own.new_zeros(number, own.shape[1])
    distances = own.new_zeros(number)
    top = distance.topk(min(number, len(own)))
    rows[: len(top.indices)], distances[: len(top.indices)] = own[top.indices], top.values
    rows, distances = gather(rows), gather(distances)
    order = distances.argsort(descending=True, stable=True)[:number]
    return rows[order], distances[order]


class Codebook(nn.Module):
    """Vectors -> the number of the nearest of K centers, and back; random until `fit` is called.

    All state is buffers. The seed is drawn when built, so that it is a function of the run's.

    Args:
        codes: K.
        width: D of the vectors.

    Attributes:
        centers: (K, D).
        counts: int64 (K,), how often each code stood for one of the vectors that it was fitted to; 0 before.
    """

    centers: Tensor
    counts: Tensor
    seed: Tensor

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
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
        sample = torch.cat(kept)[: points * len(self.centers)]
        start = self.centers
        if not self.counts.any():
            start = choose_centers(sample, len(self.centers), mix_seed(int(self.seed), "k-means++"))
        centers, counts = kmeans(sample, start, iterations)
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
