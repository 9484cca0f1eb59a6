"""Momentum teachers: a copy of some modules that follows them slowly and learns nothing itself.

theta' <- m theta' + (1 - m) theta after each step (He et al. 2020, arXiv 1911.05722, equation 2). Only parameters
follow; the copy's BatchNorm keeps statistics of its own, from its own forward passes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def momentum_copy(module: Module) -> Module:
    """A copy whose parameters take no gradient; part of the state, so that checkpoints hold it."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module | Mapping[str, nn.Module], momentum: float) -> None:
    """Move every parameter of `teacher` toward that of the same name in `student`.

    Args:
        teacher: made by `momentum_copy`.
        student: the module that was copied, or its parts by name.
        momentum: m, the share of itself that the teacher keeps.
    """
    parts = student.items() if isinstance(student, Mapping) else [("", student)]
    leading = {
        f"{part}.{name}" if part else name: parameter
        for part, module in parts
        for name, parameter in module.named_parameters()
    }
    for name, own in teacher.named_parameters():
        own.lerp_(leading[name], 1 - momentum)


def cosine_momentum(start: float, progress: float) -> float:
    """From `start` at progress 0 to 1 at progress 1 along a cosine (BYOL, arXiv 2006.07733, section 3.2)."""
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2


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
