"""From an encoder's features back to pixels: a dense map of any size, or the hidden ones among patches."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoders.base import Features
from mmssl.errors import RecipeError

STAGES = 4
GROUPS = 8


def feature_map(features: Features) -> Tensor:
    """Tokens on their grid with the pooled vector added at each place, (B, D, h, w).

    The pooled vector tells every place of the whole picture (Iizuka et al. 2016, "Let there be Color!"), and gives
    a gradient to weights that only pooling uses, such as those of an attention pool.

    Raises:
        RecipeError: for tokens that lie on no grid of two dimensions.
    """
    if len(features.grid) != 2 or features.grid[0] == 1 < features.grid[1]:
        raise RecipeError(
            f"a dense task needs tokens on a grid of height and width, and this encoder's are {features.grid}; "
            "take a convolutional network or a plain vision transformer, such as timm/vit_tiny_patch16_224"
        )
    return features.tokens.mT.unflatten(2, features.grid) + features.pooled[:, :, None, None]


class DenseDecoder(nn.Module):
    """A small convolutional upsampler: four times bilinear resize, convolution, GroupNorm, GELU.

    The sizes of the four stages grow by equal factors up to the one asked for, so that one set of weights serves any
    grid and any size, and all of them are always used. Resizing before the convolution leaves no checkerboard; groups
    are normalized within a row. The width halves from stage to stage, down to 32 channels (64 where the answer
    has that many).

    Args:
        dim: width D of the features.
        channels: of the answer.
        width: of the first stage, in channels; a power of 2.
    """

    def __init__(self, dim: int, channels: int, *, width: int = 256) -> None:
        super().__init__()
        # Not much narrower than what there is to tell, and several channels a group: one alone would lose its level.
        narrowest = 64 if channels >= 64 else 32
        widths = [max(width >> stage, narrowest) for stage in range(STAGES)]
        self.project = nn.Conv2d(dim, width, 1)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, after), nn.GELU())
            for before, after in zip([width, *widths], widths, strict=False)
        )
        self.head = nn.Conv2d(widths[-1], channels, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """A map (B, D, h, w) -> (B, channels, *size)."""
        start = x.shape[2:]
        x = self.project(x)
        for number, stage in enumerate(self.stages, 1):
            grown = [round(a * (b / a) ** (number / STAGES)) for a, b in zip(start, size, strict=True)]
            x = stage(F.interpolate(x, size=grown, mode="bilinear"))
        return self.head(x)


def _moments(number: int, like: Tensor) -> Tensor:
    """Sines and cosines of the place in time, (T, D), as Vaswani et al. 2017 (arXiv 1706.03762) have them."""
    half = like.shape[1] // 2
    rate = 10000 ** -(torch.arange(half, device=like.device) / half)
    angle = torch.arange(number, device=like.device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(like.dtype)


def init_linears(module: nn.Module) -> None:
    """Xavier's uniform weights and no bias in every linear layer, as in MAE's code."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def check_decoder(task: str, width: int, heads: int, part: str = "decoder") -> None:
    """Raise RecipeError where a decoder of that width has no positions, or cannot be cut into its heads."""
    if width % 4 or width % heads:
        raise RecipeError(f"{task}: {part}_width = {width} should be a multiple of 4 and of {part}_heads = {heads}")


class PatchDecoder(nn.Module):
    """MAE's decoder: visible tokens and mask tokens at their places, through transformer blocks, to pixels.

    Args:
        dim: width of the features.
        pixels: d, of a patch.
        depth: number of blocks.
        width: of the blocks.
        heads: of their attention.
        pooled: whether the pooled vector is seen as well, in the place of MAE's class token.
        in_a_row: whether the places of all frames are counted in one row, as VideoMAE's are.
    """

    def __init__(
        self,
        dim: int,
        pixels: int,
        depth: int,
        width: int,
        heads: int,
        *,
        pooled: bool = True,
        in_a_row: bool = False,
    ) -> None:
        from timm.models.vision_transformer import Block  # of the decoders, this one alone asks for timm

        super().__init__()
        self.pooled, self.in_a_row = pooled, in_a_row
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(width)
        self.head = nn.Linear(width, pixels)
        nn.init.normal_(self.mask_token, std=0.02)
        init_linears(self)

    def forward(self, features: Features, seen: Tensor, hidden: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Features of the visible patches -> pixels of the hidden ones, (B, M, d)."""
        tokens = self.embed(features.tokens)
        positions = self._positions(grid, tokens)
        # Attention asks for no order: the visible patches come first and the hidden ones last.
        visible = tokens + positions[seen]
        if self.pooled:
            visible = torch.cat([self.embed(features.pooled)[:, None], visible], dim=1)
        x = torch.cat([visible, self.mask_token.to(tokens.dtype) + positions[hidden]], dim=1)
        pixels: Tensor = self.head(self.norm(self.blocks(x)[:, visible.shape[1] :]))
        return pixels

    def _positions(self, grid: tuple[int, ...], like: Tensor) -> Tensor:
        """(N, width), fixed."""
        from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

        width = like.shape[2]
        if self.in_a_row:
            along = _moments(math.prod(grid), like[0])
            return along.unflatten(1, (2, -1)).mT.flatten(1)  # sine, cosine, sine ...
        flat = build_sincos2d_pos_embed(
            list(grid[-2:]), width, interleave_sin_cos=True, device=like.device, dtype=like.dtype
        )
        return flat if len(grid) == 2 else (flat + _moments(grid[0], flat)[:, None]).flatten(0, 1)
