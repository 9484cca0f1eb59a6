"""Pixels of the toy world: anti-aliased bodies, lit and textured, with their shadows, in front of a room."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mmssl.data.toy.scene import Body, Dice, Scene, paths
from mmssl.data.toy.shapes import EXTENT, sample_field


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
    margin = math.ceil(0.4 * size)  # bodies are stamped without looking at borders, on a canvas larger than the frame
    room: np.ndarray = np.zeros((size + 2 * margin, size + 2 * margin, 3), np.float32)
    room[margin : margin + size, margin : margin + size] = _room(scene, dice, size)
    frames: np.ndarray = np.repeat(room[None], len(times), axis=0)
    centres = [np.array([path.at(time) for time in times]) for path in paths(scene, max(times, default=0.0) + 1)]
    for body, centre in zip(scene.bodies, centres, strict=True):
        _stamp_shadow(frames, body, scene, centre, size, margin)
    for body, centre in zip(scene.bodies, centres, strict=True):
        _stamp_body(frames, body, scene, centre, size, margin)
    seen: np.ndarray = frames[:, margin : margin + size, margin : margin + size]
    if noise:
        seen = seen + np.float32(noise) * dice.array(*seen.shape)
    return (seen * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _room(scene: Scene, dice: Dice, size: int) -> np.ndarray:
    """A cloudy wall between four bands; nothing about them but the walls' physics says which one is the floor."""
    clouds = dice.array(5, 5, 3)
    clouds += 1.5 * dice.array(5, 5, 1)
    blend = np.maximum(0, 1 - np.abs(np.linspace(0, 4, size, dtype=np.float32)[:, None] - np.arange(5)))
    blend = blend.astype(np.float32)
    level = dice.uniform(0.12, 0.32) if scene.dark else dice.uniform(0.62, 0.85)
    wall = level + 0.08 * np.moveaxis(blend @ np.moveaxis(clouds, 2, 0) @ blend.T, 0, 2)
    edge = (np.arange(size, dtype=np.float32) + 0.5) / size
    box = scene.box
    bands = [
        (1, (box.left - edge) * size), (1, (edge - box.right) * size),
        (0, (box.top - edge) * size), (0, (edge - box.floor) * size),
    ]  # fmt: skip
    order = sorted(range(4), key=lambda _: dice.uniform(0, 1))
    for number in order:
        axis, depth = bands[number]
        paint = level + 0.35 * dice.array(3)
        cover = np.clip(depth + 0.5, 0, 1)
        cover = cover[None, :, None] if axis == 1 else cover[:, None, None]
        wall = wall + cover * (paint - wall)
    return wall.astype(np.float32)


def _patch(centre: np.ndarray, half: int, size: int, margin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corner (T, 2) of a square round each centre, and the places of its pixels from the centre, in picture widths."""
    corner = np.floor(centre * size).astype(np.int64) - half
    steps = np.arange(2 * half + 1) + 0.5
    x = (corner[:, :1] + steps) / size - centre[:, :1]
    y = (corner[:, 1:] + steps) / size - centre[:, 1:]
    return corner + margin, x[:, None, :], y[:, :, None]


def _blend(frames: np.ndarray, corner: np.ndarray, cover: np.ndarray, paint: np.ndarray) -> None:
    side = cover.shape[1]
    for frame, (left, top), alpha, colour in zip(frames, corner, cover[..., None], paint, strict=True):
        region = frame[top : top + side, left : left + side]
        region += alpha * (colour - region)


def _stamp_shadow(frames: np.ndarray, body: Body, scene: Scene, centre: np.ndarray, size: int, margin: int) -> None:
    """A dark ellipse on the floor below the body, wider and fainter the higher it flies."""
    height = scene.box.floor - centre[:, 1]
    below = np.stack([centre[:, 0], np.full(len(centre), scene.box.floor)], axis=1)
    half = math.ceil(size * body.size * 1.6)
    corner, x, y = _patch(below, half, size, margin)
    reach = (body.size * (0.8 + 0.6 * height))[:, None, None]
    depth = 1 - np.sqrt((x / reach) ** 2 + (y / (0.3 * reach)) ** 2)
    cover = (0.55 / (1 + 2 * height))[:, None, None] * np.clip(depth * 3, 0, 1)
    _blend(frames, corner, cover.astype(np.float32), np.zeros((len(centre), 1, 1, 3), np.float32))


def _stamp_body(frames: np.ndarray, body: Body, scene: Scene, centre: np.ndarray, size: int, margin: int) -> None:
    half = math.ceil(size * body.size * EXTENT)
    corner, x, y = _patch(centre, half, size, margin)
    x, y = (x / body.size).astype(np.float32), (y / body.size).astype(np.float32)
    cos, sin = math.cos(body.tilt), math.sin(body.tilt)
    across, down = cos * x + sin * y, cos * y - sin * x
    distance = sample_field(body.shape, -across if body.mirrored else across, down) * (body.size * size)
    cover = np.clip(0.5 - distance, 0, 1)
    pattern = _pattern(body, across, down, size)[..., None]
    first, second = np.array(body.paint, np.float32), np.array(body.texture_paint, np.float32)
    paint = first + pattern * (second - first)
    shade = 1 + 0.22 * (math.sin(scene.light) * x - math.cos(scene.light) * y)
    if body.outlined:
        shade = shade * (1 - 0.6 * np.clip(distance + 2.0, 0, 1))
    _blend(frames, corner, cover, (paint * shade[..., None]).astype(np.float32))


def _pattern(body: Body, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """How much of the second colour is where, in [0, 1]; edges one pixel wide."""
    if body.texture == "plain":
        return np.zeros_like(x)
    cos, sin = math.cos(body.texture_turn), math.sin(body.texture_turn)
    turn = 2 * math.pi / body.texture_period
    first, second = np.sin(turn * (cos * x + sin * y)), np.sin(turn * (cos * y - sin * x))
    wave = {"striped": first, "checked": first * second, "dotted": (first + second - 1) / 2}[body.texture]
    sharpness = max(1.0, body.texture_period * body.size * size / math.pi)
    return np.clip(0.5 + wave * sharpness / 2, 0, 1)
