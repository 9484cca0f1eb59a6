"""Mixup and CutMix: each picture with another one of the global batch, one draw a row."""

from __future__ import annotations

import torch
from scipy.special import betaincinv
from torch import Tensor

from mmssl.ops.draws import Draws
from mmssl.ops.gather import gather


def draw_beta(draws: Draws, alpha: float) -> Tensor:
    """Beta(alpha, alpha), (B,) in torch's default dtype, by the inverse of its distribution function."""
    uniform = draws.uniform()
    return torch.from_numpy(betaincinv(alpha, alpha, uniform.double().cpu().numpy())).to(uniform)


def draw_partners(draws: Draws) -> Tensor:
    """For each row of this process another of the global batch, by one permutation of all, int64 (B,)."""
    everyone = gather(draws.uniform())
    return everyone.argsort()[draws.share * draws.rows :][: draws.rows]


def mixup(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Share * x + (1 - share) * other; Zhang et al. 2018, arXiv 1710.09412, section 2.

    Args:
        x: floats (B, ...).
        other: likewise.
        share: (B,), in [0, 1].
    """
    share = share.view(-1, *[1] * (x.ndim - 1))
    return share * x + (1 - share) * other


def cutmix(x: Tensor, other: Tensor, share: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """A box of the other picture in each; Yun et al. 2019, arXiv 1905.04899, equations 1 and 2.

    Its sides are sqrt(1 - share) of the picture's, its middle anywhere; what hangs over the border is cut off.

    Args:
        x: (B, ..., H, W).
        other: likewise.
        share: (B,) of `x` in the result, in [0, 1].
        center: (B, 2), of the box, in [0, 1): down, across.

    Returns:
        The pictures, and the share of `x` in each after the cut, (B,).
    """
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    half = (1 - share).sqrt() / 2
    for axis, extent in enumerate(x.shape[-2:]):
        middle = center[:, axis] * extent
        first, last = ((middle + side * half * extent).round().clamp(0, extent) for side in (-1, 1))
        place = torch.arange(extent, device=x.device)
        along = (place >= first[:, None]) & (place < last[:, None])
        inside = inside & (along[:, :, None] if axis == 0 else along[:, None])
    kept = 1 - inside.to(share.dtype).mean((1, 2))
    return torch.where(inside.view(len(x), *[1] * (x.ndim - 3), *inside.shape[1:]), other, x), kept


def mix_rows(x: Tensor, labels: Tensor, draws: Draws, *, by_mixup: float, by_cutmix: float) -> tuple[Tensor, Tensor]:
    """Pictures and labels of every row mixed with those of another; a coin decides where there are two ways.

    Args:
        x: floats (B, ..., H, W).
        labels: floats (B, width), mixed as their pictures are.
        draws: source of randomness.
        by_mixup: alpha of Mixup's Beta(alpha, alpha); 0 for none.
        by_cutmix: likewise.
    """
    partner = draw_partners(draws)
    other, other_labels = (gather(value)[partner] for value in (x, labels))
    coin = draws.uniform() < (by_mixup > 0) / ((by_mixup > 0) + (by_cutmix > 0))
    blended, share = x, torch.ones_like(labels[:, 0])
    if by_cutmix:
        blended, share = cutmix(x, other, draw_beta(draws, by_cutmix), draws.uniform(2))
    if by_mixup:
        drawn = draw_beta(draws, by_mixup).to(share.dtype)
        blended = torch.where(coin.view(-1, *[1] * (x.ndim - 1)), mixup(x, other, drawn), blended)
        share = torch.where(coin, drawn, share)
    return blended, mixup(labels, other_labels, share.to(labels.dtype))
