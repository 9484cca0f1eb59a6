"""What tasks have in common that compare two random views of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.mode import norms_apart
from mmssl.modules.views import Given, Views
from mmssl.objectives.base import EMBEDDINGS, Objective, Panel
from mmssl.ops.draws import Draws


class TwoViews(Objective):
    """One encoder and two random views of each row.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images, clips or sound decides the views.
        views: what the recipe says of them.
        **published: modality -> what each view's settings are without that; see `Views`.

    Attributes:
        compared: the output that holds the embeddings, (B, views, width), those of the two views first.
    """

    compared = "z"

    def __init__(
        self, encoders: Mapping[str, Encoder], encoder: str, views: Given, **published: Sequence[Mapping[str, Any]]
    ) -> None:
        super().__init__(encoders)
        self.name = encoder
        self.views = Views(self.encoder(encoder), views, 2, **published)
        self.needs = self.views.needs
        if self.views.mixes and self.meets == "nowhere":
            self.meets = "transform"

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`views` (B, 2, 3, h, h), of clips (B, 2, T, 3, h, h), or (B, 2, M, T) of sounds with their `valid` frames."""
        return dict(zip(("views", "valid"), self.views(batch, draws, self.encoder(self.name)), strict=False))

    def drawn_together(self, inputs: Batch) -> dict[str, Tensor]:
        """Both views, and what is compared of them; a single one where only the first is embedded."""
        pooled = self.each_view(inputs, self.encoder(self.name))
        return {self.name: pooled, EMBEDDINGS: self.predict(inputs)[self.compared][:, :2]}

    def each_view(self, inputs: Batch, encoder: nn.Module, *heads: nn.Module) -> Tensor:
        """What an encoder and heads after it make of both views, (B, 2, D).

        BatchNorm normalizes each view by its own statistics, as the published code of all but SimCLR does with a pass
        a view. On a CPU these are one pass, in which norms alone take the views apart: weights are read half as often,
        which is worth more than the copies that it takes.
        """
        views, valid = inputs["views"].transpose(0, 1), inputs.get("valid")
        valid = None if valid is None else valid.transpose(0, 1)
        if views.device.type == "cpu" and not torch.compiler.is_compiling():
            with norms_apart(len(views), encoder, *heads):
                inside = None if valid is None else valid.flatten(0, 1)
                made = through(views.flatten(0, 1), inside, encoder, *heads).unflatten(0, (len(views), -1))
        else:
            masks = [None] * len(views) if valid is None else list(valid)
            made = torch.stack([through(*view, encoder, *heads) for view in zip(views, masks, strict=True)])
        return made.transpose(0, 1)

    def nearest_panels(
        self, views: Tensor, likeness: Tensor, first: str = "view 1", second: str = "view 2"
    ) -> list[Panel]:
        """What `mmssl show` draws of a pair: both views (B, 2, ...), and for each first the likeliest second.

        Args:
            views: (B, 2, ...).
            likeness: (B, B), of the first view of each row and the second of every row.
            first: title of the first views.
            second: of the second ones.
        """
        nearest, scale = likeness.argmax(1), self.encoder(self.name).scale(views[0, 0])
        right = [found == row for row, found in enumerate(nearest.tolist())]
        return [
            Panel(first, list(views[:, 0]), scale=scale),
            Panel(second, list(views[:, 1]), scale=scale),
            Panel(f"nearest {second}", list(views[nearest, 1]), right, scale),
        ]


def through(x: Tensor, valid: Tensor | None, encoder: nn.Module, *heads: nn.Module) -> Tensor:
    """What heads make of the pooled vectors of an encoder, (B, D)."""
    z: Tensor = encoder(x, valid).pooled
    for head in heads:
        z = head(z)
    return z
