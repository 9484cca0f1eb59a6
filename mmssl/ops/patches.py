"""Pictures as patches, and back."""

from __future__ import annotations

from torch import Tensor


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
