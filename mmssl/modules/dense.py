"""Heads that answer for every pixel from feature maps of several depths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearMaps(nn.Module):
    """A linear map of normalized features at each place of each depth, enlarged to the finest of them and summed.

    That is a linear map of the enlarged maps side by side (a hypercolumn, Hariharan et al. 2015): enlarging is linear,
    too, and costs less of what has few channels. Normalization is BatchNorm's, as in DINOv2's probes.

    Args:
        widths: depth -> channels of its map.
        outputs: channels of the answer.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int) -> None:
        super().__init__()
        self.depths = tuple(widths)
        self.maps = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width, affine=False), start_small(nn.Conv2d(width, outputs, 1)))
            for width in widths.values()
        )

    def forward(self, maps: Mapping[str, Tensor], size: Sequence[int]) -> Tensor:
        """Depth -> map (B, D, h, w) -> (B, outputs, *size)."""
        finest = max((maps[depth].shape[-2:] for depth in self.depths), key=lambda extent: extent[0] * extent[1])
        found = [_enlarged(map_(maps[depth]), finest) for depth, map_ in zip(self.depths, self.maps, strict=True)]
        return _enlarged(torch.stack(found).sum(0), size)


class ConvolutionalMaps(nn.Module):
    """Maps of all depths to one width, enlarged to the finest and summed; two 3 x 3 convolutions; a linear map.

    Args:
        widths: depth -> channels of its map.
        outputs: channels of the answer.
        width: of the convolutions.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, width: int = 64) -> None:
        super().__init__()
        self.side = LinearMaps(widths, width)
        self.body = nn.Sequential(*(layer for _ in range(2) for layer in _convolution(width)))
        self.answer = start_small(nn.Conv2d(width, outputs, 1))

    def forward(self, maps: Mapping[str, Tensor], size: Sequence[int]) -> Tensor:
        """See `LinearMaps.forward`."""
        finest = max((one.shape[-2:] for one in maps.values()), key=lambda extent: extent[0] * extent[1])
        return _enlarged(self.answer(self.body(self.side(maps, finest))), size)


def start_small(linear: nn.Conv2d) -> nn.Conv2d:
    """With weights of N(0, 0.01^2) and without bias, so that all classes are about as likely at first (DINOv2)."""
    nn.init.normal_(linear.weight, std=0.01)
    assert linear.bias is not None
    nn.init.zeros_(linear.bias)
    return linear


def _convolution(width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()


def _enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
