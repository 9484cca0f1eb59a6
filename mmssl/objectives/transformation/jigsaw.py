"""Jigsaw: in which order were the tiles of the image shuffled?

Noroozi & Favaro 2016, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles", arXiv 1603.09246.
A square of the image is cut into 3 x 3 cells with a tile at a random place in each; the tiles are put in one of N fixed
orders, every tile goes through the encoder alone, and a head over all of them says which order it was. Defaults are
those of the released code: cells of 85 pixels with tiles of 64 at an offset of 0 to 21 (so that neighbors are 21
pixels apart on average and 0 at least), or as much of a smaller image; 100 orders; half of the puzzles gray, half of
the others projected; each color channel shifted by up to 2 pixels, here within the cell. From the paper comes that
every tile gets the same mean and standard deviation.

Known traps. Orders that differ by one swap (the published sets have them) are told apart by two tiles only: see
`mmssl.ops.permutations`. Neighboring tiles without a gap are matched by their edges. What the lens does shows a tile's
place without a look at its content, and the defaults hide only part of it. Measured on noise with four orders, where a
small network should get 25 % (`scripts/shortcuts.py`): green 5 % larger than red and blue, 76 %; red and blue 2 %
either way, 58 %. Gray and projection alone leave 99 % and more, for a sum of shifted colors is a blur that points
outwards; `gray: 0, projection: 0, drop: 1` leaves 27 %. Corners half as bright, 100 %, because equal means and
deviations leave a slope of brightness and contrast within each tile; 27 % with `flat_field: true`. A sign in one
corner, 100 %; 65 % with `views: {area: [0.3, 1.0]}`, and 25 % with `views: {margin: 0.2}`, which no tile comes from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.objectives.transformation._puzzle import BELOW, RIGHT, Puzzle, joints
from mmssl.ops.draws import Draws
from mmssl.ops.permutations import permutation_set
from mmssl.ops.tiles import cut_tiles, draw_corners, fit_tile, flat_field, mosaic, recolor, standardize
from mmssl.ranges import Distance, Pixels, Positive, Share, Width

VIEWS = {"flip": 0.0}


class Jigsaw(Objective):
    """N-way classification of the order of tiles.

    Args:
        encoders: holds the image encoder.
        encoder: its name.
        orders: N, of the (grid²)! there are.
        grid: cells a side.
        views: how the square is made that is cut into cells; see `Crop`. A smaller one is at a random place.
        tile: side of a tile, in pixels; 64/85 of a cell where left out, in multiples of the encoder's patches. Needed
            for networks of one fixed size, such as torchvision's vision transformers.
        gap: least distance of neighboring tiles, in pixels.
        shift: largest shift of a color channel of a tile, in pixels; 2/64 of the tile where left out, at least 1.
        gray: probability that all tiles of an image are gray.
        projection: of the others, the probability of the green-magenta projection.
        drop: of the remaining ones, the probability that each tile keeps one channel only.
        standardize: whether every tile gets the same mean and standard deviation.
        flat_field: whether every tile is divided by the plane fitted to its brightness.
        tile_width: of what the head takes from each tile.
        hidden: width of the layer over all tiles; None for none.
    """

    needs = ("image",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        orders: Positive = 100,
        grid: Positive = 3,
        views: dict[str, Any] = VIEWS,
        tile: Pixels | None = None,
        gap: Distance = 0,
        shift: Distance | None = None,
        gray: Share = 0.5,
        projection: Share = 0.5,
        drop: Share = 0.0,
        standardize: bool = True,
        flat_field: bool = False,
        tile_width: Width = 1024,
        hidden: Width | None = 4096,
    ) -> None:
        super().__init__(encoders)
        self.name, self.grid, self.crop = encoder, grid, Crop.of(VIEWS, views)
        self.tile, self.gap, self.shift = tile, gap, shift
        self.colors = {"gray": gray, "projection": projection, "drop": drop}
        self.standardize, self.flat_field = standardize, flat_field
        tiles = grid * grid
        if grid < 2 or not 2 <= orders <= math.factorial(tiles):
            raise RecipeError(f"jigsaw: a grid of {grid} x {grid} has no {orders} orders; take a grid of 2 or more")
        self.orders: Tensor
        self.register_buffer("orders", permutation_set(orders, tiles))
        self.each = nn.Sequential(nn.Linear(self.encoder(encoder, "image").dim, tile_width), nn.ReLU())
        together = [nn.Linear(tiles * tile_width, hidden), nn.ReLU()] if hidden else []
        self.head = nn.Sequential(*together, nn.Linear(hidden or tiles * tile_width, orders))

    def chance(self, rows: int) -> Chance:
        """N orders, equally often."""
        return Chance(math.log(len(self.orders)), {"accuracy": 1 / len(self.orders)})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, W) -> `tiles` (B, grid², 3, s, s) and `order` (B,).

        Place i of the tiles holds the one whose place in the image is `orders[order, i]`, row by row.
        """
        images, aspect = batch["image"], batch.get("image_aspect")
        side = self.crop.side(images, aspect)
        # Without an area the square's random place is that of the grid's first corner.
        images = (self.crop if self.crop.area else replace(self.crop, size=None))(images, draws, aspect, square=True)
        cell, tile, shift = self._measures(side, images)
        corners = draw_corners(
            draws,
            self.grid,
            pitch=cell,
            jitter=cell - self.gap - shift - tile,
            room=(images.shape[-2] - cell * self.grid, images.shape[-1] - cell * self.grid),
            shift=shift,
        )[:, 0]
        order = draws.integers(len(self.orders))
        shuffled = corners.gather(1, self.orders[order][..., None, None].expand_as(corners))
        tiles = cut_tiles(images, shuffled, tile)
        tiles = recolor(flat_field(tiles) if self.flat_field else tiles, draws, **self.colors, together=True)
        return {"tiles": standardize(tiles) if self.standardize else tiles, "order": order}

    def _measures(self, side: int, images: Tensor) -> tuple[int, int, int]:
        """Sides of a cell and of a tile and the shift of a channel, in pixels."""
        if side > min(images.shape[-2:]):
            raise RecipeError(
                f"jigsaw: views.size = {side} is more than the image's {min(images.shape[-2:])} pixels; "
                "with views.area = [1.0, 1.0] the image is enlarged"
            )
        cell = side // self.grid
        shift = max(1, round(cell * 64 / 85 / 32)) if self.shift is None else self.shift
        tile = fit_tile(
            cell * 64 / 85, cell - self.gap - shift, self.encoder(self.name).patch_size, self.tile, "jigsaw"
        )
        return cell, tile, shift

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, orders); all tiles of all rows in one pass of the encoder."""
        tiles = inputs["tiles"]
        pooled = self.encoder(self.name)(tiles.flatten(0, 1)).pooled
        return {"logits": self.head(self.each(pooled).view(len(tiles), -1))}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and accuracy."""
        logits, order = outputs["logits"], inputs["order"]
        return {
            "loss": F.cross_entropy(logits, order),
            "accuracy": (logits.argmax(1) == order).to(logits.dtype).mean(),
        }

    def puzzle(self, inputs: Batch) -> Puzzle:
        """One question a row, and each order as an answer to it."""
        places = self.orders.argsort(1).view(-1, self.grid, self.grid)  # order, place in the image -> place of the tile
        right = joints(RIGHT, places[:, :, :-1], places[:, :, 1:]).flatten(1, 2)
        below = joints(BELOW, places[:, :-1], places[:, 1:]).flatten(1, 2)
        return Puzzle(inputs["tiles"], torch.cat([right, below], 1)[None, None], inputs["order"][:, None])

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The tiles as the network gets them, in their own order, and in that which it takes for their own."""
        tiles, answer = inputs["tiles"], outputs["logits"].argmax(1)

        def assembled(order: Tensor) -> list[Tensor]:
            places = self.orders[order].argsort(1)[..., None, None, None].expand_as(tiles)
            return list(mosaic(tiles.gather(1, places), self.grid))

        right = (self.orders[answer] == self.orders[inputs["order"]]).sum(1)
        words = [f"✗ {n} of {len(tiles[0])}" if n < len(tiles[0]) else "✓ all" for n in right.tolist()]
        return [
            Panel("as fed", list(mosaic(tiles, self.grid))),
            Panel("in order", assembled(inputs["order"])),
            Panel("as answered", assembled(answer)),
            Panel("tiles in place", words),
        ]
