"""The toy world: small scenes made from a seed, each as a picture, a caption, a silent video and its sound.

Bodies of eight shapes bounce in a box. The picture is the instant 0 of the video, the caption says what it shows, and
every impact is heard at the very time at which it is seen. The label `shape` is that of the largest body; colors,
patterns, places, sizes, light, room and smaller bodies vary independently of it. Sets of shapes and colors, places and
sizes, masks and boxes are labels of other kinds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.data.base import MapSource
from mmssl.data.toy.caption import describe, tell
from mmssl.data.toy.picture import inside, render
from mmssl.data.toy.scene import COLORS, MOTIONS, TEXTURES, Dice, Scene, draw_scene, impacts
from mmssl.data.toy.shapes import SHAPES
from mmssl.data.toy.sound import synthesize
from mmssl.errors import DataError, nearest

SPLITS = ("train", "validation", "test")
CLASSES = {"shape": SHAPES, "color": tuple(COLORS), "texture": TEXTURES, "motion": tuple(MOTIONS)}

ROOM = "room"
"""What picture and video of a row are drawn by, for both show one."""


class ToySource(MapSource):
    """Rows of the toy world, rendered when a cell is read.

    Columns: `image` uint8 (size, size, 3); `text` str, one sentence; `video` `{"frames": uint8 (T, S, S, 3), "fps"}`;
    `audio` `{"array": float32 (N,), "sampling_rate"}`, on one clock with the video; the labels `shape`, `color` and
    `texture` (of the largest body) and `motion` (how fast everything bounces), as names; `events`, a JSON list of
    impacts with the keys `time` in seconds, `body`, `speed` and `surface`; `story` str, two to four sentences that hang
    together; `shapes` and `colors`, of all bodies, as sorted lists of names; of the largest body `size` float, the
    square root of half its area, and `position`, x and y of its center in the picture, in picture widths, y downwards;
    `count` int, of bodies; `mask` uint8 (size, size), 0 where the room is seen and 1 to 8 where a body is, the number
    of its shape in `SHAPES` from 1; `boxes`, [left, top, right, bottom] of each body in pixels of the picture, back to
    front, and `classes`, their shapes.

    Args:
        split: `train`, `validation` or `test`; no two share a scene.
        rows: their number.
        seed: of the whole world.
        size: of the picture in pixels.
        video_size: of the video in pixels.
        seconds: of video and sound.
        fps: frames per second.
        rate: of the sound in Hz.

    Raises:
        DataError: for an unknown split.
    """

    columns: tuple[str, ...] = (
        *("image", "text", "audio", "video", "shape", "color", "texture", "motion", "events", "story"),
        *("shapes", "colors", "size", "position", "count", "mask", "boxes", "classes"),
    )

    def __init__(
        self,
        split: str = "train",
        rows: int = 4096,
        seed: int = 0,
        *,
        size: int = 64,
        video_size: int = 48,
        seconds: float = 6.0,
        fps: float = 25.0,
        rate: int = 16_000,
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"the toy world has no split '{split}'{nearest(split, SPLITS)}")
        self.split, self.rows, self.seed = split, rows, seed
        self.size, self.video_size, self.seconds, self.fps, self.rate = size, video_size, seconds, fps, rate
        self.name = f"toy/{split}"
        self.fingerprint = f"toy {(split, seed, size, video_size, seconds, fps, rate)}"

    splits = SPLITS

    def __len__(self) -> int:
        return self.rows

    def row(self, i: int) -> Mapping[str, Any]:
        """The row of that number; a cell is rendered when it is read."""
        if not 0 <= i < self.rows:
            raise IndexError(f"{self.name} has rows 0 to {self.rows - 1}, not {i}")
        return _Row(self, i)

    def cell(self, scene: Scene, i: int, column: str) -> Any:
        """Render one column of row `i`, whose scene is known; raises KeyError for an unknown column."""
        dice = functools.partial(Dice, self.seed, self.split, i)
        match column:
            case "image":
                return _picture(self.seed, self.split, i, self.size).copy()
            case "video":
                times = [frame / self.fps for frame in range(round(self.seconds * self.fps))]
                return {"frames": render(scene, dice(ROOM), self.video_size, times, noise=0.0), "fps": self.fps}
            case "audio":
                return {"array": synthesize(scene, dice("audio"), self.rate, self.seconds), "sampling_rate": self.rate}
            case "text":
                return describe(scene, dice("text"))
            case "story":
                return tell(scene, dice("story"))
            case "shape" | "color" | "texture":
                return getattr(scene.subject, column)
            case "motion":
                return scene.motion
            case "shapes" | "colors":
                return sorted({getattr(body, column[:-1]) for body in scene.bodies})
            case "size":
                return scene.subject.size
            case "position":
                return [scene.subject.x, scene.subject.y]
            case "count":
                return len(scene.bodies)
            case "mask":
                mask = np.zeros((self.size, self.size), np.uint8)
                for body in scene.bodies:
                    mask[inside(body, self.size)] = 1 + SHAPES.index(body.shape)
                return mask
            case "boxes":
                return [_box(inside(body, self.size)) for body in scene.bodies]
            case "classes":
                return [body.shape for body in scene.bodies]
            case "events":
                return json.dumps([hit._asdict() for hit in impacts(scene, self.seconds)])
        raise KeyError(column)


@functools.lru_cache(maxsize=2**14)  # a comparison shows every network the same pictures; 200 MB at 64 pixels
def _picture(seed: int, split: str, row: int, size: int) -> np.ndarray:
    """The picture of that row, uint8 (size, size, 3)."""
    return render(draw_scene(seed, split, row), Dice(seed, split, row, ROOM), size, [0.0], noise=0.04)[0]


def _box(covered: np.ndarray) -> list[int]:
    """Left, top, right and bottom edge of what is covered."""
    rows, columns = (np.flatnonzero(covered.any(axis)) for axis in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


class _Row(Mapping[str, Any]):
    def __init__(self, source: ToySource, i: int) -> None:
        self._source, self._i = source, i
        self._scene = draw_scene(source.seed, source.split, i)

    def __getitem__(self, column: str) -> Any:
        return self._source.cell(self._scene, self._i, column)

    def __contains__(self, column: object) -> bool:
        return column in self._source.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.columns)

    def __len__(self) -> int:
        return len(self._source.columns)


def write_clips(
    directory: str | Path,
    rows: int,
    split: str = "train",
    *,
    seed: int = 0,
    seconds: float = 6.0,
    fps: float = 25.0,
    size: int = 48,
    rate: int = 16_000,
) -> list[Path]:
    """Encode rows of the toy world as real media: H.264 and AAC in mp4, about 60 kB a clip of 6 s.

    Args:
        directory: made if missing; row `i` becomes `i` in six digits and `.mp4`.
        rows: their number, from row 0 on.
        split: `train`, `validation` or `test`.
        seed: of the whole world.
        seconds: of a clip.
        fps: frames per second.
        size: of the frames in pixels, even.
        rate: of the sound in Hz.

    Returns:
        The files, in order.

    Raises:
        DataError: for an unknown split, or where the codecs refuse.
    """
    from mmssl.media.clip import write_clip

    source = ToySource(split, rows, seed, video_size=size, seconds=seconds, fps=fps, rate=rate)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / f"{i:06d}.mp4" for i in range(rows)]
    for i, path in enumerate(written):
        row = source.row(i)
        write_clip(path, row["video"]["frames"], fps, row["audio"]["array"], rate)
    return written
