"""A scene of the toy world: bodies that bounce in a box, drawn from a seed, with exact paths and impacts.

Lengths are in widths of the picture, times in seconds, y grows downwards. Everything random comes from `random()` of
PCG64, whose stream is fixed by its definition.
"""

from __future__ import annotations

import functools
import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from mmssl.data.toy.shapes import SHAPES, half_extents

COLORS = {
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.92, 0.87, 0.20),
    "green": (0.20, 0.65, 0.25),
    "cyan": (0.20, 0.75, 0.80),
    "blue": (0.20, 0.30, 0.85),
    "purple": (0.55, 0.25, 0.75),
    "pink": (0.95, 0.55, 0.75),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
MOTIONS = {"slow": 2.0, "steady": 4.5, "fast": 10.0}
"""Gravity in picture widths / s²: how quickly everything bounces. No single frame tells."""

_JUMPS = 64

Color = tuple[float, float, float]
Choice = TypeVar("Choice")


class Dice:
    """Random numbers of one row and purpose; equal on every machine."""

    def __init__(self, seed: int, split: str, row: int, purpose: str) -> None:
        name = f"{seed} {split} {row} {purpose}".encode()
        entropy = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
        self._generator = np.random.Generator(np.random.PCG64(entropy))

    def uniform(self, low: float, high: float) -> float:
        """One float in [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def pick(self, choices: Sequence[Choice]) -> Choice:
        """One of `choices`, each as likely."""
        return choices[int(self._generator.random() * len(choices))]

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return bool(self._generator.random() < probability)

    def array(self, *shape: int) -> np.ndarray:
        """float32 in [-1, 1)."""
        return self._generator.random(shape, dtype=np.float32) * 2 - 1


class Impact(NamedTuple):
    """A body hits the box.

    Attributes:
        time: in seconds.
        body: its number in the scene.
        speed: across the surface at that instant, in picture widths / s.
        surface: `floor`, `left` or `right`.
    """

    time: float
    body: int
    speed: float
    surface: str


@dataclass(frozen=True)
class Body:
    """What one thing looks like and how it starts.

    Attributes:
        size: square root of half its area, in picture widths; the same for every shape.
        tilt: from upright, in radians, kept while it moves.
        texture, texture_turn, texture_period, texture_color: pattern, its direction in radians, its period in sizes.
        x, y: center at time 0.
        drift: horizontal speed.
        jumps: how high it bounces each time, in [0, 1); after the last one they start over.
    """

    shape: str
    color: str
    paint: Color
    size: float
    tilt: float
    mirrored: bool
    texture: str
    texture_turn: float
    texture_period: float
    texture_paint: Color
    outlined: bool
    x: float
    y: float
    drift: float
    jumps: tuple[float, ...]


@dataclass(frozen=True)
class Box:
    """Where the walls are: the inner edges of four bands round the picture."""

    left: float
    right: float
    top: float
    floor: float


@dataclass(frozen=True)
class Scene:
    """Everything that picture, caption, video and sound of one row are made from.

    Attributes:
        bodies: back to front; the last one, which is the largest, gives the row its label.
        motion: key of `MOTIONS`.
        dark: whether the room is.
        light: direction that the light comes from, in radians from straight above.
    """

    bodies: tuple[Body, ...]
    box: Box
    motion: str
    dark: bool
    light: float

    @property
    def subject(self) -> Body:
        """The body that the label is about."""
        return self.bodies[-1]


@functools.lru_cache(maxsize=8192)  # whoever asks for labels asks for them of every row, and again for the pictures
def draw_scene(seed: int, split: str, row: int) -> Scene:
    """The scene of that row."""
    dice = Dice(seed, split, row, "scene")
    box = Box(*(dice.uniform(0.03, 0.12) for _ in range(4)))
    box = Box(box.left, 1 - box.right, box.top, 1 - box.floor)
    motion = dice.pick(list(MOTIONS))
    bodies = [_draw_body(dice, box, dice.uniform(0.06, 0.09)) for _ in range(1 + dice.chance(0.3))]
    bodies.append(_draw_body(dice, box, dice.uniform(0.20, 0.28)))
    return Scene(tuple(bodies), box, motion, dark=dice.chance(0.5), light=dice.uniform(-math.pi, math.pi))


def _draw_body(dice: Dice, box: Box, size: float) -> Body:
    shape = dice.pick(SHAPES)
    color = dice.pick(list(COLORS))
    brightness = dice.uniform(0.75, 1.1)
    paint = tuple(min(1.0, max(0.0, c * brightness + dice.uniform(-0.06, 0.06))) for c in COLORS[color])
    contrast = dice.uniform(0.6, 0.8) if dice.chance(0.5) else dice.uniform(1.2, 1.4)
    width, height = half_extents(shape)
    return Body(
        shape=shape,
        color=color,
        paint=paint,  # type: ignore[arg-type]
        size=size,
        tilt=math.radians(dice.uniform(-15, 15)),
        mirrored=dice.chance(0.5),
        texture=dice.pick(TEXTURES),
        texture_turn=dice.uniform(0, math.pi),
        texture_period=dice.uniform(0.4, 0.8),
        texture_paint=tuple(min(1.0, c * contrast + (0.15 if contrast > 1 else 0.0)) for c in paint),  # type: ignore[arg-type]
        outlined=dice.chance(0.4),
        x=dice.uniform(box.left + width * size, box.right - width * size),
        y=dice.uniform(box.top + height * size, box.floor - height * size),
        drift=dice.uniform(0.1, 0.5) * (1 if dice.chance(0.5) else -1),
        jumps=tuple((dice.array(_JUMPS) / 2 + 0.5).tolist()),
    )


class Path:
    """Where a body is at any time and when it hits what, in closed form: parabolas between impacts with the floor.

    The floor throws the body back to a height of its own choice, so that impacts come at irregular times and no shift
    of the sound looks like another; the walls are elastic.
    """

    def __init__(self, scene: Scene, number: int, seconds: float) -> None:
        body, gravity = scene.bodies[number], MOTIONS[scene.motion]
        width, height = (extent * body.size for extent in half_extents(body.shape))
        self._body, self._gravity = body, gravity
        self._ground = scene.box.floor - height
        self._left, self._right = scene.box.left + width, scene.box.right - width
        highest = self._ground - scene.box.top - height
        # The first stretch starts at rest; `_starts`, `_heights`, `_speeds` describe the stretches between impacts.
        self._starts, self._heights, self._speeds = [0.0], [body.y], [0.0]
        self.impacts: list[Impact] = []
        time = math.sqrt(2 * (self._ground - body.y) / gravity)
        arrival = gravity * time
        while time < seconds:
            jump = body.jumps[len(self.impacts) % len(body.jumps)]
            self.impacts.append(Impact(time, number, arrival, "floor"))
            arrival = math.sqrt(2 * gravity * highest * (0.15 + 0.85 * jump))
            self._starts.append(time)
            self._heights.append(self._ground)
            self._speeds.append(-arrival)
            time += 2 * arrival / gravity
        self.impacts += self._walls(number, seconds)
        self.impacts.sort()

    def _walls(self, number: int, seconds: float) -> list[Impact]:
        speed = abs(self._body.drift)
        toward_right = self._body.drift > 0
        gap = self._right - self._body.x if toward_right else self._body.x - self._left
        time, hits = gap / speed, []
        while time < seconds:
            hits.append(Impact(time, number, speed, "right" if toward_right else "left"))
            toward_right = not toward_right
            time += (self._right - self._left) / speed
        return hits

    def at(self, time: float) -> tuple[float, float]:
        """Center x, y at a time within the clip."""
        stretch = bisect_right(self._starts, time) - 1
        since = time - self._starts[stretch]
        y = self._heights[stretch] + self._speeds[stretch] * since + self._gravity / 2 * since**2
        room = self._right - self._left
        folded = (self._body.x - self._left + self._body.drift * time) % (2 * room)
        return self._left + (folded if folded <= room else 2 * room - folded), y


def paths(scene: Scene, seconds: float) -> list[Path]:
    """One path a body."""
    return [Path(scene, number, seconds) for number in range(len(scene.bodies))]


def impacts(scene: Scene, seconds: float) -> list[Impact]:
    """All impacts of a clip in order of time."""
    return sorted(hit for path in paths(scene, seconds) for hit in path.impacts)
