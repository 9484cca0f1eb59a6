"""CIE Lab on the device, and Zhang's 313 colors.

Lab is that of scikit-image: sRGB, illuminant D65, 2° observer. Lightness L lies in 0..100; a (green to red) and
b (blue to yellow) of an sRGB color in -86.2..98.3 and -107.9..94.5.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_FROM_XYZ = np.linalg.inv(_TO_XYZ)
_WHITE = np.array([[0.95047], [1.0], [1.08883]])

# Rows of Zhang's published table `pts_in_hull`: lowest and highest b for each a from -90 to 100 in tens. They hold the
# 261 colors that sRGB rounded to tens has, and a border of 52; no rule makes them.
_ROWS = (
    *((50, 90), (20, 90), (0, 90), (-20, 90), (-30, 100), (-40, 100), (-50, 100), (-50, 100), (-60, 100), (-70, 100)),
    *(
        (-80, 90),
        (-80, 90),
        (-90, 90),
        (-100, 90),
        (-100, 80),
        (-110, 80),
        (-110, 80),
        (-110, 70),
        (-110, 70),
        (-90, 0),
    ),
)
# The plane of a and b is cut into cells, 88 by 88 of 2.5 by 2.5, to look up what may be near.
_REACH, _CELL = 110.0, 2.5


def rgb_to_lab(images: Tensor) -> Tensor:
    """Floats of sRGB in [0, 1], (..., 3, H, W) -> Lab, (..., 3, H, W)."""
    linear = torch.where(images > 0.04045, ((images.clamp(min=0) + 0.055) / 1.055) ** 2.4, images / 12.92)
    x, y, z = (
        torch.where(t > 0.008856, t.clamp(min=0.008856) ** (1 / 3), 7.787 * t + 16 / 116)
        for t in _mix(_TO_XYZ / _WHITE, linear)
    )
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Lab (..., 3, H, W) -> sRGB in [0, 1], (..., 3, H, W); colors outside of sRGB are clipped channel by channel."""
    light, a, b = lab.unbind(-3)
    y = (light + 16) / 116
    curve = torch.stack([y + a / 500, y, (y - b / 200).clamp(min=0)], -3)
    xyz = torch.where(curve > 0.2068966, curve**3, (curve - 16 / 116) / 7.787)
    linear = torch.stack(_mix(_FROM_XYZ * _WHITE.T, xyz), -3)
    # Powers are taken where they count and nowhere else: at 0 they have no gradient.
    power = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, power, 12.92 * linear).clamp(0, 1)


def _mix(matrix: np.ndarray, images: Tensor) -> list[Tensor]:
    one, two, three = images.unbind(-3)
    return [one * p + two * q + three * r for p, q, r in matrix.tolist()]


def color_bins() -> Tensor:
    """The 313 colors of Zhang et al. 2016 (arXiv 1603.08511, section 2.2): their a and b, float (313, 2)."""
    table = [
        (a, b) for a, (low, high) in zip(range(-90, 101, 10), _ROWS, strict=True) for b in range(low, high + 1, 10)
    ]
    return torch.tensor(table, dtype=torch.get_default_dtype(), device="cpu")


def bins_nearby(bins: Tensor, neighbors: int) -> Tensor:
    """For each cell of the plane, all bins that can be among the nearest of a color in it, int64 (cells, C).

    Of 313 bins 17 are left for 10 neighbors.
    """
    line = torch.arange(-_REACH, _REACH, _CELL, device="cpu") + _CELL / 2
    apart = (torch.cartesian_prod(line, line)[:, None] - bins).abs()
    closest = (apart - _CELL / 2).clamp(min=0).norm(dim=-1)
    farthest = (apart + _CELL / 2).norm(dim=-1)
    # One is out where so many others are nearer wherever in the cell the color is.
    possible = closest <= farthest.topk(neighbors, largest=False).values[:, -1:]
    return closest.topk(int(possible.sum(1).max()), largest=False).indices


def soft_encode(
    ab: Tensor, bins: Tensor, nearby: Tensor, *, neighbors: int = 10, sigma: float = 5.0
) -> tuple[Tensor, Tensor]:
    """Spread each color over its nearest bins, with a Gaussian of the distance.

    The paper's text says 5 neighbors; its code, and its author asked about it, 10.

    Args:
        ab: (B, 2, h, w), from -110 to 110.
        bins: (Q, 2).
        nearby: of `bins_nearby` for this number of neighbors.
        neighbors: K, bins a color is spread over.
        sigma: of the Gaussian, in units of Lab.

    Returns:
        int64 (B, K, h, w), which bins, nearest first; (B, K, h, w), their shares, of sum 1.
    """
    last = round(2 * _REACH / _CELL) - 1
    a, b = ((ab + _REACH) / _CELL).long().clamp(0, last).unbind(1)
    candidates = nearby[a * (last + 1) + b]
    squares = (ab.movedim(1, -1)[..., None, :] - bins[candidates]).square().sum(-1)
    squares, order = squares.topk(neighbors, largest=False)
    weight = torch.exp(-squares / (2 * sigma**2))
    share = weight / weight.sum(-1, keepdim=True)
    return candidates.gather(-1, order).movedim(-1, 1), share.movedim(-1, 1)


def annealed_mean(logits: Tensor, bins: Tensor, *, temperature: float = 0.38) -> Tensor:
    """One color from a distribution: the mean after sharpening it (Zhang et al. 2016, equation 5).

    Between the mean (temperature 1), which is grayish, and the mode (0), which is patchy.

    Args:
        logits: (B, Q, h, w); log of the distribution, up to a constant.
        bins: (Q, 2).
        temperature: divides the logits.

    Returns:
        ab, (B, 2, h, w).
    """
    return torch.einsum("bqhw,qc->bchw", (logits / temperature).softmax(1), bins)


def as_floats(images: Tensor) -> Tensor:
    """Images as floats in [0, 1]: bytes are divided by 255, floats stay as they are."""
    return images / 255 if images.dtype == torch.uint8 else images
