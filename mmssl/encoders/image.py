"""Images: a network of timm, torchvision or open_clip, behind its normalization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.encoders.backbones import Pretrained, create_vision, write_json
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError


class Normalize(nn.Module):
    """uint8, or floats in [0, 1], (..., C, H, W) -> (x - mean) / std in the dtype of the weights.

    The constants are buffers: they are saved with the weights and are not trained.

    Args:
        mean: one value a channel, on the scale of [0, 1].
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        dtype = self.mean.dtype
        x = x.to(dtype) if x.is_floating_point() else x.to(dtype) / 255
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


class ImageEncoder(Encoder):
    """Images (B, 3, H, W), uint8 or floats in [0, 1], of any size that the network takes.

    Args:
        model: `timm/...`, `torchvision/...` or `open_clip/...`.
        pretrained: see `mmssl.encoders.create`.
        mean: normalization, one value a channel; the library's constants for these weights where left out.
        std: likewise.
        **kwargs: of the network's constructor, for instance `img_size`, `patch_size`, `embed_dim`, `depth`.
    """

    modality = "image"

    def __init__(
        self,
        model: str,
        *,
        pretrained: Pretrained = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.backbone = create_vision(model, pretrained, kwargs)
        mean, std = mean or self.backbone.mean, std or self.backbone.std
        check_channels(model, self.backbone.channels, mean, std)
        self.normalize = Normalize(mean, std)
        self.dim, self.subsets = self.backbone.dim, self.backbone.subsets
        self.patch_size, self.width = self.backbone.patch_size, self.backbone.width
        self.spec = {
            "model": model,
            "modality": "image",
            "mean": list(mean),
            "std": list(std),
            **self.backbone.kwargs,
        }

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Images -> tokens (B, h·w, width) in rows, with their positional embedding; see the base class."""
        return self.backbone.embed(self.normalize(x), hidden, mask_token)

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        """Any subset of the tokens of `embed` -> Features; see the base class."""
        return self.backbone.encode(tokens, valid)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Images -> Features, grid (h, w)."""
        x = self.normalize(x)
        if valid is None:
            features: Features = self.backbone(x)
            return features
        return self.backbone.encode(self.backbone.embed(x), valid)

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        """See the base class."""
        return self.backbone.layers(self.normalize(x))

    def export(self, directory: Path) -> None:
        """Write the network's native files, and `preprocessing.json` beside them; see the base class."""
        preprocessing = {
            "modality": "image",
            "model": self.spec["model"],
            "input": "RGB in [0, 1], channels first: (x - mean) / std",
            "mean": self.spec["mean"],
            "std": self.spec["std"],
        }
        self.backbone.export(Path(directory), preprocessing)
        write_json(Path(directory) / "preprocessing.json", preprocessing)


def check_channels(model: str, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise RecipeError where the constants are not one a channel, or cannot be divided by."""
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise RecipeError(f"{model}: mean and std need one value for each of {channels} channels, std above 0")
