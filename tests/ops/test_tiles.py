"""Tiles: cut where drawn, and what hides their place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmssl.errors import RecipeError
from mmssl.ops.draws import Draws
from mmssl.ops.tiles import (
    GRAY_LEVEL,
    coarsen,
    cut_tiles,
    draw_corners,
    drop_colors,
    fit_tile,
    flat_field,
    mosaic,
    projection_matrix,
    recolor,
    standardize,
)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shift", [0, 2])
def test_tiles_are_the_pixels_at_their_corners(shift):
    images = torch.randint(0, 256, (3, 3, 30, 40), dtype=torch.uint8)
    corners = draw_corners(Draws(1, 2, 3), 3, pitch=10, jitter=3, room=(0, 10), shift=shift)[:, 0]
    tiles = cut_tiles(images, corners, 5)
    assert tiles.shape == (3, 9, 3, 5, 5)
    for b, k, c in np.ndindex(3, 9, 3):
        top, left = corners[b, k, c if shift else 0].tolist()
        assert torch.equal((tiles[b, k, c] * 255).round().byte(), images[b, c, top : top + 5, left : left + 5])
    torch.testing.assert_close(cut_tiles(images / 255, corners, 5), tiles)


def test_corners_are_uniform_in_their_cells_and_never_clamped():
    corners = draw_corners(Draws(0, 0, 4000), 2, pitch=20, jitter=4, room=(0, 6), grids=2, shift=2)
    assert corners.shape == (4000, 2, 4, 3, 2)
    offset = corners - torch.tensor([[0, 0], [0, 20], [20, 0], [20, 20]])[:, None]
    # Jitter 0..4 and shift 0..2 add up; the origin adds 0..6 to the left alone.
    top, left = offset.unbind(-1)
    assert (int(top.min()), int(top.max()), int(left.min()), int(left.max())) == (0, 6, 0, 12)
    expected = np.convolve(np.ones(5) / 5, np.ones(3) / 3)
    for cell in range(4):  # every cell alike, those at the border too
        found = top[:, :, cell].flatten().bincount(minlength=7) / top[:, :, cell].numel()
        assert np.abs(found.numpy() - expected).max() < 0.01
    assert (corners[:, 0] != corners[:, 1]).any()
    assert not (top[..., 0] == top[..., 1]).all()


def test_the_projection_removes_green_against_magenta_and_nothing_else():
    matrix = projection_matrix()
    torch.testing.assert_close(matrix @ matrix, matrix)
    assert float(matrix.trace()) == pytest.approx(2)
    axis = torch.tensor([-1.0, 2.0, -1.0])
    torch.testing.assert_close(matrix @ axis, torch.zeros(3))
    for kept in ([1.0, 1, 1], [1.0, 0, -1]):
        torch.testing.assert_close(matrix @ torch.tensor(kept), torch.tensor(kept))
    torch.testing.assert_close(matrix[0], torch.tensor([0.8333, 0.3333, -0.1667]), atol=1e-4, rtol=0)  # released code


def test_recolor_treats_tiles_with_their_probabilities():
    tiles = noise(600, 2, 3, 4, 4)
    out = recolor(tiles, Draws(0, 0, 600), gray=0.5, projection=0.5, drop=1.0)
    projected = torch.einsum("ij,bkjyx->bkiyx", projection_matrix().double(), tiles)
    is_gray = (out - tiles.mean(2, keepdim=True)).abs().amax((2, 3, 4)) < 1e-6
    is_projected = (out - projected).abs().amax((2, 3, 4)) < 1e-6
    centered = tiles - tiles.mean((3, 4), keepdim=True) + 0.5
    kept = (out - centered).abs().amax((3, 4)) < 1e-6
    assert torch.equal(is_gray.int() + is_projected.int() + kept.sum(2), torch.ones(600, 2, dtype=torch.int64))
    shares = [float(value.double().mean()) for value in (is_gray, is_projected, kept.any(2))]
    assert np.allclose(shares, [0.5, 0.25, 0.25], atol=0.05)
    assert (kept.sum((0, 1)) > 60).all()  # of each channel
    assert (is_gray[:, 0] != is_gray[:, 1]).any()

    together = recolor(tiles, Draws(0, 0, 600), gray=0.5, projection=0.0, drop=0.0, together=True)
    is_gray = (together.std(2) < 1e-6).all((2, 3))
    assert torch.equal(is_gray[:, 0], is_gray[:, 1])
    assert 240 < int(is_gray[:, 0].sum()) < 360
    assert torch.equal(recolor(tiles, Draws(0, 0, 600), gray=0.0, projection=0.0, drop=0.0), tiles)


def test_dropped_channels_are_noise_of_one_gray_level():
    tiles = noise(40, 9, 3, 8, 8)
    out = drop_colors(tiles, torch.ones(40, 9, dtype=torch.long), Draws(0, 0, 40)) - 0.5
    torch.testing.assert_close(out[:, :, 1], tiles[:, :, 1] - tiles[:, :, 1].mean((-2, -1), keepdim=True))
    rest = out[:, :, [0, 2]]
    assert rest.abs().max() <= GRAY_LEVEL / 2
    assert float(rest.std()) == pytest.approx(GRAY_LEVEL / 12**0.5, rel=0.02)
    vectors = rest.flatten(0, 2).flatten(1)
    assert len(vectors.unique(dim=0)) > 0.98 * len(vectors)


def test_standardized_tiles_have_one_mean_and_one_deviation():
    tiles = noise(4, 9, 3, 6, 6) * torch.linspace(0.1, 1, 9)[:, None, None, None] + 0.3
    out = standardize(tiles)
    torch.testing.assert_close(out.mean((2, 3, 4)), torch.full((4, 9), 0.5).double())
    torch.testing.assert_close(out.std((2, 3, 4), correction=0), torch.full((4, 9), 0.25).double())
    flat = standardize(torch.full((1, 1, 3, 6, 6), 0.8) + 1e-4 * noise(1, 1, 3, 6, 6))
    assert (flat - 0.5).abs().max() < 0.02  # noise of a flat tile is not blown up


def test_flat_field_divides_by_the_least_squares_plane_of_the_brightness():
    tiles = 0.2 + 0.6 * noise(2, 3, 3, 7, 7)
    y, x = np.mgrid[:7, :7]
    design = np.stack([np.ones(49), y.ravel(), x.ravel()], 1)
    expected = np.empty(tiles.shape)
    for index in np.ndindex(2, 3):
        brightness = tiles[index].numpy().mean(0).ravel()
        plane = (design @ np.linalg.lstsq(design, brightness, rcond=None)[0]).reshape(7, 7)
        expected[index] = tiles[index].numpy() * (brightness.mean() + GRAY_LEVEL) / (plane + GRAY_LEVEL)
    torch.testing.assert_close(flat_field(tiles), torch.from_numpy(expected))


def test_flat_field_hides_where_in_a_vignetted_image_a_tile_was():
    tiles = 0.3 + 0.4 * noise(50, 1, 3, 16, 16)
    fall = 1 - 0.02 * torch.arange(16.0, dtype=torch.float64)[:, None]  # as at the lower border; mirrored at the upper

    def contrast_below(values: torch.Tensor) -> float:
        """Contrast of the lower half over that of the upper."""
        return float((values[..., 8:, :].var((-2, -1)) / values[..., :8, :].var((-2, -1))).mean())

    lower, upper = tiles * fall, tiles * fall.flip(0)
    assert contrast_below(standardize(upper)) - contrast_below(standardize(lower)) > 0.6
    flat = [contrast_below(standardize(flat_field(values))) for values in (lower, upper)]
    assert abs(flat[0] - flat[1]) < 0.06
    black = flat_field(torch.zeros(1, 3, 4, 4))
    assert torch.equal(black, torch.zeros(1, 3, 4, 4))
    assert flat_field(torch.eye(8).expand(1, 3, 8, 8)[..., :4, 4:]).abs().max() < 10


def test_coarse_tiles_went_through_the_size_they_were_given():
    tiles = noise(5, 3, 12, 12).float()
    sides = torch.tensor([12, 1, 3, 5, 11])
    out = coarsen(tiles, sides)
    torch.testing.assert_close(out[0], tiles[0])
    for one, side in zip(range(5), sides.tolist(), strict=True):
        small = F.interpolate(tiles[one : one + 1], (side, side), mode="bilinear", antialias=True)
        again = F.interpolate(small, (12, 12), mode="bilinear", antialias=True)
        torch.testing.assert_close(out[one : one + 1], again, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wanted", "room", "patch", "given", "side"),
    [
        (64.0, 83, None, None, 64),
        (15.8, 20, None, None, 16),
        (55.7, 72, (16, 16), None, 48),
        (12.0, 15, (8, 8), None, 8),
        (3.0, 15, (8, 8), None, 8),
        (64.0, 83, (16, 16), 48, 48),
    ],
)
def test_a_tile_is_what_the_encoder_takes(wanted, room, patch, given, side):
    assert fit_tile(wanted, room, patch, given, "task") == side


def test_a_tile_that_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="task: a tile of 16 pixels does not fit into the 15"):
        fit_tile(12.0, 15, (16, 16), None, "task")
    with pytest.raises(RecipeError, match="20 pixels does not fit into the 15"):
        fit_tile(12.0, 15, None, 20, "task")
    with pytest.raises(RecipeError, match="not a whole number of the encoder's patches of 8"):
        fit_tile(12.0, 15, (8, 8), 12, "task")


def test_a_mosaic_lays_tiles_in_rows():
    tiles = torch.arange(9.0)[:, None, None, None].expand(9, 3, 4, 4)[None] / 9
    picture = mosaic(tiles, 3)
    assert picture.shape == (1, 3, 14, 14)
    assert torch.equal(picture[0, 0, ::5, ::5], torch.arange(9.0).view(3, 3) / 9)
    assert (picture[..., 4, :] == 1).all()
    assert (picture[..., :, 9] == 1).all()
