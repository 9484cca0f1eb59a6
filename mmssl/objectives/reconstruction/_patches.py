"""Pictures as patches, and the transformer that predicts hidden ones; shared by the tasks that hide patches."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.backbones import places
from mmssl.encoders.base import Encoder, Features
from mmssl.encoders.image import ImageEncoder
from mmssl.ops.augment import draw_crops, resized_crop
from mmssl.ops.draws import Draws


def read_picture(
    encoder: Encoder,
    batch: Batch,
    draws: Draws,
    *,
    area: tuple[float, float] | None,
    flip: float,
    size: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images, cropped and mirrored, or the spectrograms of sounds.

    Args:
        encoder: of images or sound, a network of patches.
        batch: has `image`, or `audio` and perhaps `audio_mask`.
        draws: source of randomness.
        area: smallest and largest share of an image that its crop covers; None for no crop.
        flip: probability that an image is mirrored.
        size: of a crop, in pixels; the image's short side where None.

    Returns:
        What the encoder reads, image (B, 3, h, w) or spectrogram (B, mels, frames); its pixels as the network sees them
        (B, C, h, w); and bool (B, N), False for places that are padding, or None where there is none.
    """
    if encoder.modality == "audio":
        hearing = cast(AudioEncoder, encoder)
        assert hearing.patch_size is not None  # checked when a task is built
        picture = hearing.spectrogram(batch["audio"])
        if "audio_mask" not in batch:
            return picture, picture[:, None], None
        frames = hearing.valid_frames(batch["audio_mask"])
        frames = nn.functional.pad(frames, (0, picture.shape[2] - frames.shape[1]))
        grid = (picture.shape[1] // hearing.patch_size[0], picture.shape[2] // hearing.patch_size[1])
        return picture, picture[:, None], places(frames, grid)
    images = batch["image"]
    height, width = images.shape[-2:]
    mirrored = draws.chance(flip)
    if area is None:
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    else:
        boxes = draw_crops(draws, 1, height, width, area=area)[:, 0]
        images = resized_crop(images, boxes, size or min(height, width), mirrored)
    return images, cast(ImageEncoder, encoder).normalize(images), None


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
