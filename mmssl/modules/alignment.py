"""Networks that see picture and sound over time and say whether, or by how much, the two are apart."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

HEADS, DEPTH = 8, 3
"""Of `OffsetNetwork`, as in SparseSync."""
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
    """Tokens of both over time -> logits of offsets, by a transformer with a class token over all of them.

    Iashin et al. 2022, "Sparse in Space and Time", arXiv 2210.07055, whose selectors, which make long inputs short, are
    left out, as in its successor Synchformer. Both kinds of tokens are on one clock.

    Args:
        video_dim: width of the video's tokens.
        audio_dim: width of the sound's tokens.
        width: of the transformer, a multiple of 8.
        classes: number of logits.
    """

    def __init__(self, video_dim: int, audio_dim: int, width: int, classes: int) -> None:
        super().__init__()
        self.video = nn.Sequential(nn.LayerNorm(video_dim), nn.Linear(video_dim, width))
        self.audio = nn.Sequential(nn.LayerNorm(audio_dim), nn.Linear(audio_dim, width))
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, HEADS, qkv_bias=True) for _ in range(DEPTH)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        """(B, t, Dv) and (B, f, Da) -> (B, classes)."""
        sides = [side + _clock(side) for side in (self.video(video), self.audio(audio))]
        tokens = self.blocks(torch.cat([self.token.expand(len(video), -1, -1), *sides], dim=1))
        logits: Tensor = self.head(tokens[:, 0])
        return logits


def _clock(tokens: Tensor) -> Tensor:
    """Sines and cosines of the middle of each token's time, (n, width), the window being 100 long."""
    number, width = tokens.shape[1:]
    at = (torch.arange(number, device=tokens.device, dtype=tokens.dtype) + 0.5) * (TICKS / number)
    slow = torch.arange(width // 2, device=tokens.device, dtype=tokens.dtype) * (-math.log(1e4) / (width // 2))
    angles = at[:, None] * slow.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)
