"""The one answer to everything: what a task of targets that move has its error compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl.ops.gather import total

SHARE = 0.1  # of a step, after the tenth


class RunningMean(nn.Module):
    """The mean of targets (..., D) over the last steps, over all processes and micro-batches; zero at first.

    Args:
        dim: D.

    Attributes:
        value: (D,).
    """

    value: Tensor
    steps: Tensor
    seen: Tensor
    count: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(dim))
        self.register_buffer("steps", torch.zeros(()))
        # Targets of this step's micro-batches, until the mean moves.
        self.register_buffer("seen", torch.zeros(dim), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def see(self, targets: Tensor, valid: Tensor) -> None:
        """Add those of a micro-batch in training: of (..., D) the ones that are True in `valid` (...)."""
        if self.training:
            weight = valid[..., None].to(targets.dtype)
            self.seen.add_((targets * weight).flatten(0, -2).sum(0))
            self.count.add_(weight.sum())

    @torch.no_grad()
    def move(self) -> None:
        """Toward the mean of what this step saw; to be called after it, by all processes."""
        self.steps += 1
        share = (1 / self.steps).clamp(min=SHARE)
        self.value += share * (total(self.seen) / total(self.count).clamp(min=1) - self.value)
        self.seen.zero_()
        self.count.zero_()

    @staticmethod
    def ratio(own: Tensor, constant: Tensor) -> Tensor:
        """Mean over rows (B,) of an error over that of the constant answer, 1 where that has none, 0-dim."""
        return torch.where(constant > 0, own / constant.clamp(min=1e-12), 1.0).mean()
