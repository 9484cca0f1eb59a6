"""Random numbers that depend on (seed, step, row of the global batch) and on nothing else.

Each process draws for the whole global batch and keeps its own rows. So the same recipe makes the same choices on one
process or four, and a resumed run makes those it would have made: there is no generator state to save.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def mix_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """Per-sample random numbers for one step; every method returns a tensor with this process's rows first.

    The n-th call of a step is a stream of its own, so calls must come in the same order on every process; they do when
    their number does not depend on the data.

    Args:
        seed: of the run.
        step: number of the optimizer step, from 0.
        rows: rows on this process, B.
        share: which share of the global batch this process holds, from 0.
        shares: number of processes; the global batch has `rows * shares` rows.
        device: where the numbers are drawn. CPU and CUDA generators differ; two runs on one kind of device agree.
        stream: name that keeps the numbers of several tasks apart.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        rows: int,
        *,
        share: int = 0,
        shares: int = 1,
        device: torch.device | str = "cpu",
        stream: str = "",
    ) -> None:
        self.seed, self.step, self.rows, self.share, self.shares, self.stream = seed, step, rows, share, shares, stream
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device)
        self._calls = 0

    def _keep(self, everyone: Tensor) -> Tensor:
        return everyone[self.share * self.rows : (self.share + 1) * self.rows]

    def _next(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], torch.Generator]:
        self._generator.manual_seed(mix_seed(self.seed, self.step, self.stream, self._calls))
        self._calls += 1
        return (self.rows * self.shares, *shape), self._generator

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Floats in [low, high), (B, *shape), in torch's default dtype."""
        size, generator = self._next(shape)
        return self._keep(torch.rand(size, generator=generator, device=self.device)) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """Standard normal floats, (B, *shape)."""
        size, generator = self._next(shape)
        return self._keep(torch.randn(size, generator=generator, device=self.device))

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        """int64 in [low, high), (B, *shape)."""
        size, generator = self._next(shape)
        return self._keep(torch.randint(low, high, size, generator=generator, device=self.device))

    def chance(self, probability: float, *shape: int) -> Tensor:
        """Bool, True with the given probability, (B, *shape)."""
        return self.uniform(*shape) < probability

    def permutations(self, n: int) -> Tensor:
        """One uniform permutation of 0..n-1 a row, int64 (B, n)."""
        return self.uniform(n).argsort(dim=1, stable=True)

    def named(self, stream: str) -> Draws:
        """The same rows with numbers of their own: one for each task of a combination."""
        return Draws(
            self.seed,
            self.step,
            self.rows,
            share=self.share,
            shares=self.shares,
            device=self.device,
            stream=f"{self.stream}/{stream}",
        )
