"""Prototypes: unit vectors that others are compared with, behind a small network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrototypeHead(nn.Module):
    """Three layers to unit vectors, and their cosine with each prototype: DINO's head (arXiv 2104.14294, appendix C).

    Prototypes have unit length: weight norm with its gain frozen at 1.

    Args:
        dim: width of what it reads.
        hidden: of its two hidden layers.
        bottleneck: of the unit vectors.
        prototypes: K.
        batch_norm: in the hidden layers.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (dim, hidden):
            layers += [nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] if batch_norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, pooled: Tensor, frozen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vectors (B, V, D) -> unit vectors (B, V, bottleneck) and logits (B, V, K).

        Where `frozen` (bool, 0-dim) is True the prototypes get a gradient of 0, which all processes can average.
        """
        weight = self.prototypes.weight
        if frozen is not None:
            weight = torch.where(frozen, weight.detach(), weight)
        hidden = self.mlp(pooled.flatten(0, 1)).to(weight.dtype)
        with torch.autocast(
            hidden.device.type, enabled=False
        ):  # a cosine in half precision, divided by 0.04, is coarse
            z = F.normalize(hidden, dim=-1)
            logits = F.linear(z, F.normalize(weight, dim=-1))
        return z.unflatten(0, pooled.shape[:2]), logits.unflatten(0, pooled.shape[:2])
