"""Several modalities in one transformer: layers with norms for each of them, and a decoder of the patches of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmssl.encoders.base import attendable
from mmssl.modules.decoders import init_linears

TOGETHER = "together"
"""The kind of tokens that are those of all modalities, one after the other."""
_norm = partial(nn.LayerNorm, eps=1e-6)


class JointLayers(nn.Module):
    """Transformer blocks that read one modality, or all together, with norms of their own for each of these.

    Gong et al. 2023, "Contrastive Audio-Visual Masked Autoencoder", arXiv 2210.07839, section 3.2.

    Args:
        width: of the tokens.
        depth: number of blocks.
        heads: of their attention.
        kinds: names of what is read, for instance `TOGETHER`.
    """

    def __init__(self, width: int, depth: int, heads: int, kinds: Sequence[str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_JointBlock(width, heads, kinds) for _ in range(depth))
        self.norm = nn.ModuleDict({kind: _norm(width) for kind in kinds})
        init_linears(self)

    def forward(self, tokens: Tensor, kind: str, valid: Tensor | None = None) -> Tensor:
        """(B, N, width) -> the same; places where `valid` (B, N) is False are not attended to."""
        keys = None if valid is None else attendable(valid)[:, None, None, :]
        for block in self.blocks:
            tokens = block(tokens, kind, keys)
        normed: Tensor = self.norm[kind](tokens)
        return normed


class _JointBlock(nn.Module):
    """A block of a vision transformer, without its norms, between those of a kind."""

    def __init__(self, width: int, heads: int, kinds: Sequence[str]) -> None:
        super().__init__()
        block = Block(width, heads, qkv_bias=True)
        self.attn, self.mlp = block.attn, block.mlp
        self.norm1, self.norm2 = (nn.ModuleDict({kind: _norm(width) for kind in kinds}) for _ in range(2))

    def forward(self, x: Tensor, kind: str, keys: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1[kind](x), attn_mask=keys)
        out: Tensor = x + self.mlp(self.norm2[kind](x))
        return out


class Shown(NamedTuple):
    """What a decoder is told of one modality.

    Attributes:
        tokens: (B, K, D), features of the visible patches.
        seen: their places in the grid, (B, K).
        hidden: places that are asked for, (B, M).
        grid: height and width, in patches.
        valid: bool (B, K), False where a visible patch is padding; None where none is.
    """

    tokens: Tensor
    seen: Tensor
    hidden: Tensor
    grid: tuple[int, ...]
    valid: Tensor | None = None


class JointDecoder(nn.Module):
    """MAE's decoder of several modalities: visible tokens and mask tokens of all, to the pixels of each.

    One mask token and one transformer; each modality has an embedding that is added to its tokens, and a head.

    Args:
        dim: width D of the features.
        values: modality -> d, numbers in a patch.
        depth: number of blocks.
        width: of the blocks; see `check_decoder`.
        heads: of their attention.
    """

    def __init__(self, dim: int, values: Mapping[str, int], depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.modality = nn.ParameterDict({key: nn.Parameter(torch.randn(width) * 0.02) for key in values})
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=_norm) for _ in range(depth))
        self.norm = _norm(width)
        self.heads = nn.ModuleDict({key: nn.Linear(width, number) for key, number in values.items()})
        init_linears(self)

    def forward(self, shown: Mapping[str, Shown]) -> dict[str, Tensor]:
        """Features of the visible patches of each modality -> pixels of its hidden ones, (B, M, d)."""
        pieces, sizes, valid = [], [], []
        for key, one in shown.items():
            tokens, rows = self.embed(one.tokens), len(one.tokens)
            positions = build_sincos2d_pos_embed(
                list(one.grid), tokens.shape[2], interleave_sin_cos=True, device=tokens.device, dtype=tokens.dtype
            )
            # Attention asks for no order: visible patches are before hidden ones.
            masked = self.mask_token.to(tokens.dtype) + positions[one.hidden]
            own = torch.cat([tokens + positions[one.seen], masked], dim=1)
            pieces.append(own + self.modality[key].to(own.dtype))
            sizes.append(own.shape[1])
            inside = torch.ones_like(one.seen, dtype=torch.bool) if one.valid is None else one.valid
            valid.append(torch.cat([inside, inside.new_ones(rows, one.hidden.shape[1])], dim=1))
        keys = None if all(one.valid is None for one in shown.values()) else torch.cat(valid, dim=1)[:, None, None, :]
        x = torch.cat(pieces, dim=1)
        for block in self.blocks:
            x = block(x, attn_mask=keys)
        parts = self.norm(x).split(sizes, dim=1)
        return {
            key: self.heads[key](part[:, one.tokens.shape[1] :])
            for part, (key, one) in zip(parts, shown.items(), strict=True)
        }
