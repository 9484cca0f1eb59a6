"""The blocks of a network, and to compute their activations anew in the backward pass in place of keeping them.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. One way serves all libraries,
`torch.utils.checkpoint` around each block. Their own switches act in loops over blocks of their own, which here are
left out wherever tokens are, and none of them keeps BatchNorm from counting a batch twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from mmssl.modules.mode import repeating

# A stage is its blocks, where they hold this share of its weights and are of one kind; a block is not its parts.
MOST = 0.9


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """What a network has in rows: layers of a transformer, residual blocks of a convolutional network; maybe none.

    A block is a member of a `Sequential` or `ModuleList`, with two weight matrices or kernels at least.
    """
    found: list[nn.Module] = []
    for child in net.children():
        inner = blocks_of(child)
        if isinstance(net, nn.Sequential | nn.ModuleList) and _is_block(child):
            of_one_kind = len({type(block) for block in inner}) == 1
            whole = of_one_kind and sum(map(_size, inner)) >= MOST * _size(child)
            found += inner if whole else [child]
        else:
            found += inner
    return list(dict.fromkeys(found))


def learning_blocks(net: nn.Module) -> list[nn.Module]:
    """Those of `blocks_of` that are trained: frozen networks and teachers keep no activations."""
    return [block for block in blocks_of(net) if any(parameter.requires_grad for parameter in block.parameters())]


def counts_batches(block: nn.Module) -> bool:
    """Whether a forward pass moves running statistics."""
    return any(isinstance(norm, _NormBase) and norm.track_running_stats for norm in block.modules())


def _is_block(module: nn.Module) -> bool:
    container = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return not container and sum(parameter.ndim > 1 for parameter in module.parameters()) > 1


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, blocks keep their inputs alone, and their activations are computed anew in the backward pass.

    The gradients have the same bits: dropout draws the same masks, and BatchNorm's running statistics move once.
    """
    blocks = list(blocks)
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own comes forth


def _forward(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    # No context where there is nothing to undo: torch.compile looks into none.
    again = repeating(block)
    contexts: dict[str, Any] = {"context_fn": lambda: (nullcontext(), again())} if counts_batches(block) else {}
    return checkpoint(forward, *inputs, use_reentrant=False, **contexts, **options)
