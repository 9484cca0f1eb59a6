"""Space-time cubic puzzle: in which order were four pieces of a clip shuffled, side by side or one after another?

Kim, Cho & Kweon 2019, "Self-Supervised Video Representation Learning with Space-Time Cubic Puzzles", arXiv 1811.09795.
Four cubes of a clip are either those of a square of two by two cells at one time, or four moments of one cell; they are
put in one of their 24 orders, each goes through the encoder alone, and a head over all of them says which order it is,
and of which kind: 48 answers. Each cube is at a random place in its cell, all of them show one color channel in place
of three, and between moments there are frames that nobody sees. The paper's rotated cubes are not followed.

Known traps. Neighboring cubes without a gap are matched by their edges, in space and in time. Lenses show a place by
their colors (the one channel hides that) and by darker corners (nothing here does; see `jigsaw`, which measures both).
Frames of a cube share one crop: a crop a frame destroys the motion. A video that is too short ends in a still, which
would be known for the last moment: nothing is taken from it, and a row without room before it does not count (`valid`
is the share that does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop, encode_views
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.clips import draw_start, frames_at
from mmssl.ops.draws import Draws
from mmssl.ops.losses import classified
from mmssl.ops.tiles import cut_tiles, draw_corners, fit_tile
from mmssl.ranges import Distance, Pixels, Positive, Share, Width

CUBES = 4
SIDE = 80 / 112  # of a cube over that of its cell
VIEWS = {"flip": 0.0}


class CubicPuzzle(Objective):
    """48-way classification of the order of four cubes, in space or in time.

    Args:
        encoders: holds the video encoder.
        encoder: its name.
        frames: of a cube.
        gap: frames between one moment and the next.
        side: of a cube, in pixels; 80/112 of a cell, half a frame, where left out, in multiples of the encoder's
            patches.
        space: probability that the cubes are from one time and four places; else they are from one place.
        replicate: probability that all cubes of a row show one color channel, three times.
        views: how clips are cropped before they are cut, all frames alike; see `Crop`.
        cube_width: of what the head takes from each cube.
        hidden: width of the layer over all cubes.
    """

    needs = ("video",)
    divisors = ("valid_rows",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "video",
        frames: Positive = 16,
        gap: Distance = 8,
        side: Pixels | None = None,
        space: Share = 0.5,
        replicate: Share = 1.0,
        views: dict[str, Any] = VIEWS,
        cube_width: Width = 512,
        hidden: Width = 512,
    ) -> None:
        super().__init__(encoders)
        self.name, self.frames, self.gap, self.side = encoder, frames, gap, side
        self.space, self.replicate, self.crop = space, replicate, Crop.of(VIEWS, views)
        self.orders: Tensor
        self.register_buffer("orders", torch.tensor(list(permutations(range(CUBES)))))
        self.each = nn.Sequential(nn.Linear(self.encoder(encoder, "video").dim, cube_width), nn.ReLU())
        answers = 2 * len(self.orders)
        self.head = nn.Sequential(nn.Linear(CUBES * cube_width, hidden), nn.ReLU(), nn.Linear(hidden, answers))

    def chance(self, rows: int) -> Chance:
        """The 48 answers, equally often; a network that knows space from time and no more is right twice as often."""
        answers = 2 * len(self.orders)
        return Chance(math.log(answers), {"accuracy": 1 / answers})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`video` (B, T, 3, H, W) -> `cubes` (B, 4, f, 3, s, s), `answer` (B,), `valid` bool (B,).

        Place i holds the cube `orders[answer % 24, i]`: of four places in rows where `answer < 24`, else of four times.
        """
        video = batch["video"]
        step = self.frames + self.gap
        span = CUBES * step - self.gap
        if span > video.shape[1]:
            raise RecipeError(
                f"cubic_puzzle: {CUBES} moments of {self.frames} frames with {self.gap} between them are {span} "
                f"frames, and a row has {video.shape[1]}: raise data.video.frames, or lower frames or gap"
            )
        start, valid = draw_start(video, span, draws)
        clip = (self.crop if self.crop.area else replace(self.crop, size=None))(video, draws, square=True)
        cell = self.crop.side(video, None) // 2
        side = fit_tile(cell * SIDE, cell, self._patch(), self.side, "cubic_puzzle")
        room = (clip.shape[-2] - 2 * cell, clip.shape[-1] - 2 * cell)
        places = draw_corners(draws, 2, pitch=cell, jitter=cell - side, room=room)[:, 0, :, 0]
        number = torch.arange(CUBES, device=video.device)
        cells = torch.stack([number // 2, number % 2], dim=1) * cell
        of_one_cell = places - cells + cells[draws.integers(CUBES)][:, None]
        in_space = draws.chance(self.space)[:, None]
        corner = torch.where(in_space[:, :, None], places, of_one_cell)
        moment = torch.where(in_space, draws.integers(CUBES)[:, None], number) * step
        order = draws.integers(len(self.orders))
        row = torch.arange(len(clip), device=video.device)
        cubes = self._cut(clip, corner, start[:, None] + moment, side)[row[:, None], self.orders[order]]
        channel = cubes[row, :, :, draws.integers(3)][:, :, :, None].expand_as(cubes)
        cubes = torch.where(draws.chance(self.replicate)[:, None, None, None, None, None], channel, cubes)
        answer = order + len(self.orders) * ~in_space[:, 0]
        return {"cubes": cubes, "answer": answer, "valid": valid, "valid_rows": valid.sum()}

    def _patch(self) -> tuple[int, int] | None:
        patch = self.encoder(self.name).patch_size
        return None if patch is None else (patch[-2], patch[-1])

    def _cut(self, clip: Tensor, corner: Tensor, moment: Tensor, side: int) -> Tensor:
        """Cubes (B, 4, f, 3, s, s) from corners (B, 4, 2) and first frames (B, 4)."""
        frames = frames_at(clip, moment[:, :, None] + torch.arange(self.frames, device=clip.device))
        cut = cut_tiles(frames.flatten(0, 1).flatten(1, 2), corner.flatten(0, 1)[:, None, None], side)
        return cut.view(len(clip), CUBES, self.frames, 3, side, side)

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, 48); all cubes of all rows in one pass of the encoder."""
        return {"logits": self.head(self.each(encode_views(self.encoder(self.name), inputs["cubes"])).flatten(1))}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy over the rows that count; `valid`, their share."""
        return classified(outputs["logits"], inputs["answer"], inputs["valid"], inputs["valid_rows"])

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The cubes as they are fed, which ones they were, and what the network says."""
        names = [
            f"{kind} {' '.join(str(i + 1) for i in order)}"
            for kind in ("space", "time")
            for order in self.orders.tolist()
        ]
        answers, said = inputs["answer"].tolist(), outputs["logits"].argmax(1).tolist()
        valid = inputs["valid"].tolist()
        return [
            *(Panel(f"place {i + 1}", list(inputs["cubes"][:, i])) for i in range(CUBES)),
            Panel(
                "target", [names[a] if counts else "does not count" for a, counts in zip(answers, valid, strict=True)]
            ),
            Panel(
                "prediction",
                [names[a] for a in said],
                [a == b if counts else None for a, b, counts in zip(answers, said, valid, strict=True)],
            ),
        ]
