"""How well tokens are predicted by those who know only how frequent each is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl.ops.gather import total


class Unigram(nn.Module):
    """Counts of all tokens in earlier steps, of all processes: the best answer that does not look at the text.

    The tokens that are judged by it are not yet among the counts: no share is fitted to what it predicts. One is added
    to each count, so that before the first step all tokens are equally likely.

    Args:
        size: number of ids.
        kinds: how many of them can occur.
    """

    counts: Tensor

    def __init__(self, size: int, kinds: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))
        # No buffer: DistributedDataParallel would overwrite it with that of the first process at every forward pass.
        self._seen: Tensor | None = None

    def surprise(self, tokens: Tensor) -> Tensor:
        """Minus the logarithm of the probability of each token, in the shape of `tokens`."""
        floats = torch.get_default_dtype()
        return (self.counts.sum() + self.kinds).to(floats).log() - (self.counts[tokens] + 1).to(floats).log()

    def see(self, tokens: Tensor, counted: Tensor) -> None:
        """Remember this step's tokens until `update`; called again, it forgets the earlier.

        Args:
            tokens: int64, of any shape.
            counted: bool, of that shape, False for those that do not count.
        """
        weight = counted.flatten().to(self.counts.dtype)
        self._seen = torch.zeros_like(self.counts).scatter_add_(0, tokens.flatten(), weight)

    def update(self) -> None:
        """After the step: count what all processes have seen in it."""
        if self._seen is not None:
            self.counts += total(self._seen)
            self._seen = None
