"""Relative position: on which side of the first patch does the second lie?

Doersch, Gupta & Efros 2015, "Unsupervised Visual Representation Learning by Context Prediction", arXiv 1505.05192. Out
of a grid of patches with gaps between them, pairs of neighbors are shown in both orders, and a head over both features
tells the eight directions apart. Defaults are those of the released code in parts of a patch of 96 pixels: gaps of 48,
jitter of 7 either way, a third of the patches resized to as little as 10 x 10 pixels and back, one random channel kept
and noise put into the others, every patch with the same mean and standard deviation. The published grid covers an image
that was resized to 150 to 450 thousand pixels; here grids of 3 x 3 lie in random squares of the image (`area`), whose
patches cover the same share of it. All nine patches go through the encoder once, and of each of the four directions and
its opposite as many pairs are drawn, so that the eight answers are equally frequent in every image.

Known traps. Both orders of a pair belong into the batch. A patch whose jitter ends at the frame tells that its cell is
at the border: here no place is clamped. Chromatic aberration shows a patch's place, and two places show the direction:
the paper found its network doing so. Measured on noise, where a small network should get 12.5 %
(`scripts/shortcuts.py`): with red and blue 2 % larger and smaller than green it gets 91 %, as many with the projection,
and 12 % when one channel is kept; with green 5 % larger 83, 24 and 12 %. Corners half as bright give 54 % with the
defaults, by the slope of brightness and contrast that they leave in each patch, and 13 % with `flat_field: true`. Edges
that go on across the gap remain: the wider the `gap`, the less they tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.objectives.transformation._puzzle import BELOW, RIGHT, Puzzle, joints
from mmssl.ops.augment import draw_crops, resized_crop
from mmssl.ops.draws import Draws
from mmssl.ops.tiles import coarsen, cut_tiles, draw_corners, fit_tile, flat_field, mosaic, recolor, standardize
from mmssl.ops.transfers import chosen_rows, upload
from mmssl.ranges import Distance, Pixels, Positive, Share, Width

GRID = 3
# Row by row around the center, so that 7 - k is the opposite of k.
DIRECTIONS = ("above left", "above", "above right", "left", "right", "below left", "below", "below right")
STEPS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
VIEWS = {"area": (1 / 3, 1.0)}
COARSEST = 10  # pixels a side


class RelativePosition(Objective):
    """Eight-way classification of where the second of two neighboring patches lies.

    Args:
        encoders: holds the image encoder.
        encoder: its name.
        views: how the square is made that holds the grid, `area` and `size`; see `Crop`.
        grids: of 3 x 3 patches an image.
        pairs: of each direction and its opposite in a grid, 1 to 4; both orders of each.
        patch: side of a patch, in pixels; where left out, 96/398 of `size` in multiples of the encoder's patches, which
            fills the square.
        gap: between patches without jitter, in pixels; half a patch where left out, or as much as fits.
        jitter: largest displacement of a patch in each direction, in pixels; 7/96 of a patch where left out.
        coarse: probability that a patch is resized to between 10 pixels a side and its own size, and back.
        color: `drop` keeps one random channel of each patch, `projection` takes out green-magenta, `none` neither.
        standardize: whether every patch gets the same mean and standard deviation.
        flat_field: whether every patch is divided by the plane fitted to its brightness.
        hidden: width of the head's two hidden layers.
    """

    needs = ("image",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        views: dict[str, Any] = VIEWS,
        grids: Positive = 4,
        pairs: Positive = 4,
        patch: Pixels | None = None,
        gap: Distance | None = None,
        jitter: Distance | None = None,
        coarse: Share = 0.33,
        color: Literal["drop", "projection", "none"] = "drop",
        standardize: bool = True,
        flat_field: bool = False,
        hidden: Width = 4096,
    ) -> None:
        super().__init__(encoders)
        self.name, self.crop, self.grids, self.per_image = encoder, Crop.of(VIEWS, views), grids, pairs
        self.patch, self.gap, self.jitter, self.coarse, self.color = patch, gap, jitter, coarse, color
        self.standardize, self.flat_field = standardize, flat_field
        if self.crop.flip is not None:
            raise RecipeError("relative_position: views have an area and a size here, and no flip")
        if not 1 <= pairs <= 4 or grids < 1:
            raise RecipeError(f"relative_position: a grid has 1 to 4 pairs of each direction, not {pairs}")
        self.head = nn.Sequential(
            nn.Linear(2 * self.encoder(encoder, "image").dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, len(DIRECTIONS)),
        )

    def chance(self, rows: int) -> Chance:
        """Eight directions, equally often."""
        return Chance(math.log(len(DIRECTIONS)), {"accuracy": 1 / len(DIRECTIONS)})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, W) -> `patches` (B, P, 3, s, s), `pairs` (B, M, 2) and `direction` (B, M).

        Of the M pairs, the second half is the first in the other order. Pairs are numbers of patches.
        """
        images, aspect = batch["image"], batch.get("image_aspect")
        rows, side = len(images), self.crop.side(images, aspect)
        if self.crop.area is None:
            images = replace(self.crop, size=None)(images, draws, aspect)
        else:
            images = self.crop.inside(images)
        images = images.repeat_interleave(self.grids, dim=0)
        if self.crop.area is not None:
            height, width = images.shape[-2:]
            area, ratio = self.crop.area, (1.0, 1.0)
            boxes = draw_crops(draws, self.grids, height, width, area=area, ratio=ratio, aspect=aspect).flatten(0, 1)
            flip = torch.zeros_like(boxes[:, 0], dtype=torch.bool)
            images = resized_crop(images, boxes, side, flip, self.crop.interpolation)
        patch, gap, jitter = self._measures(side, images)
        extent = GRID * patch + (GRID - 1) * gap + 2 * jitter
        corners = draw_corners(
            draws,
            GRID,
            pitch=patch + gap,
            jitter=2 * jitter,
            room=(images.shape[-2] - extent, images.shape[-1] - extent),
            grids=self.grids,
        )
        patches = cut_tiles(images, corners.flatten(0, 1), patch).unflatten(0, (rows, self.grids)).flatten(1, 2)
        pairs, direction = self._pairs(draws)
        return {"patches": self._disguised(patches, draws), "pairs": pairs, "direction": direction}

    def _measures(self, side: int, images: Tensor) -> tuple[int, int, int]:
        """Patch, gap and jitter, in pixels."""
        if side > min(images.shape[-2:]):
            raise RecipeError(
                f"relative_position: views.size = {side} is more than the image's {min(images.shape[-2:])} pixels; "
                "with an area in views the image is enlarged"
            )
        wanted = side * 96 / 398
        patch = fit_tile(wanted, side // GRID, self.encoder(self.name).patch_size, self.patch, "relative_position")
        jitter = max(1, round(patch * 7 / 96)) if self.jitter is None else self.jitter
        room = (side - GRID * patch - 2 * jitter) // (GRID - 1)
        gap = min(round(patch / 2), room) if self.gap is None else self.gap
        if gap > room or room < 0:
            raise RecipeError(
                f"relative_position: three patches of {patch}, two gaps of {max(gap, 0)} and a jitter of {jitter} "
                f"either way do not fit into {side} pixels"
            )
        return patch, gap, jitter

    def _disguised(self, patches: Tensor, draws: Draws) -> Tensor:
        """What tells a patch's place without its content, hidden; float (B, P, 3, s, s)."""
        rows, count, _, size, _ = patches.shape
        low = min(COARSEST, size)
        sides = draws.uniform(count, low=low**2, high=size**2).sqrt().long()
        sides = torch.where(draws.chance(self.coarse, count), sides, size).flatten()
        (which,) = chosen_rows((sides < size)[None])
        if len(which):
            flat = patches.flatten(0, 1)
            patches = flat.index_copy(0, which, coarsen(flat[which], sides[which])).unflatten(0, (rows, count))
        drop, projection = float(self.color == "drop"), float(self.color == "projection")
        patches = flat_field(patches) if self.flat_field else patches
        patches = recolor(patches, draws, gray=0.0, projection=projection, drop=drop)
        return standardize(patches) if self.standardize else patches

    def _pairs(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Numbers of the patches of each pair (B, M, 2), and where the second lies seen from the first (B, M)."""
        chosen, direction = [], []
        cells = [(y, x) for y in range(GRID) for x in range(GRID)]
        for number, (dy, dx) in enumerate(STEPS[4:], start=4):
            there = [(y * GRID + x, (y + dy) * GRID + x + dx) for y, x in cells if (y + dy, x + dx) in cells]
            picks = torch.stack([draws.permutations(len(there))[:, : self.per_image] for _ in range(self.grids)], 1)
            chosen.append(upload(there, draws.device)[picks])
            direction += [number] * self.per_image
        pairs = torch.cat(chosen, 2)
        pairs = pairs + GRID**2 * torch.arange(self.grids, device=draws.device)[:, None, None]
        pairs = pairs.flatten(1, 2)
        label = upload(direction * self.grids, draws.device).expand(len(pairs), -1)
        return torch.cat([pairs, pairs.flip(-1)], 1), torch.cat([label, 7 - label], 1)

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, M pairs, 8 directions); all patches in one pass of the encoder."""
        patches, pairs = inputs["patches"], inputs["pairs"]
        pooled = self.encoder(self.name)(patches.flatten(0, 1)).pooled.unflatten(0, patches.shape[:2])
        row = torch.arange(len(pairs), device=pairs.device)[:, None, None]
        return {"logits": self.head(pooled[row, pairs].flatten(2))}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and accuracy over all pairs."""
        logits, direction = outputs["logits"].flatten(0, 1), inputs["direction"].flatten()
        return {
            "loss": F.cross_entropy(logits, direction),
            "accuracy": (logits.argmax(1) == direction).to(logits.dtype).mean(),
        }

    def puzzle(self, inputs: Batch) -> Puzzle:
        """A question for each pair whose patches lie side by side, and the four directions in which they can."""
        a, b = inputs["pairs"].unbind(-1)
        answers = {
            "right": joints(RIGHT, a, b),
            "left": joints(RIGHT, b, a),
            "below": joints(BELOW, a, b),
            "above": joints(BELOW, b, a),
        }
        directions = torch.tensor([DIRECTIONS.index(name) for name in answers], device=a.device)
        match = inputs["direction"][..., None] == directions
        answer = torch.where(match.any(-1), match.int().argmax(-1), -1)
        return Puzzle(inputs["patches"], torch.stack(list(answers.values()), 2)[..., None, :], answer)

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """One pair of each row, a different direction from row to row: as it lies, as the network lays it, in words."""
        patches, rows = inputs["patches"], torch.arange(len(inputs["patches"]), device=inputs["patches"].device)
        direction = inputs["direction"]
        shown = (direction == rows[:, None] % len(DIRECTIONS)).int().argmax(1)
        first, second = (patches[rows, inputs["pairs"][rows, shown, k]] for k in range(2))
        truth, answer = direction[rows, shown], outputs["logits"][rows, shown].argmax(-1)

        def laid(where: Tensor) -> list[Tensor]:
            places = torch.ones(len(rows), GRID**2, *first.shape[1:], device=first.device, dtype=first.dtype)
            places[:, GRID**2 // 2] = first
            # The center has no number among the directions.
            places[rows, where + (where >= GRID**2 // 2)] = second
            return list(mosaic(places, GRID))

        words = [
            f"✓ {DIRECTIONS[t]}" if a == t else f"✗ {DIRECTIONS[a]}; it is {DIRECTIONS[t]}"
            for t, a in zip(truth.tolist(), answer.tolist(), strict=True)
        ]
        return [
            Panel("first", list(first.clamp(0, 1))),
            Panel("second", list(second.clamp(0, 1))),
            Panel("as they lie", laid(truth)),
            Panel("as answered", laid(answer)),
            Panel("the second lies", words),
        ]
