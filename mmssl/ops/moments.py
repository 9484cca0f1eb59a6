"""Moments of a clip: where its windows begin, which of their sounds cannot be told apart, and what moves together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.ops.draws import Draws

SILENT = 1e-4
"""Root mean square of a sound below which there is nothing to hear."""
STEADY = 0.01
"""A window whose loudness varies by less than this share of its level has no moments in it."""
STILL = 1e-4
"""Variance over time next to which that of a moving series, of layer-normalized tokens say, is large."""


def audible(sounds: Tensor) -> Tensor:
    """Which sounds (..., S) are loud enough to hear something, bool (...)."""
    return sounds.square().mean(-1).sqrt() > SILENT


def loudness(sounds: Tensor, per_frame: int) -> Tensor:
    """Root mean square of each frame, (..., S) -> (..., S / per_frame).

    Args:
        sounds: floats.
        per_frame: samples of a frame, of which S is a multiple.
    """
    return sounds.unflatten(-1, (-1, per_frame)).square().mean(-1).sqrt()


def sound_alike(windows: Tensor, threshold: float) -> Tensor:
    """Which windows of a row are loud at the same times, bool (B, n, n); each is like itself.

    Two are where the correlation of their loudness, to within a frame, is above the threshold. So copies are, whatever
    their level, such as the beats of a metronome; and so are two in which nothing begins or ends, as in silence.

    Args:
        windows: `loudness` (B, n, frames).
        threshold: above 0, below 1.
    """
    before = torch.cat([windows[..., :1], windows[..., :-1]], dim=-1)
    after = torch.cat([windows[..., 1:], windows[..., -1:]], dim=-1)
    smooth = (before + 2 * windows + after) / 4
    varying = smooth - smooth.mean(-1, keepdim=True)
    size = varying.norm(dim=-1, keepdim=True)
    steady = size <= STEADY * smooth.norm(dim=-1, keepdim=True)
    unit = varying / size.clamp(min=torch.finfo(size.dtype).tiny)
    return ((unit @ unit.mT > threshold) & ~steady) | (steady & steady.mT)


def correlation_over_lags(late: Tensor, early: Tensor, reach: int) -> Tensor:
    """How alike two series are where one is moved, at lags -reach to reach: (B, n, D) twice -> (B, 2 reach + 1).

    Both are taken less their means over time and divided by their standard deviations, of all D together; at a lag of k
    it is the sum of `late[t]` · `early[t - k]` over all t that both have, divided by n · D. So it is in [-1, 1], and 0
    or next to it where either stands still: 0.0001 is added to the variances.

    Args:
        late: floats; follows `early` by k where the coefficient at lag k is high.
        early: likewise.
        reach: largest lag, which may be longer than the series.
    """
    late, early = (x - x.mean(1, keepdim=True) for x in (late, early))
    late, early = (x / (x.square().mean((1, 2), keepdim=True) + STILL).sqrt() for x in (late, early))
    products = late @ F.pad(early, (0, 0, reach, reach)).mT / (late.shape[1] * late.shape[2])
    time = torch.arange(late.shape[1], device=late.device)[:, None]
    return products[:, time, time + torch.arange(2 * reach, -1, -1, device=late.device)].sum(1)


def draw_allowed(allowed: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """One of the True entries of each row, all with the same probability.

    Args:
        allowed: bool (B, N).
        draws: source of randomness, of which it takes one number a row.

    Returns:
        int64 (B,) entries, and bool (B,), False where there is none: what was drawn there says nothing.
    """
    so_far = allowed.cumsum(1)
    count = so_far[:, -1]
    rank = (draws.uniform() * count).long().minimum(count - 1).clamp(min=0)
    return torch.searchsorted(so_far, rank[:, None] + 1)[:, 0].clamp(max=allowed.shape[1] - 1), count > 0


def draw_apart(places: int, number: int, gap: int, draws: Draws) -> Tensor:
    """Places that are at least `gap` apart, ascending, int64 (B, number); all such sets have the same probability.

    Args:
        places: how many there are, at least (number - 1) · gap + 1.
        number: how many to draw.
        gap: 1 or more.
        draws: source of randomness.
    """
    free = places - (number - 1) * (gap - 1)
    chosen = draws.permutations(free)[:, :number].sort(dim=1).values
    return chosen + torch.arange(number, device=chosen.device) * (gap - 1)
