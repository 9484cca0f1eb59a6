"""How close a sound is to the one that was mixed in, and the mask that would take it out of a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-8


def si_sdr(found: Tensor, truth: Tensor) -> Tensor:
    """Scale-invariant ratio of signal to distortion in dB (Le Roux et al. 2019, arXiv 1811.02508, equation 4).

    10 log10(|s|² / |s - found|²) with s = truth · <found, truth> / |truth|², that part of `found` which is the truth at
    any loudness. No mean is removed.

    Args:
        found: (..., S).
        truth: (..., S).

    Returns:
        (...).
    """
    scale = (found * truth).sum(-1, keepdim=True) / (truth.square().sum(-1, keepdim=True) + TINY)
    part = scale * truth
    return 10 * torch.log10((part.square().sum(-1) + TINY) / ((found - part).square().sum(-1) + TINY))


def unit_loudness(sound: Tensor) -> Tensor:
    """(..., S) with a root mean square of 1; silence stays silence."""
    return sound / (sound.square().mean(-1, keepdim=True).sqrt() + TINY)


def ratio_mask(one: Tensor, other: Tensor) -> Tensor:
    """Share of the first of two magnitudes in their sum, in [0, 1]: the ideal mask of a mixture of the two."""
    return one / (one + other + TINY)
