"""Eight silhouettes that have an up, as signed distance fields.

Every shape covers the same area, so that the amount of color in a picture does not tell which one it shows.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

Points = list[tuple[float, float]]

EXTENT = 1.6
"""The field covers [-EXTENT, EXTENT] in both directions, in units of a body's size."""
AREA = 2.0
"""Of every shape, in squared units of a body's size."""
_CELLS = 192


def _arc(x: float, y: float, radius_x: float, radius_y: float, start: float, stop: float, count: int = 12) -> Points:
    """Points on an ellipse from `start` to `stop` degrees; 0 is right and 90 is down, as y grows downwards."""
    angles = [math.radians(start + (stop - start) * i / (count - 1)) for i in range(count)]
    return [(x + radius_x * math.cos(a), y + radius_y * math.sin(a)) for a in angles]


def _mirrored(right: Points) -> Points:
    """The outline whose right half runs from top to bottom."""
    return right + [(-x, y) for x, y in reversed(right) if x > 1e-9]


OUTLINES: dict[str, Points] = {
    "bell": _mirrored([(0.12, -1.0), (0.35, -0.85), (0.5, -0.4), (0.58, 0.2), (0.95, 0.65), (0.95, 0.85),
                       *_arc(0.0, 0.85, 0.15, 0.2, 0, 80, 4)]),
    "boat": [(-0.05, 0.25), (-0.05, -1.0), (0.75, 0.05), (0.1, 0.05), (0.1, 0.25), (1.0, 0.25), (0.6, 0.9), (-0.6, 0.9),
             (-1.0, 0.25)],
    "crown": _mirrored([(0.0, -0.75), (0.32, 0.0), (0.95, -0.65), (0.75, 0.8)]),
    "cup": _mirrored([(0.85, -0.95), (0.75, -0.3), (0.45, 0.05), (0.13, 0.2), (0.13, 0.7), (0.55, 0.95)]),
    "heart": _mirrored([(0.0, -0.5), *_arc(0.45, -0.5, 0.47, 0.45, 200, 390, 14), (0.0, 0.95)]),
    "house": [(-0.75, 0.9), (-0.75, -0.05), (-0.95, -0.05), (0.0, -0.9), (0.35, -0.59), (0.35, -0.9), (0.6, -0.9),
              (0.6, -0.36), (0.95, -0.05), (0.75, -0.05), (0.75, 0.9)],
    "mushroom": _mirrored([*_arc(0.0, 0.05, 0.95, 0.95, 270, 360), (0.25, 0.1), (0.35, 0.9)]),
    "tree": _mirrored([(0.0, -1.0), (0.5, -0.3), (0.28, -0.3), (0.8, 0.5), (0.15, 0.5), (0.15, 0.95)]),
}  # fmt: skip

SHAPES = tuple(OUTLINES)


@cache
def outline(shape: str) -> np.ndarray:
    """Corners (N, 2) as x, y in units of size: the box around them is centered and the area inside is `AREA`."""
    points = np.array(OUTLINES[shape])
    x, y = points.T
    area = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
    centered = points - (points.min(axis=0) + points.max(axis=0)) / 2
    return centered * math.sqrt(AREA / area)


@cache
def half_extents(shape: str) -> tuple[float, float]:
    """Half width and half height, in units of size."""
    width, height = outline(shape).max(axis=0)
    return float(width), float(height)


@cache
def distance_field(shape: str) -> np.ndarray:
    """Signed distance to the outline in units of size, float32 (192, 192) over x (columns) and y; negative inside."""
    axis = (np.arange(_CELLS) + 0.5) / _CELLS * 2 * EXTENT - EXTENT
    place = np.stack(np.meshgrid(axis, axis), axis=-1)[:, :, None]  # (cells, cells, 1, 2)
    start = outline(shape)
    edge = np.roll(start, -1, axis=0) - start
    along = np.clip(((place - start) * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
    distance = np.sqrt((((place - start) - along[..., None] * edge) ** 2).sum(-1).min(-1))
    # Even-odd rule: a ray to the right crosses the outline an odd number of times from inside.
    spans = (start[:, 1] > place[..., 1]) != (np.roll(start[:, 1], -1) > place[..., 1])
    rise = np.where(edge[:, 1] == 0, 1.0, edge[:, 1])
    crosses = spans & (place[..., 0] < start[:, 0] + edge[:, 0] * (place[..., 1] - start[:, 1]) / rise)
    inside = crosses.sum(-1) % 2 == 1
    return np.where(inside, -distance, distance).astype(np.float32)


def sample_field(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance at places given in units of size, to a sixtieth of a unit."""
    scale = np.float32(_CELLS / (2 * EXTENT))
    column, row = (np.clip((place + EXTENT) * scale, 0, _CELLS - 1).astype(np.intp) for place in (x, y))
    return distance_field(shape).ravel()[row * _CELLS + column]
