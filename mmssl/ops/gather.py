"""Collect rows from every process, with the gradient that accelerate's and torch's plain gathers drop.

Each process computes a loss of its own rows against everybody's; DistributedDataParallel then averages the gradients.
For that average to be the gradient of the full batch, the backward pass of the gather must *sum* what all processes
say about a row, not keep the local part (which is 1/W of it, or a wrong direction).

In half precision a process's own rows are rounded as all others are. What is computed of the gathered rows is then the
same on every process: statistics of the global batch (Barlow Twins, VICReg), where the loss is the average over the
processes, and queues of keys, which nothing synchronizes afterwards. The rows that ask, such as CLIP's queries, are not
gathered and stay exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_alone = ContextVar("_alone", default=False)
_sent = ContextVar[torch.dtype | None]("_sent", default=None)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process asks no other one: for what the main one does while the others wait."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def sent_as(dtype: torch.dtype) -> Iterator[None]:
    """Inside, `gather` sends floats, and their gradients back, in this precision: for losses, which gather features."""
    token = _sent.set(dtype)
    try:
        yield
    finally:
        _sent.reset(token)


def process_share() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where no process group is up, or this process works `alone`."""
    if not _alone.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_rows(rows: int, device: torch.device) -> Tensor:
    """Where this process's rows are among the gathered ones, int64 (rows,)."""
    return torch.arange(rows, device=device) + rows * process_share()[0]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sent: torch.dtype) -> Tensor:
        ctx.sent = sent
        rows = local.to(sent)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts).to(local.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (everyone,) = gradients
        summed = everyone.to(ctx.sent).contiguous()
        dist.all_reduce(summed)
        return summed.chunk(dist.get_world_size())[dist.get_rank()].to(everyone.dtype), None


def gather(local: Tensor, *, exact: bool = False) -> Tensor:
    """(B, ...) on each of W processes -> (W·B, ...) in order of rank, differentiable; the input itself where W is 1.

    Every process must hold the same number of rows and call this in the same order.

    Args:
        local: of any dtype.
        exact: whether floats travel as they are inside `sent_as`, too: statistics, which are few and whose sums cancel.
    """
    if process_share()[1] == 1:
        return local
    half = None if exact or not local.is_floating_point() else _sent.get()
    return _Gather.apply(local.contiguous(), half or local.dtype)


def total(value: Tensor) -> Tensor:
    """Sum over the processes, without gradient; the value itself on one process."""
    if process_share()[1] == 1:
        return value.detach()
    everyone = value.detach().clone()
    dist.all_reduce(everyone)
    return everyone


def average(value: Tensor) -> Tensor:
    """Mean over the processes, without gradient; the value itself on one process."""
    world = process_share()[1]
    return value.detach() if world == 1 else total(value) / world


def wait_for_everyone() -> None:
    """Go on when all processes are here."""
    if process_share()[1] > 1:
        dist.barrier()
