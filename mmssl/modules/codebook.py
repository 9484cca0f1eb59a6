"""A codebook: numbers for vectors where a task predicts one of K codes; k-means makes it from the data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmssl.ops.clustering import balanced_kmeans, choose_centers, kmeans, nearest_center
from mmssl.ops.draws import mix_seed
from mmssl.ops.gather import gather


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
        sample = torch.cat(kept)[: points * len(self.centers)]
        start = self.centers
        if not self.counts.any():
            start = choose_centers(sample, len(self.centers), mix_seed(int(self.seed), "k-means++"))
        self._learn(sample, start, iterations)

    def _learn(self, sample: Tensor, start: Tensor, iterations: int) -> None:
        centers, counts = kmeans(sample, start, iterations, unit=self.unit)
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

    def _learn(self, sample: Tensor, start: Tensor, iterations: int) -> None:
        centers, offsets = balanced_kmeans(sample, start, iterations)
        self.centers.copy_(centers)
        self.offsets.copy_(offsets)
        self.counts.copy_(torch.bincount(self(sample), minlength=len(centers)))

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., D) -> codes int64 (...)."""
        points = vectors.flatten(0, -2).to(self.centers)
        return nearest_center(points, self.centers, self.offsets)[0].view(vectors.shape[:-1])
