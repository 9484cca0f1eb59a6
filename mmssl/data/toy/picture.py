"""Pixels of the toy world: anti-aliased bodies, lit and textured, in front of a room.

Nothing but the bodies' shapes tells which side of a picture is up: there are no shadows and light comes from anywhere.
Arithmetic, and no `np.sin` or matrix product, which round differently from machine to machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from mmssl.data.toy.scene import Body, Dice, Scene, paths
from mmssl.data.toy.shapes import half_extents, sample_field


def render(scene: Scene, dice: Dice, size: int, times: Sequence[float], noise: float) -> np.ndarray:
    """Frames at the given times.

    Args:
        scene: what is seen.
        dice: of the room and the noise.
        size: side of the square frames in pixels.
        times: in seconds.
        noise: largest deviation of a pixel, as a share of white.

    Returns:
        uint8 (T, size, size, 3), RGB.
    """
    frames: np.ndarray = np.repeat(_room(scene, dice, size)[None], len(times), axis=0)
    centers = [np.array([path.at(time) for time in times]) for path in paths(scene, max(times, default=0.0) + 1)]
    for body, center in zip(scene.bodies, centers, strict=True):
        _stamp_body(frames, body, scene, center)
    if noise:
        frames += np.float32(noise) * dice.array(*frames.shape)
    return (frames * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _room(scene: Scene, dice: Dice, size: int) -> np.ndarray:
    """A cloudy wall between four bands; nothing about them but the walls' physics says which one is the floor."""
    clouds = dice.array(3, 5, 5)  # channels first, for long inner loops
    clouds += 1.5 * dice.array(5, 5)
    level = dice.uniform(0.12, 0.32) if scene.dark else dice.uniform(0.62, 0.85)
    below, share = _between(size)
    tall = clouds[:, below] * (1 - share[:, None]) + clouds[:, below + 1] * share[:, None]
    wall = tall[:, :, below] * (1 - share) + tall[:, :, below + 1] * share
    wall *= 0.08
    wall += level
    edge = (np.arange(size, dtype=np.float32) + 0.5) / size
    box = scene.box
    depths = [(box.left - edge) * size, (edge - box.right) * size, (box.top - edge) * size, (edge - box.floor) * size]
    for number in sorted(range(4), key=lambda _: dice.uniform(0, 1)):
        paint = level + 0.35 * dice.array(3)
        cover = np.clip(depths[number] + 0.5, 0, 1)
        inside = np.flatnonzero(cover)
        strip = slice(inside[0], inside[-1] + 1)
        region = wall[:, :, strip] if number < 2 else wall[:, strip]
        region += (cover[strip] if number < 2 else cover[strip, None]) * (paint[:, None, None] - region)
    return np.ascontiguousarray(np.moveaxis(wall, 0, 2))


@cache
def _between(size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `size` pixels the one of five grid lines before it, and its share of the way to the next one."""
    place = np.linspace(0, 4, size, dtype=np.float32)
    below = np.minimum(place.astype(np.int64), 3)
    return below, place - below.astype(np.float32)


def _patch(center: np.ndarray, wide: float, tall: float, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A box of pixels round each center, as far from it as `wide` and `tall` in picture widths.

    Returns:
        its corner int64 (T, 2) in pixels, and where its pixels are from the center in picture widths, float32
        (T, 1, W) and (T, H, 1).
    """
    half = np.array([math.ceil(wide * size), math.ceil(tall * size)]) + 1  # one more for the soft edge
    corner = np.floor(center * size).astype(np.int64) - half
    x, y = (
        ((corner[:, k, None] + np.arange(2 * half[k] + 1) + 0.5) / size - center[:, k, None]).astype(np.float32)
        for k in (0, 1)
    )
    return corner, x[:, None, :], y[:, :, None]


def _body_patch(
    body: Body, center: np.ndarray, size: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], np.ndarray]:
    """A box of pixels round a body at each of its centers (T, 2), in the picture and seen from the body.

    Returns:
        the box's corner, see `_patch`; x and y from the center, in body sizes; the same turned upright with the body;
        signed distance to its outline, in pixels of the picture.
    """
    cos, sin = math.cos(body.tilt), math.sin(body.tilt)
    width, height = (extent * body.size for extent in half_extents(body.shape))
    corner, x, y = _patch(center, cos * width + abs(sin) * height, cos * height + abs(sin) * width, size)
    x, y = x / body.size, y / body.size
    across, down = cos * x + sin * y, cos * y - sin * x
    distance = sample_field(body.shape, -across if body.mirrored else across, down) * (body.size * size)
    return corner, (x, y), (across, down), distance


def inside(body: Body, size: int) -> np.ndarray:
    """Pixels that a body covers by half or more at time 0, whatever is in front of it; bool (size, size)."""
    (corner,), _, _, (distance,) = _body_patch(body, np.array([[body.x, body.y]]), size)
    found = np.zeros((size, size), dtype=bool)
    rows, columns = np.nonzero(distance <= 0)
    rows, columns = rows + corner[1], columns + corner[0]
    seen = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    found[rows[seen], columns[seen]] = True
    return found


def _blend(frames: np.ndarray, corner: np.ndarray, cover: np.ndarray, paint: np.ndarray) -> None:
    """Paint over a box of every frame; what lies beyond the picture is cut off."""
    size = frames.shape[1]
    for frame, (left, top), alpha, color in zip(frames, corner.tolist(), cover[..., None], paint, strict=True):
        seen = slice(max(0, -top), size - top), slice(max(0, -left), size - left)
        alpha, color = alpha[seen], color[seen]
        region = frame[max(0, top) :, max(0, left) :][: alpha.shape[0], : alpha.shape[1]]
        region += alpha * (color - region)


def _stamp_body(frames: np.ndarray, body: Body, scene: Scene, center: np.ndarray) -> None:
    """Paint a body into every frame (T, size, size, 3), at its center (T, 2) there."""
    size = frames.shape[1]
    corner, (x, y), (across, down), distance = _body_patch(body, center, size)
    cover = np.clip(0.5 - distance, 0, 1)
    first = np.array(body.paint, np.float32)
    paint: np.ndarray = first
    if body.texture != "plain":
        paint = first + _pattern(body, across, down, size)[..., None] * (
            np.array(body.texture_paint, np.float32) - first
        )
    shade = 1 + 0.22 * (math.sin(scene.light) * x - math.cos(scene.light) * y)
    if body.outlined:
        shade *= 1 - 0.6 * np.clip(distance + 2.0, 0, 1)
    _blend(frames, corner, cover, paint * shade[..., None])


def _pattern(body: Body, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """How much of the second color is where, in [0, 1]; edges one pixel wide."""
    cos, sin = math.cos(body.texture_turn), math.sin(body.texture_turn)
    first = _wave((cos * x + sin * y) / body.texture_period)
    if body.texture == "striped":
        wave = first
    else:
        second = _wave((cos * y - sin * x) / body.texture_period)
        wave = first * second if body.texture == "checked" else (first + second - 1) / 2
    sharpness = max(1.0, body.texture_period * body.size * size / math.pi)
    return np.clip(0.5 + wave * (sharpness / 2), 0, 1)


def _wave(turns: np.ndarray) -> np.ndarray:
    """Nearly a sine, of parabolas: made of operations that round alike on every machine, as `np.sin` does not."""
    slope = 4 * (turns - np.floor(turns)) - 2
    return slope * (np.abs(slope) - 2)
