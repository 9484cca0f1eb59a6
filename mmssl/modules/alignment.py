"""Networks that see picture and sound over time and say whether, or by how much, the two are apart."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmssl.ops.moments import STILL, correlation_over_lags

HEADS, DEPTH = 8, 3
"""Of `OffsetNetwork`, as in SparseSync."""
LAGS = 2
"""From one offset to the next, at which it correlates."""
SHARP, SMALL = 5.0, 0.01
"""Logit of a perfect correlation at first, and by what the transformer's are made small."""
TICKS = 100
"""Parts of a window in which positions count."""


class Fusion(nn.Module):
    """Tokens of both over time -> one logit for each sound.

    Args:
        video_dim: width of the video's tokens.
        audio_dim: width of the sound's tokens.
        width: of the layers.
    """

    def __init__(self, video_dim: int, audio_dim: int, width: int) -> None:
        super().__init__()
        self.norm_video, self.norm_audio = nn.LayerNorm(video_dim), nn.LayerNorm(audio_dim)
        self.layers = nn.Sequential(
            nn.Conv1d(video_dim + audio_dim, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, 1)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        """(B, t, Dv) and (B, S sounds, f, Da) -> (B, S)."""
        video, audio, number = self.norm_video(video), self.norm_audio(audio), audio.shape[1]
        sounds = F.adaptive_avg_pool1d(audio.flatten(0, 1).mT, video.shape[1]).mT.unflatten(0, (-1, number))
        both = torch.cat([video[:, None].expand(-1, number, -1, -1), sounds], dim=-1)
        over_time = self.layers(both.flatten(0, 1).mT).mean(-1)
        return self.head(over_time).view(-1, number)


class OffsetNetwork(nn.Module):
    """Tokens of both over time -> logits of offsets, by their correlation over lags and by a transformer.

    The logit of a class starts as the correlation at its lag, so that it says something before anything is learned. It
    is that of the tokens, in a common space, and that of how far each is from the mean of its window, which needs none.
    The transformer with a class token over all of them is that of Iashin et al. 2022, "Sparse in Space and Time", arXiv
    2210.07055, without the selectors that make long inputs short, as in its successor Synchformer. Its share of the
    logits is next to nothing at first. All tokens are on one clock.

    Args:
        video_dim: width of the video's tokens.
        audio_dim: width of the sound's tokens.
        width: of the transformer, a multiple of 8.
        offsets: how many there are to either side of 0.
        steps: length of the window, in steps from one offset to the next.
    """

    def __init__(self, video_dim: int, audio_dim: int, width: int, offsets: int, steps: float) -> None:
        super().__init__()
        self.number, self.reach = max(1, round(LAGS * steps)), LAGS * (offsets + 1)
        classes = 2 * offsets + 1
        self.video = nn.Sequential(nn.LayerNorm(video_dim), nn.Linear(video_dim, width))
        self.audio = nn.Sequential(nn.LayerNorm(audio_dim), nn.Linear(audio_dim, width))
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, HEADS, qkv_bias=True) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.lags = nn.Linear(2 * (2 * self.reach + 1), classes, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(SMALL)
            self.head.bias.zero_()
            lag, own = torch.arange(-self.reach, self.reach + 1), LAGS * torch.arange(-offsets, offsets + 1)
            near = (1 - (lag - own[:, None]).abs() / LAGS).clamp(min=0)
            self.lags.weight.copy_(SHARP * near.repeat(1, 2))

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        """(B, t, Dv) and (B, f, Da) -> (B, classes); a high class is a sound that is early."""
        sides = self.video(video), self.audio(audio)
        tokens = torch.cat([self.token.expand(len(video), -1, -1), *(side + _clock(side) for side in sides)], dim=1)
        seen, heard = (F.adaptive_avg_pool1d(side.mT, self.number).mT for side in sides)
        alike = correlation_over_lags(seen, heard, self.reach)
        at_once = correlation_over_lags(_outstanding(seen), _outstanding(heard), self.reach)
        logits: Tensor = self.lags(torch.cat([alike, at_once], dim=1)) + self.head(self.norm(self.blocks(tokens)[:, 0]))
        return logits


def _outstanding(tokens: Tensor) -> Tensor:
    """How far each token is from the mean of its window, next to the others: (B, n, D) -> (B, n, 1)."""
    squares = (tokens - tokens.mean(1, keepdim=True)).square().mean(2, keepdim=True)
    return (squares / (squares.mean(1, keepdim=True) + STILL) + STILL).sqrt()


def _clock(tokens: Tensor) -> Tensor:
    """Sines and cosines of the middle of each token's time, (n, width), the window being 100 long."""
    number, width = tokens.shape[1:]
    at = (torch.arange(number, device=tokens.device, dtype=tokens.dtype) + 0.5) * (TICKS / number)
    slow = torch.arange(width // 2, device=tokens.device, dtype=tokens.dtype) * (-math.log(1e4) / (width // 2))
    angles = at[:, None] * slow.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)
