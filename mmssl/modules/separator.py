"""A U-Net on the spectrogram of a mixture that is told, moment by moment, what is seen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOOR = 1e-4
"""Added to magnitudes before the logarithm; sounds of root mean square 1 have some of up to a hundred."""


class Separator(nn.Module):
    """Magnitudes of a mixture and features over time -> a mask.

    Features enter where the spectrogram is coarsest, resized to its moments and alike for all frequencies (Owens &
    Efros 2018, arXiv 1804.03641).

    Args:
        dim: of the features.
        width: channels of the finest level; each further one has twice as many.
        levels: how often the spectrogram is halved.
    """

    def __init__(self, dim: int, width: int, levels: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, own, 4, stride=2, padding=1), nn.GroupNorm(1, own), nn.ReLU())
            for before, own in zip([1, *widths], widths, strict=False)
        )
        self.norm, self.project = nn.LayerNorm(dim), nn.Linear(dim, widths[-1])
        self.up, given = nn.ModuleList(), 2 * widths[-1]
        for own in (*reversed(widths[:-1]), width):
            self.up.append(nn.Sequential(nn.Conv2d(given, own, 3, padding=1), nn.GroupNorm(1, own), nn.ReLU()))
            given = 2 * own  # the next one sees what was there on the way down, too
        self.head = nn.Conv2d(width + 1, 1, 3, padding=1)

    def forward(self, magnitude: Tensor, features: Tensor) -> Tensor:
        """(B, F, T) and (B, t, dim) -> mask (B, F, T) in [0, 1]."""
        x = (magnitude + FLOOR).log()[:, None]
        sizes, skipped = [], [x]
        for layer in self.down:
            sizes.append(x.shape[-2:])
            x = layer(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)))
            skipped.append(x)
        seen = F.interpolate(self.project(self.norm(features)).mT, x.shape[-1], mode="linear", align_corners=False)
        x = torch.cat([x, seen[:, :, None].expand(-1, -1, x.shape[-2], -1)], dim=1)
        for layer, size, before in zip(self.up, reversed(sizes), reversed(skipped[:-1]), strict=True):
            x = torch.cat([layer(F.interpolate(x, size)), before], dim=1)
        return self.head(x)[:, 0].sigmoid()
