"""Clips: a spatio-temporal network of torchvision, or any image network frame by frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mmssl.encoders.backbones import Pretrained, create_vision, write_json
from mmssl.encoders.base import Encoder, Features
from mmssl.encoders.image import Normalize, check_channels
from mmssl.errors import RecipeError

SPATIO_TEMPORAL = ("torchvision/r3d_18", "torchvision/mc3_18", "torchvision/r2plus1d_18")


class VideoEncoder(Encoder):
    """Clips (B, T, 3, H, W), uint8 or floats in [0, 1] -> Features, grid (t, h, w).

    Args:
        model: `torchvision/r3d_18`, `mc3_18` or `r2plus1d_18`, which convolve in time; or any image network, which sees
            each frame alone.
        pretrained: see `mmssl.encoders.create`.
        temporal: how the frames of an image network become one vector: `mean` (default) or `max` over time.
        mean: normalization, one value a channel; the library's constants for these weights where left out.
        std: likewise.
        **kwargs: of the network's constructor.
    """

    modality = "video"

    def __init__(
        self,
        model: str,
        *,
        pretrained: Pretrained = False,
        temporal: Literal["mean", "max"] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.framewise = model not in SPATIO_TEMPORAL
        if temporal and not self.framewise:
            raise RecipeError(f"{model}: 'temporal' is for image networks; this one pools over time itself")
        self.backbone = create_vision(model, pretrained, kwargs)
        self.temporal = temporal or "mean"
        mean, std = mean or self.backbone.mean, std or self.backbone.std
        check_channels(model, self.backbone.channels, mean, std)
        self.normalize = Normalize(mean, std)
        self.dim = self.backbone.dim
        self.spec = {"model": model, "modality": "video", "mean": list(mean), "std": list(std), **self.backbone.kwargs}
        if temporal:
            self.spec["temporal"] = temporal

    def _over_time(self, frames: Features, number: int) -> Features:
        """Features of B·T frames -> of B clips of T frames."""
        tokens = frames.tokens.unflatten(0, (-1, number)).flatten(1, 2)
        pooled = frames.pooled.unflatten(0, (-1, number))
        pooled = pooled.mean(dim=1) if self.temporal == "mean" else pooled.amax(dim=1)
        return Features(tokens, pooled, (number, *frames.grid))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Clips -> Features; see the class."""
        clip = self.normalize(x)
        if not self.framewise:
            features: Features = self.backbone(clip.transpose(1, 2))
            return features
        frames: Features = self.backbone(clip.flatten(0, 1))
        return self._over_time(frames, x.shape[1])

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        """See the base class."""
        clip = self.normalize(x)
        if not self.framewise:
            return self.backbone.layers(clip.transpose(1, 2))
        depths = self.backbone.layers(clip.flatten(0, 1))
        return {name: self._over_time(value, x.shape[1]) for name, value in depths.items()}

    def export(self, directory: Path) -> None:
        """Write the network's native files, and `preprocessing.json` beside them; see the base class."""
        layout = "each frame alone, then " + self.temporal + " over time" if self.framewise else "(B, 3, T, H, W)"
        preprocessing = {
            "modality": "video",
            "model": self.spec["model"],
            "input": f"RGB in [0, 1]: (x - mean) / std; {layout}",
            "mean": self.spec["mean"],
            "std": self.spec["std"],
        }
        self.backbone.export(Path(directory), preprocessing)
        write_json(Path(directory) / "preprocessing.json", preprocessing)
