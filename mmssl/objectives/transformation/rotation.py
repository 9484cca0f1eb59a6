"""Rotation: by which quarter turn was the image, or the clip, rotated?

Gidaris, Singh & Komodakis 2018, "Unsupervised Representation Learning by Predicting Image Rotations", arXiv 1803.07728.
All four turns of a crop go through the encoder together, and a linear head tells them apart. Of a clip all frames are
turned alike (Jing, Yang, Liu & Tian 2018, arXiv 1811.11387).

Known traps. Crop first, rotate then: rotating a picture that is not square leaves black corners at 90° and 270° only,
which white noise already gives away. Quarter turns move pixels and never resample them: interpolation after the turn
shows which way it went. Crops are squares resized alike in both directions, because a squashed picture shows its axis.

What stays in the data stays in the task, as noise shows, on which a small network should get 25 %
(`scripts/shortcuts.py`): pictures that were squashed to squares before, 49 %; 4:3 photographs under `fit: pad`, by
their white bars, 43 % (take `fit: crop`); pictures that once were JPEG files of the kind 4:2:2, whose colors are
coarser across than down, 50 % (the files themselves are mended where they are decoded, see `mmssl.media.chroma`); a
sign in one corner, 100 % without a crop, 53 % with the default, and 25 % with `views: {margin: 0.2}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws

TURNS = 4
VIEWS = {"area": (0.08, 1.0), "flip": 0.5}


class Rotation(Objective):
    """Four-way classification of quarter turns.

    Args:
        encoders: holds the encoder, of images or clips.
        encoder: its name.
        views: how images are cropped before the turn, and all frames of a clip alike; see `Crop`.
    """

    def __init__(
        self, encoders: Mapping[str, Encoder], *, encoder: str = "image", views: dict[str, Any] = VIEWS
    ) -> None:
        super().__init__(encoders)
        self.name, self.crop = encoder, Crop.of(VIEWS, views)
        network = self.encoder(encoder, "image", "video")
        self.modality = network.modality
        self.needs = (self.modality,)
        self.head = nn.Linear(network.dim, TURNS)

    def chance(self, rows: int) -> Chance:
        """Four turns, equally often."""
        return Chance(math.log(TURNS), {"accuracy": 1 / TURNS})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, H) -> `image` (B, 4, 3, h, h) and `turn` (B, 4); view k is `np.rot90(image, k)`.

        `video` (B, T, 3, H, H) -> `video` (B, 4, T, 3, h, h), likewise.
        """
        images = batch[self.modality]
        height, width = images.shape[-2:]
        if height != width:
            raise RecipeError(f"rotation needs square images, these are {height} x {width} pixels (height x width)")
        images = self.crop(images, draws, batch.get(f"{self.modality}_aspect"), square=True)
        views = torch.stack([images.rot90(k, (-2, -1)) for k in range(TURNS)], dim=1)
        return {self.modality: views, "turn": torch.arange(TURNS, device=images.device).expand(len(images), TURNS)}

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, 4 views, 4 turns)."""
        pooled = self.encoder(self.name)(inputs[self.modality].flatten(0, 1)).pooled
        return {"logits": self.head(pooled).unflatten(0, (-1, TURNS))}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and accuracy over all views."""
        logits, turn = outputs["logits"].flatten(0, 1), inputs["turn"].flatten()
        return {
            "loss": F.cross_entropy(logits, turn),
            "accuracy": (logits.argmax(1) == turn).to(logits.dtype).mean(),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The four views, each under its turn, and what the network takes each for."""
        views = [Panel(f"{90 * k}°", list(as_floats(inputs[self.modality][:, k]))) for k in range(TURNS)]
        guesses = [
            "  ".join(f"{'✓' if k == turn else '✗'} {90 * k}°" for turn, k in enumerate(row))
            for row in outputs["logits"].argmax(-1).tolist()
        ]
        return [*views, Panel("prediction", guesses)]
