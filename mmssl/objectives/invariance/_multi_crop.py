"""What tasks have in common that compare two large crops of a row and several small ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.views import Given, Views, encode_views
from mmssl.objectives.base import Panel
from mmssl.objectives.invariance._two_views import TwoViews
from mmssl.ops.draws import Draws

LOCAL_WINDOW = 0.2
"""Of sounds, the share of the recording in a small crop; no such setting is published."""


class MultiCrop(TwoViews):
    """One encoder, two large crops of each row, and small ones: multi-crop (Caron et al. 2020, arXiv 2006.09882).

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images or sound decides the crops.
        views: what the recipe says of the large crops.
        local_views: what it says of the small ones.
        local_crops: how many of these, L.
        large: published settings of the large crops of images.
        small: those of the small ones.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        encoder: str,
        views: Given,
        local_views: Given,
        local_crops: int,
        *,
        large: Sequence[Mapping[str, Any]],
        small: Sequence[Mapping[str, Any]],
    ) -> None:
        super().__init__(encoders, encoder, views, image=large)
        if self.needs == ("video",):
            task = type(self).__module__.rpartition(".")[2]
            raise RecipeError(f"{task} compares crops of images or of sounds, and the encoder '{encoder}' reads video")
        window = ({"window": LOCAL_WINDOW},)
        self.local_views = Views(self.encoder(encoder), local_views, local_crops, image=small, audio=window)
        if self.local_views.mixes and self.meets == "nowhere":
            self.meets = "transform"

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Large crops `views` (B, 2, 3, h, h) and small ones `local` (B, L, 3, l, l); of sounds also what is valid."""
        large, small = super().transform(batch, draws), self.local_views(batch, draws, self.encoder(self.name))
        return large | dict(zip(("local", "local_valid"), small, strict=False))

    def encode_crops(self, inputs: Batch) -> Tensor:
        """Pooled vectors (B, 2 + L, D), the large crops first; all crops of one size in one pass, as published."""
        encoder = self.encoder(self.name)
        pooled = encode_views(encoder, inputs["views"], inputs.get("valid"))
        if "local" not in inputs:
            return pooled
        return torch.cat([pooled, encode_views(encoder, inputs["local"], inputs.get("local_valid"))], dim=1)

    def crop_panels(self, inputs: Batch) -> list[Panel]:
        """The crops, as `mmssl show` draws them."""
        views, encoder = inputs["views"], self.encoder(self.name)
        panels = [Panel(f"large crop {i + 1}", list(views[:, i]), scale=encoder.scale(views[0, 0])) for i in range(2)]
        if "local" in inputs:  # pictures side by side, of sounds the first
            local = inputs["local"]
            shown = local if local.ndim == 5 else local[:, 0]
            panels.append(Panel("small crops", list(shown), scale=encoder.scale(shown[0])))
        return panels


def over_others(terms: Tensor) -> Tensor:
    """Of terms (B, 2, V), of a large crop and any crop: the mean over the crops that are another one, (B, 2)."""
    same = torch.eye(*terms.shape[1:], dtype=torch.bool, device=terms.device)
    return terms.masked_fill(same, 0.0).sum(2) / (terms.shape[2] - 1)
