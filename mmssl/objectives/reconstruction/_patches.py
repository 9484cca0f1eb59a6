"""Pictures as patches, and the transformer that predicts hidden ones; shared by the tasks that hide patches."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmssl.encoders.base import Features


class PatchDecoder(nn.Module):
    """MAE's decoder: visible tokens and mask tokens at their places, through transformer blocks, to pixels."""

    def __init__(self, dim: int, pixels: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(width)
        self.head = nn.Linear(width, pixels)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Features, seen: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of the visible patches -> pixels of the hidden ones, (B, M, d)."""
        tokens = self.embed(torch.cat([features.pooled[:, None], features.tokens], dim=1))
        positions = build_sincos2d_pos_embed(
            list(grid), tokens.shape[2], interleave_sin_cos=True, device=tokens.device, dtype=tokens.dtype
        )
        # Attention asks for no order: the visible patches come first and the hidden ones last.
        visible = torch.cat([tokens[:, :1], tokens[:, 1:] + positions[seen]], dim=1)
        x = torch.cat([visible, self.mask_token.to(tokens.dtype) + positions[hidden]], dim=1)
        pixels: Tensor = self.head(self.norm(self.blocks(x)[:, visible.shape[1] :]))
        return pixels


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Those at places `index` (B, n) among tokens (B, N, D): (B, n, D)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def patchify(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> patches in rows (B, N, p·q·C), within one: rows, columns, channels."""
    cut = pixels.unflatten(3, (-1, patch[1])).unflatten(2, (-1, patch[0]))
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for pictures of `shape`."""
    cut = patches.unflatten(1, (shape[0] // patch[0], -1)).unflatten(3, (*patch, -1))
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def standardize(patches: Tensor) -> Tensor:
    """Each patch (..., d) less its mean, over its (unbiased) standard deviation; one of a single value becomes 0."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
