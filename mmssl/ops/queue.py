"""Queues of a fixed length, in which new rows take the place of the oldest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def enqueue(pointer: Tensor, queues: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put new rows in place of the oldest of queues that are filled together.

    Args:
        pointer: int64, 0-dim, where the oldest row is; moved on.
        queues: each a queue (K, ...) and its new rows (n, ...), of which the last K stay; any numbers.
    """
    size, count = len(queues[0][0]), len(queues[0][1])
    if not size:
        return
    kept = min(size, count)
    places = (pointer + torch.arange(count - kept, count, device=pointer.device)) % size
    for queue, rows in queues:
        queue[places] = rows[count - kept :].to(queue.dtype)
    pointer.copy_((pointer + count) % size)
