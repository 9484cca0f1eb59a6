"""Projection and prediction heads."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import nn


def mlp(
    *widths: int,
    norm: bool = True,
    bias: bool = True,
    last_bias: bool = False,
    last_norm: Literal["plain", "scale"] | None = None,
) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between them, as self-supervised papers project and predict.

    Args:
        *widths: of the input, of each hidden layer, of the output.
        norm: whether a BatchNorm follows each hidden layer.
        bias: of the hidden layers.
        last_bias: of the last one.
        last_norm: BatchNorm after the last layer, `plain` without scale and shift, or `scale` without shift.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after, bias=bias), *([nn.BatchNorm1d(after)] if norm else []), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    if last_norm is not None:
        last = nn.BatchNorm1d(widths[-1], affine=last_norm == "scale")
        if last.affine:
            last.bias.requires_grad_(False)  # it stays 0: cuDNN's kernel asks for both or neither
        layers.append(last)
    return nn.Sequential(*layers)
