"""Networks that work in another way for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


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


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Undo what a forward pass does to the running statistics of norms: a batch that is repeated counts once."""
    norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    saved = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, buffers in zip(norms, saved, strict=True):
                for buffer, value in zip(norm.buffers(recurse=False), buffers, strict=True):
                    buffer.copy_(value)


def repeating(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which a forward pass of now can be repeated later, for its gradients.

    Norms that see groups of rows apart do so again, and running statistics stay as they are.
    """
    apart = {
        part: part.forward for part in module.modules() if isinstance(part, _BatchNorm) and "forward" in vars(part)
    }

    @contextmanager
    def again() -> Iterator[None]:
        for norm, forward in apart.items():
            norm.forward = forward  # type: ignore[method-assign]
        try:
            with frozen_statistics(module):
                yield
        finally:
            for norm in apart:
                del norm.forward

    return again


@contextmanager
def constant_scales(*modules: nn.Module) -> Iterator[None]:
    """Inside, LayerNorm takes the deviation that it divides by for a constant: the same values, other gradients.

    What is normalized may be longer or shorter and the output is the same, so that gradients have no part along it, and
    their product with it sums to nothing, however much it contributes. (Ali et al. 2022, "XAI for Transformers: Better
    Explanations through Conservative Propagation", arXiv 2202.07304.)
    """
    from timm.layers import LayerNorm  # which training does without

    norms = {part for module in modules for part in module.modules() if type(part) in (nn.LayerNorm, LayerNorm)}

    def constant(norm: nn.LayerNorm) -> None:
        def forward(x: Tensor) -> Tensor:
            variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
            found = (x - mean) / (variance + norm.eps).sqrt().detach()
            found = found if norm.weight is None else found * norm.weight
            return found if norm.bias is None else found + norm.bias

        norm.forward = forward  # type: ignore[method-assign, assignment]

    for norm in norms:
        constant(cast(nn.LayerNorm, norm))
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
