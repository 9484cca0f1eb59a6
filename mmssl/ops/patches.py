"""Pictures as patches, and back."""

from __future__ import annotations

from torch import Tensor


def patchify(pixels: Tensor, patch: tuple[int, ...]) -> Tensor:
    """(B, C, H, W), or (B, C, T, H, W) -> patches (B, N, d) in rows, frame by frame; in one, channels are innermost."""
    for axis, size in reversed(list(enumerate(patch, 2))):
        pixels = pixels.unflatten(axis, (-1, size))
    order = range(2, pixels.ndim)
    return pixels.permute(0, *order[::2], *order[1::2], 1).flatten(1, len(patch)).flatten(2)


def unpatchify(patches: Tensor, patch: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The inverse of `patchify` for pictures or clips of `shape`."""
    grid = [extent // size for extent, size in zip(shape, patch, strict=True)]
    cut = patches.unflatten(2, (*patch, -1)).unflatten(1, grid)
    order = [axis for i in range(1, len(patch) + 1) for axis in (i, len(patch) + i)]
    return cut.permute(0, cut.ndim - 1, *order).reshape(len(patches), cut.shape[-1], *shape)


def standardize_colors(patches: Tensor, colors: int = 3) -> Tensor:
    """Each color of each patch (..., d), innermost, less its mean, over its (unbiased) standard deviation.

    As VideoMAE's code has it, which adds 1e-6 to the deviation where MAE's adds it to the variance.
    """
    each = patches.unflatten(-1, (-1, colors))
    return ((each - each.mean(-2, keepdim=True)) / (each.std(-2, keepdim=True) + 1e-6)).flatten(-2)


def standardize(patches: Tensor) -> Tensor:
    """Each patch (..., d) less its mean, over its (unbiased) standard deviation; one of a single value becomes 0."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
