"""A queue: vectors of earlier steps, which those of a step are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.ops.queue import enqueue


class Queue(nn.Module):
    """The last K vectors, at first random unit vectors; all state is buffers.

    What a step brings waits until the step is over, so that it is not compared with itself, whatever number of times
    its loss is computed.

    Args:
        size: K.
        width: D of the vectors.

    Attributes:
        rows: (K, D), in no order.
        pointer: int64, 0-dim, where the oldest is.
    """

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self._waiting: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def filled(self, rows: int, *entries: str) -> dict[str, int]:
        """For `Chance`: entries -> the steps until batches of so many rows have replaced all random vectors."""
        return dict.fromkeys(entries, -(-len(self) // rows))

    def put(self, vectors: Tensor) -> None:
        """Let (n, D) of all processes take the place of the oldest at the next `advance`; in training alone."""
        if self.training:
            self._waiting = vectors.detach()

    def advance(self) -> None:
        """After the step."""
        if self._waiting is not None:
            enqueue(self.pointer, [(self.rows, self._waiting)])
            self._waiting = None
