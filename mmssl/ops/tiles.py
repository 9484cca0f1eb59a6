"""Cut grids of tiles out of images and take from them what gives their place away without a look at the content.

Neighboring tiles continue each other's edges: a gap between them and a random place in their cell. Lenses shift the
colors outwards (chromatic aberration) and darken the corners (vignetting): `recolor`, `flat_field` and `standardize`.
Everything works on whole batches, with one draw a tile or a row.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.errors import RecipeError
from mmssl.ops.augment import resize_matrix
from mmssl.ops.draws import Draws
from mmssl.ops.transfers import upload

GRAY_LEVEL = 1 / 255
_NOISE = 1 << 18


def draw_corners(
    draws: Draws, grid: int, *, pitch: int, jitter: int, room: tuple[int, int], grids: int = 1, shift: int = 0
) -> Tensor:
    """Where the tiles of a grid begin: a random origin, cells of `pitch` pixels, a random place in each cell.

    No place is clamped, because a clamped tile would tell that its cell is at the border.

    Args:
        draws: source of randomness.
        grid: cells a side, g.
        pitch: from cell to cell, in pixels.
        jitter: largest distance of a tile from the corner of its cell, in pixels.
        room: largest top and left of the origin, in pixels.
        grids: G, grids a row.
        shift: largest further distance of each color channel, in pixels; 0 for the same place in all.

    Returns:
        int64 (B, G, g², 3, 2), top and left of each channel; the tiles in rows. The channels' dimension is 1 where
        `shift` is 0.
    """
    cells = torch.arange(grid, device=draws.device) * pitch
    corners = torch.cartesian_prod(cells, cells)[:, None]
    free = upload([room[0] + 1, room[1] + 1], draws.device)
    origin = (draws.uniform(grids, 1, 1, 2) * free).long().minimum(free - 1)
    corners = origin + corners + draws.integers(jitter + 1, grids, grid * grid, 1, 2)
    return corners + draws.integers(shift + 1, grids, grid * grid, 3, 2) if shift else corners


def cut_tiles(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """Square tiles of images, each channel at a place of its own where wanted.

    Args:
        images: uint8 or float in [0, 1], (N, C, H, W).
        corners: int64 (N, K, C, 2) or (N, K, 1, 2), top and left; every tile lies inside its image.
        size: s, of a tile, in pixels.

    Returns:
        (N, K, C, s, s); floats in [0, 1] where the images are uint8.
    """
    windows = images.unfold(2, size, 1).unfold(3, size, 1)
    row = torch.arange(len(images), device=images.device)[:, None, None]
    channel = torch.arange(images.shape[1], device=images.device)
    tiles = windows[row, channel, corners[..., 0], corners[..., 1]]
    return tiles.to(torch.get_default_dtype()).mul_(GRAY_LEVEL) if tiles.dtype == torch.uint8 else tiles


def coarsen(tiles: Tensor, sides: Tensor) -> Tensor:
    """Resize each tile down to a side of its own and back, so that its fine texture says less about its scale.

    Args:
        tiles: float (N, C, s, s).
        sides: int64 (N,), from 1 to s pixels; s changes nothing.
    """
    weights = _down_and_up(tiles.shape[-1], torch.get_default_dtype()).to(tiles)[sides][:, None]
    return weights @ tiles @ weights.mT


@cache
def _down_and_up(size: int, dtype: torch.dtype) -> Tensor:
    """(size + 1, size, size): what resizing a line of `size` pixels to k and back does, at place k."""
    zero = torch.zeros(1, dtype=torch.long)
    matrices = [torch.zeros(size, size, dtype=dtype)]
    for side in range(1, size + 1):
        down = resize_matrix(zero, zero + size, size, side)[0]
        matrices.append(resize_matrix(zero, zero + side, side, size)[0] @ down)
    return torch.stack(matrices)


def recolor(
    tiles: Tensor, draws: Draws, *, gray: float, projection: float, drop: float, together: bool = False
) -> Tensor:
    """Hide chromatic aberration: each tile becomes gray or is projected or keeps one channel only, or none of these.

    Args:
        tiles: float in [0, 1], (B, K, 3, s, s).
        draws: source of randomness.
        gray: probability of the mean of the channels in place of each. What aberration has blurred stays blurred.
        projection: of the others, the probability of `projection_matrix`.
        drop: of the remaining ones, the probability of `drop_colors`.
        together: whether all tiles of a row fare alike.
    """
    fates = 1 if together else tiles.shape[1]
    dice, keep = draws.uniform(fates, 3), draws.integers(3, fates)
    is_gray, projected, dropped = (dice < upload([gray, projection, drop], dice.device)).unbind(-1)
    dropped = dropped & ~projected & ~is_gray
    if gray > 0 or projection > 0:
        project = upload(projection_matrix(), tiles.device, tiles.dtype)
        mixing = torch.where(projected[..., None, None], project, torch.eye(3, dtype=tiles.dtype, device=tiles.device))
        mixing = torch.where(is_gray[..., None, None], torch.full_like(project, 1 / 3), mixing)
        tiles = (mixing @ tiles.flatten(3)).view(tiles.shape)
    if drop > 0:
        only = drop_colors(tiles, keep.expand(tiles.shape[:2]), draws)
        tiles = torch.where(dropped[..., None, None, None], only, tiles)
    return tiles


def projection_matrix() -> Tensor:
    """I - aᵀa / (a aᵀ) with a = (-1, 2, -1): colors without their green-magenta part (Doersch et al. 2015).

    It takes the fringe that a lens leaves by treating green unlike red and blue. Green's shifted copy stays, now in all
    channels, and so does red shifted against blue.
    """
    axis = torch.tensor([-1.0, 2.0, -1.0])
    return torch.eye(3) - torch.outer(axis, axis) / axis.square().sum()


def drop_colors(tiles: Tensor, keep: Tensor, draws: Draws) -> Tensor:
    """Keep one channel, without its mean, and put noise of one gray level into the others (Doersch et al. 2015).

    Args:
        tiles: float (B, K, 3, s, s).
        keep: int64 (B, K), the channel.
        draws: source of randomness.

    Returns:
        (B, K, 3, s, s) around 0.5.
    """
    count, channels, size = tiles.shape[1:4]
    # Windows of one long strip: as good as fresh noise for every pixel, and nearly free.
    windows = _noise(size * size, tiles.device).unfold(0, size * size, 1)
    noise = windows[draws.integers(len(windows), count, channels)].view(tiles.shape).to(tiles.dtype)
    kept = torch.arange(channels, device=tiles.device) == keep[..., None]
    return torch.where(kept[..., None, None], tiles - tiles.mean((-2, -1), keepdim=True), noise) + 0.5


@cache
def _noise(window: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(_NOISE + window, generator=generator, dtype=torch.float32) - 0.5
    return (noise * GRAY_LEVEL).to(device)


def flat_field(tiles: Tensor) -> Tensor:
    """Divide each tile by the plane fitted to its brightness: what is left of vignetting is the same everywhere.

    A lens darkens corners by a factor. Within a tile that is nearly a plane, which falls outwards in brightness and in
    contrast; dividing cancels both, while subtracting a plane leaves the contrast.

    Args:
        tiles: float in [0, 1], (..., 3, s, s).

    Returns:
        The same shape, with the brightness it had on average.
    """
    size = tiles.shape[-1]
    brightness = tiles.mean(-3, keepdim=True)
    mean = brightness.mean((-2, -1), keepdim=True)
    line = torch.arange(size, device=tiles.device, dtype=tiles.dtype) - (size - 1) / 2
    weight = line / (line.square().sum() * size).clamp(min=1)
    down = (brightness * weight[:, None]).sum((-2, -1), keepdim=True) * line[:, None]
    across = (brightness * weight).sum((-2, -1), keepdim=True) * line
    # Where a dark side would make the plane cross zero, it stays at a tenth of its mean.
    return tiles * (mean + GRAY_LEVEL) / (mean + down + across).maximum(mean / 10).add(GRAY_LEVEL)


def standardize(tiles: Tensor) -> Tensor:
    """Every tile with the same mean and standard deviation: brightness and contrast say nothing of its place.

    Args:
        tiles: float (..., 3, s, s); statistics are over channels and pixels.

    Returns:
        Mean 0.5 and standard deviation 0.25, about what an image in [0, 1] has; less where a tile is so flat that its
        own is below one gray level.
    """
    flat = tiles.flatten(-3)
    flat = flat - flat.mean(-1, keepdim=True)
    deviation = torch.linalg.vector_norm(flat, dim=-1, keepdim=True) / flat.shape[-1] ** 0.5
    return flat.mul_(0.25 / deviation.clamp(min=GRAY_LEVEL)).add_(0.5).view(tiles.shape)


def fit_tile(wanted: float, room: int, patch: tuple[int, ...] | None, given: int | None, task: str) -> int:
    """Side of a tile in pixels: `given`, or what is nearest to `wanted` among what the encoder takes.

    Args:
        wanted: in pixels.
        room: largest side that fits.
        patch: height and width of the encoder's patches, of which a tile holds whole ones; None for any size.
        given: the recipe's own wish.
        task: named in errors.

    Raises:
        RecipeError: where nothing fits, or `given` does not.
    """
    unit = 1 if patch is None else math.lcm(*patch)
    if given is None:
        given = min(max(unit, round(wanted / unit) * unit), room // unit * unit)
    if not 0 < given <= room:
        raise RecipeError(
            f"{task}: a tile of {max(given, unit)} pixels does not fit into the {room} that there are; "
            "larger images or a network of smaller patches are a way out"
        )
    if given % unit:
        raise RecipeError(f"{task}: a tile of {given} pixels is not a whole number of the encoder's patches of {unit}")
    return given


def mosaic(tiles: Tensor, grid: int) -> Tensor:
    """(N, grid², 3, s, s) -> (N, 3, h, h) in [0, 1], laid out in rows with white lines between them."""
    line = max(1, tiles.shape[-1] // 12)
    framed = F.pad(tiles.clamp(0, 1), (0, line, 0, line), value=1.0)
    size = framed.shape[-1]
    square = framed.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, grid * size, grid * size)
    return square[..., :-line, :-line]
