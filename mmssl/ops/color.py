"""CIE Lab on the device, and Zhang's 313 colours.

Lab is that of scikit-image: sRGB, illuminant D65, 2° observer. Lightness L lies in 0..100; a (green to red) and
b (blue to yellow) of an sRGB colour in -86.2..98.3 and -107.9..94.5.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_FROM_XYZ = np.linalg.inv(_TO_XYZ)
_WHITE = np.array([[0.95047], [1.0], [1.08883]])

# Rows of Zhang's published table `pts_in_hull`: lowest and highest b for each a from -90 to 100 in tens. They hold the
# 261 colours that sRGB rounded to tens has, and a border of 52; no rule makes them.
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
# Colours whose distances to all bins are held at once.
_TOGETHER = 1 << 17


def rgb_to_lab(images: Tensor) -> Tensor:
    """Floats of sRGB in [0, 1], (..., 3, H, W) -> Lab, (..., 3, H, W)."""
    linear = torch.where(images > 0.04045, ((images.clamp(min=0) + 0.055) / 1.055) ** 2.4, images / 12.92)
    x, y, z = (
        torch.where(t > 0.008856, t.clamp(min=0.008856) ** (1 / 3), 7.787 * t + 16 / 116)
        for t in _mix(_TO_XYZ / _WHITE, linear)
    )
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Lab (..., 3, H, W) -> sRGB in [0, 1], (..., 3, H, W); colours outside of sRGB are clipped channel by channel."""
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
    """The 313 colours of Zhang et al. 2016 (arXiv 1603.08511, section 2.2): their a and b, float (313, 2)."""
    table = [
        (a, b) for a, (low, high) in zip(range(-90, 101, 10), _ROWS, strict=True) for b in range(low, high + 1, 10)
    ]
    return torch.tensor(table, dtype=torch.get_default_dtype())


def soft_encode(ab: Tensor, bins: Tensor, *, neighbors: int = 10, sigma: float = 5.0) -> tuple[Tensor, Tensor]:
    """Spread each colour over its nearest bins, with a Gaussian of the distance.

    The paper's text says 5 neighbours; its code, and its author asked about it, 10.

    Args:
        ab: (B, 2, h, w).
        bins: (Q, 2).
        neighbors: K, bins a colour is spread over.
        sigma: of the Gaussian, in units of Lab.

    Returns:
        int64 (B, K, h, w), which bins, nearest first; (B, K, h, w), their shares, of sum 1.
    """
    points = ab.movedim(1, -1).reshape(-1, 2)
    found = [
        # Differences, not products: a row's bits must not depend on what else is in the batch.
        torch.cdist(part, bins, compute_mode="donot_use_mm_for_euclid_dist").topk(neighbors, largest=False)
        for part in points.split(_TOGETHER)
    ]
    distance, index = (
        torch.cat(parts).view(len(ab), *ab.shape[2:], neighbors).movedim(-1, 1) for parts in zip(*found, strict=True)
    )
    # The nearest bin's own distance taken off, shares stay finite however far a colour is.
    weight = torch.exp((distance[:, :1].square() - distance.square()) / (2 * sigma**2))
    return index, weight / weight.sum(1, keepdim=True)


def annealed_mean(logits: Tensor, bins: Tensor, *, temperature: float = 0.38) -> Tensor:
    """One colour from a distribution: the mean after sharpening it (Zhang et al. 2016, equation 5).

    Between the mean (temperature 1), which is grayish, and the mode (0), which is patchy.

    Args:
        logits: (B, Q, h, w); log of the distribution, up to a constant.
        bins: (Q, 2).
        temperature: divides the logits.

    Returns:
        ab, (B, 2, h, w).
    """
    return torch.einsum("bqhw,qc->bchw", (logits / temperature).softmax(1), bins)
