"""Networks that work in another way for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each part, frozen ones of a training network too, is in its own again."""
    before = {part: part.training for module in modules for part in module.modules()}
    for part in before:
        part.training = False
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


@contextmanager
def norms_apart(groups: int, *modules: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training sees each of `groups` equal parts of the rows by itself, in order.

    One pass of all rows then gives the values, gradients and running statistics of a pass a group.
    """
    norms = {part for module in modules for part in module.modules() if isinstance(part, _BatchNorm) and part.training}

    def apart(norm: nn.Module) -> None:
        whole = norm.forward

        def forward(x: Tensor) -> Tensor:
            return torch.cat([whole(part) for part in x.chunk(groups)])

        norm.forward = forward

    for norm in norms:
        apart(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
