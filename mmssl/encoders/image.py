"""Images: a network of timm, torchvision, open_clip or transformers, after a normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmssl.encoders._network import NetworkEncoder
from mmssl.encoders.backbones.base import Pretrained, create_backbone
from mmssl.errors import RecipeError
from mmssl.media.image import Fit, decode_image
from mmssl.recipe import Data


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


class ImageEncoder(NetworkEncoder):
    """Images (B, 3, H, W), uint8 or floats in [0, 1], of any size that the network takes -> Features, grid (h, w).

    Args:
        model: `timm/...`, `torchvision/...`, `open_clip/...`, or `transformers/` and a model type: `vit`, `dinov2`,
            `siglip_vision_model`, `convnext`.
        pretrained: see `mmssl.encoders.create`.
        mean: normalization, one value a channel; the library's constants for these weights where left out.
        std: likewise.
        **kwargs: of the network's constructor, for instance `img_size`, `patch_size`, `embed_dim`, `depth`; for
            transformers of its configuration: `image_size`, `patch_size`, `hidden_size`, `num_hidden_layers`.
    """

    modality = "image"
    shapes: ClassVar[dict[int, str]] = {4: "(B, 3, H, W)"}

    def __init__(
        self,
        model: str,
        *,
        pretrained: Pretrained = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(create_backbone(model, "image", pretrained, kwargs))
        mean, std = mean or self.backbone.mean, std or self.backbone.std
        check_channels(model, self.backbone.channels, mean, std)
        self.normalize = Normalize(mean, std)
        constants = {"mean": list(mean), "std": list(std)}
        self.spec = {"model": model, "modality": "image", **constants, **self.backbone.kwargs}

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Normalized images; `valid` (B, W) is False where a column is padding."""
        return self.normalize(x), valid

    def built_for(self) -> dict[str, Any]:
        """See the base class."""
        return {"size": self.backbone.size}

    def decode_one(self, cell: Any, data: Data) -> tuple[Tensor, None]:
        """See the base class."""
        how = data.image.for_probes
        fit: Fit = "pad" if how.fit == "pad" else "crop"
        return decode_image(cell, how.size, fit, extent=how.extent, alpha=how.alpha, max_pixels=how.max_pixels), None

    def normalization(self) -> dict[str, list[float]]:
        """See the base class."""
        return {"mean": self.spec["mean"], "std": self.spec["std"]}

    def preprocessing(self) -> dict[str, Any]:
        """See the base class."""
        return {"input": "RGB in [0, 1], channels first: (x - mean) / std", **self.normalization()}


def check_channels(model: str, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise RecipeError where the constants are not one a channel, or cannot be divided by."""
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise RecipeError(f"{model}: mean and std need one value for each of {channels} channels, std above 0")
