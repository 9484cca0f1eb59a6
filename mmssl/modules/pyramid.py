"""Feature pyramids: maps of one width at several resolutions, of a convolutional network or of a plain transformer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork


class Pyramid(nn.Module):
    """Maps of several depths, a resolution each, from fine to coarse (Lin et al. 2017); torchvision's.

    Args:
        widths: depth -> channels of its map.
        width: of all levels.
    """

    def __init__(self, widths: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.network = FeaturePyramidNetwork(list(widths.values()), width, norm_layer=LayerNorm2d)

    def forward(self, maps: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Depth -> map (B, D, h, w) -> `0`, `1`, ... -> map (B, width, h, w)."""
        levels: Mapping[str, Tensor] = self.network(OrderedDict(maps))
        return OrderedDict((str(i), level) for i, level in enumerate(levels.values()))


class SimplePyramid(nn.Module):
    """One map enlarged and reduced (ViTDet, Li et al. 2022), for networks whose depths are of one resolution.

    Args:
        width_in: channels of the map.
        width: of all levels.
        scales: of the levels, from fine to coarse, powers of two from 4 down.
    """

    def __init__(self, width_in: int, width: int, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(*_rescaled(width_in, scale), *_convolutions(_width_at(width_in, scale), width))
            for scale in scales
        )

    def forward(self, maps: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """{depth: map (B, D, h, w)}, one of them -> `0`, `1`, ... -> map (B, width, scale * h, scale * w)."""
        (only,) = maps.values()
        return OrderedDict((str(i), level(only)) for i, level in enumerate(self.levels))


def _width_at(width: int, scale: float) -> int:
    return width // 4 if scale == 4 else width // 2 if scale == 2 else width


def _rescaled(width: int, scale: float) -> list[nn.Module]:
    if scale == 4:
        half = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        return [half, LayerNorm2d(width // 2), nn.GELU(), nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2)]
    if scale == 2:
        return [nn.ConvTranspose2d(width, width // 2, 2, stride=2)]
    return [] if scale == 1 else [Reduced(round(1 / scale))]


class Reduced(nn.Module):
    """The largest value of squares of `factor` x `factor` places; what is left at an edge is a square of its own."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, ceil(h / factor), ceil(w / factor))."""
        return F.max_pool2d(x, self.factor, ceil_mode=True)


def _convolutions(width_in: int, width: int) -> list[nn.Module]:
    first = nn.Conv2d(width_in, width, 1, bias=False)
    return [first, LayerNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)]
