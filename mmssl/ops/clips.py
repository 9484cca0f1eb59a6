"""Where in a clip something is taken from, and its frames there."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.ops.draws import Draws


def frames_until_still(video: Tensor) -> Tensor:
    """Number of frames (B,) up to the one that stays until the end of the row, counted once.

    A video that is shorter than its row holds its last picture (see `mmssl.media.video`), and so does a title at the
    end. A still says how far away the end is: tasks about time do not look at it.

    Args:
        video: (B, T, C, H, W), T at least 2.
    """
    changed = (video[:, 1:] != video[:, :-1]).flatten(2).any(2)
    return 1 + (changed * torch.arange(1, video.shape[1], device=video.device)).amax(1)


def draw_start(video: Tensor, span: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """A uniform place for `span` frames in the part of each row that moves.

    Args:
        video: (B, T, C, H, W), T at least `span` and 2.
        span: in frames.
        draws: source of randomness, of which it takes one number a row.

    Returns:
        int64 (B,), the first frame, and bool (B,), False where the part is too short: there the first frame is 0.
    """
    free = frames_until_still(video) - span
    return (draws.uniform() * (free.clamp(min=0) + 1)).long().minimum(free.clamp(min=0)), free >= 0


def frames_at(video: Tensor, places: Tensor) -> Tensor:
    """(B, T, C, H, W) at places int64 (B, ...) -> (B, ..., C, H, W)."""
    row = torch.arange(len(video), device=video.device).view(-1, *[1] * (places.ndim - 1))
    return video[row, places]


def draw_clip(video: Tensor, frames: int, draws: Draws) -> Tensor:
    """(B, T, C, H, W) -> `frames` of each row from a uniform place on, (B, frames, C, H, W), before its end is a still.

    A row without room for that gives its first frames.
    """
    start, _ = draw_start(video, frames, draws)
    return frames_at(video, start[:, None] + torch.arange(frames, device=video.device))
