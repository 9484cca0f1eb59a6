"""Projection and prediction heads."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp(
    *widths: int, norm: bool = True, bias: bool = True, last_bias: bool = False, last_norm: bool = False
) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between them, as self-supervised papers project and predict.

    Args:
        *widths: of the input, of each hidden layer, of the output.
        norm: whether a BatchNorm follows each hidden layer.
        bias: of the hidden layers.
        last_bias: of the last one.
        last_norm: whether a BatchNorm without scale and shift follows the last layer.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after, bias=bias), *([nn.BatchNorm1d(after)] if norm else []), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    return nn.Sequential(*layers, *([nn.BatchNorm1d(widths[-1], affine=False)] if last_norm else []))
