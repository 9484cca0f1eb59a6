"""What sees the order of frames, each of which a network of pictures saw alone."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from mmssl.encoders.base import attendable


class TemporalTransformer(nn.Module):
    """Pre-norm blocks of timm over the vectors of a clip's frames, at sinusoidal positions, and a last norm.

    The second encoder of Arnab et al. 2021, "ViViT", arXiv 2103.15691, section 3.3, model 2, here with the positions of
    Vaswani et al. 2017, arXiv 1706.03762, section 3.5, so that clips may have any number of frames.

    Args:
        width: of the vectors.
        depth: number of blocks.
        num_heads: of their attention, which divides `width`.
    """

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block, init_weights_vit_timm

        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(Block(width, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(width)
        self.apply(init_weights_vit_timm)

    def depths(self, frames: Tensor, seen: Tensor | None = None) -> dict[str, Tensor]:
        """What each block and the norm put out, (B, T, D) each, in that order; see `forward`."""
        found: dict[str, Tensor] = {}
        keys = None if seen is None else attendable(seen)[:, None, None]
        frames = frames + _positions(frames)
        for number, block in enumerate(self.blocks):
            frames = found[f"blocks.{number}"] = block(frames, attn_mask=keys)
        return found | {"norm": self.norm(frames)}

    def forward(self, frames: Tensor, seen: Tensor | None = None) -> Tensor:
        """Vectors (B, T, D) -> the same; frames that are not `seen`, bool (B, T), are attended to by none."""
        return self.depths(frames, seen)["norm"]


def _positions(frames: Tensor) -> Tensor:
    """(T, D): sines of the first half of the channels, cosines of the second."""
    number, width = frames.shape[1:]
    half = (width + 1) // 2
    rate = 10_000 ** (-torch.arange(half, device=frames.device) / half)
    angle = torch.arange(number, device=frames.device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width].to(frames.dtype)
