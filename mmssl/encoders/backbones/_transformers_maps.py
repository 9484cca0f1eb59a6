"""Networks of transformers whose tokens stay where they are: ConvNeXt of pictures, TimeSformer of clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmssl.encoders.backbones._transformers import TransformersNetwork, build, normalization
from mmssl.encoders.backbones._transformers_patches import check_configured, pair
from mmssl.encoders.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Pretrained
from mmssl.encoders.base import Features, at_depth, places
from mmssl.errors import RecipeError


class ConvNeXt(TransformersNetwork):
    """Liu et al. 2022, arXiv 2201.03545; pooled is the last norm of the mean, tokens are before it."""

    def __init__(self, pretrained: Pretrained, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = "transformers/convnext"
        self.net, self.kwargs = build("convnext", pretrained, kwargs)
        self.dim, self.channels = int(self.net.config.hidden_sizes[-1]), int(self.net.config.num_channels)
        self.mean, self.std = normalization(pretrained, IMAGENET_MEAN, IMAGENET_STD, self.channels)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Pictures -> Features; see the base class."""
        return self.forward_layers(x, valid)[0]

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are embedding and stages; see the base class."""
        maps = {"embeddings": self.net.embeddings(x)}
        for i, stage in enumerate(self.net.encoder.stages):
            maps[f"stages.{i}"] = stage(next(reversed(maps.values())))
        depths = {
            name: at_depth(value.flatten(2).mT, tuple(value.shape[2:]), places(valid, tuple(value.shape[2:])))
            for name, value in maps.items()
        }
        last = depths[next(reversed(maps))]
        return last._replace(pooled=self.net.layernorm(last.pooled)), depths


class TimeSformer(TransformersNetwork):
    """Bertasius, Wang & Torresani 2021, arXiv 2102.05095; pooled is the class token after the last norm.

    Attention over time and over space needs all tokens in their places. `space_only` sees each frame alone, which
    transformers/vit does as well; it is refused.
    """

    reads = "clips"

    def __init__(self, pretrained: Pretrained, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = "transformers/timesformer"
        self.net, self.kwargs = build("timesformer", pretrained, kwargs)
        config = self.net.config
        if config.attention_type == "space_only":
            raise RecipeError(f"{self.model}: space_only sees each frame alone; take transformers/vit")
        self.dim, self.channels = int(config.hidden_size), int(config.num_channels)
        self.patch_size = (1, *pair(config.patch_size))
        self.size, self.frames = pair(config.image_size)[0], int(config.num_frames)
        self.mean, self.std = normalization(pretrained, (0.45,), (0.225,), self.channels)

    def _run(self, x: Tensor) -> tuple[tuple[int, ...], Any]:
        check_configured(self, x)
        height, width = pair(self.net.config.patch_size)
        grid = (x.shape[-3], x.shape[-2] // height, x.shape[-1] // width)
        return grid, self.net(x.transpose(1, 2), output_hidden_states=True)

    @staticmethod
    def _tokens(hidden: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Without class token; the library keeps the frames of a place together, here it is the places of a frame."""
        return hidden[:, 1:].unflatten(1, (-1, grid[0])).transpose(1, 2).flatten(1, 2)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Clips -> Features, grid (t, h, w); padding is marked, and attended to all the same."""
        return self.forward_layers(x, valid)[0]

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are tokens after the embedding and after every layer, before the last norm; see the base class."""
        grid, output = self._run(x)
        names = ("embeddings", *(f"layers.{i}" for i in range(len(output.hidden_states) - 1)))
        valid = places(valid, grid)
        depths = {
            name: at_depth(self._tokens(hidden, grid), grid, valid)
            for name, hidden in zip(names, output.hidden_states, strict=True)
        }
        last = output.last_hidden_state
        return Features(self._tokens(last, grid), last[:, 0], grid, valid), depths
