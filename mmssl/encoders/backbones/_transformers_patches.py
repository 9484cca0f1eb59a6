"""Vision transformers of transformers, of pictures, filter banks and clips: token by token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoders.backbones._transformers import TransformersNetwork, build, normalization
from mmssl.encoders.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Pretrained, check_clip
from mmssl.encoders.base import Features, at_depth, attendable, hide, masked_mean, places


class PatchTransformer(TransformersNetwork):
    """A plain transformer over patches; a class here says what differs from one model type to the next.

    Attributes:
        name: model type.
        fixed: keys of the configuration that a recipe cannot change.
        constants: mean and std that the published weights expect.
        prefix: number of tokens before those of the patches.
    """

    name: str
    fixed: ClassVar[Mapping[str, Any]] = {}
    constants: ClassVar[tuple[Sequence[float], Sequence[float]]] = ((0.5,), (0.5,))
    prefix: int = 1
    subsets = True

    def __init__(self, pretrained: Pretrained, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = f"transformers/{self.name}"
        self.net, self.kwargs = build(self.name, pretrained, kwargs, fixed=self.fixed)
        # Its output is in no Features, and nothing would train it.
        if getattr(self.net, "pooler", None) is not None:
            self.net.pooler = None
        config = self.net.config
        self.dim = self.width = int(config.hidden_size)
        self.channels = int(getattr(config, "num_channels", 1))
        self.mean, self.std = normalization(pretrained, *self.constants, self.channels)
        self.patch_size = self._patch_size()
        self.size = pair(getattr(config, "image_size", self.size))[0]
        self.frames = getattr(config, "num_frames", None)
        # Versions of transformers keep the layers in different places, and mask attention in more and more of them.
        stacks = ((key, m) for key, m in self.net.named_modules() if isinstance(m, nn.ModuleList))
        self._stack = next(key for key, stack in stacks if len(stack) == config.num_hidden_layers)
        # Without layers nothing attends to padding.
        self.padding = all("attention_mask" in inspect.signature(type(b).forward).parameters for b in self._blocks[:1])

    def _patch_size(self) -> tuple[int, ...] | None:
        return pair(self.net.config.patch_size)

    @property
    def _blocks(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.net.get_submodule(self._stack)
        return layers

    def _grid(self, x: Tensor) -> tuple[int, ...]:
        """Extent of the tokens; raises RecipeError where the network cannot read what is given."""
        height, width = pair(self.net.config.patch_size)
        return x.shape[-2] // height, x.shape[-1] // width

    def _places(self, valid: Tensor | None, grid: tuple[int, ...]) -> Tensor | None:
        return places(valid, grid)

    def _patches(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) without positions."""
        tokens: Tensor = self.net.embeddings.patch_embeddings(x)
        return tokens

    def _positions(self, x: Tensor) -> Tensor:
        """Of the tokens of patches, (1, N, D); for another size than the built one resampled as the library does."""
        return self._resampled(self.net.embeddings.position_embeddings[:, self.prefix :], self._grid(x))

    def _resampled(self, positions: Tensor, grid: tuple[int, ...]) -> Tensor:
        sizes = zip(pair(self.net.config.image_size), pair(self.net.config.patch_size), strict=True)
        built = tuple(extent // size for extent, size in sizes)
        if grid == built:
            return positions
        # Here the library knows square grids alone; in half precision this would shift positions.
        whole = positions.unflatten(1, built).permute(0, 3, 1, 2).float()
        resampled = F.interpolate(whole, grid, mode="bicubic", align_corners=False)
        return resampled.flatten(2).mT.to(positions.dtype)

    def _front(self) -> Tensor:
        """The prefix tokens (1, P, D) with their positions, which are the same for any size."""
        embeddings = self.net.embeddings
        front: Tensor = embeddings.cls_token + embeddings.position_embeddings[:, :1]
        return front

    def _pool(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """(B, P + N, D) after the last norm -> (B, D)."""
        return tokens[:, 0]

    def _norm(self, tokens: Tensor) -> Tensor:
        normed: Tensor = self.net.layernorm(tokens)
        return normed

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Input -> tokens (B, N, D) with their positional embedding, without class token."""
        return hide(self._patches(x), hidden, mask_token) + self._positions(x)

    def _start(self, tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Input of the first layer, and the keywords of every layer."""
        if self.prefix:
            tokens = torch.cat([self._front().expand(len(tokens), -1, -1), tokens], dim=1)
        dropout = getattr(self.net.embeddings, "dropout", None)
        tokens = tokens if dropout is None else dropout(tokens)
        if valid is None:
            return tokens, {"attention_mask": None} if self.padding else {}
        if not self.padding:
            raise TypeError(f"{self.model} attends to every token that it is given")
        keys = torch.cat([valid.new_ones(len(valid), self.prefix), attendable(valid)], dim=1)
        return tokens, {"attention_mask": keys[:, None, None, :].expand(-1, -1, tokens.shape[1], -1)}

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        """Any subset of the tokens of `embed` -> Features; places where `valid` is False are not attended to."""
        x, keywords = self._start(tokens, valid)
        for block in self._blocks:
            x = block(x, **keywords)
        return self._end(x, valid, ())

    def _end(self, x: Tensor, valid: Tensor | None, grid: tuple[int, ...]) -> Features:
        x = self._norm(x)
        return Features(x[:, self.prefix :], self._pool(x, valid), grid, valid)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """`encode` of all tokens; see the base class."""
        grid = self._grid(x)
        return self.encode(self.embed(x), self._places(valid, grid))._replace(grid=grid)

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are tokens after the embedding and after every layer, before the last norm; see the base class."""
        grid = self._grid(x)
        valid = self._places(valid, grid)
        tokens, keywords = self._start(self.embed(x), valid)
        depths = {"embeddings": at_depth(tokens[:, self.prefix :], grid, valid)}
        for i, block in enumerate(self._blocks):
            tokens = block(tokens, **keywords)
            depths[f"layers.{i}"] = at_depth(tokens[:, self.prefix :], grid, valid)
        return self._end(tokens, valid, grid), depths


class ViT(PatchTransformer):
    """Dosovitskiy et al. 2020, arXiv 2010.11929; pooled is the class token after the last norm."""

    name = "vit"


class DINOv2(PatchTransformer):
    """Oquab et al. 2023, arXiv 2304.07193; a mask token is the task's, so that the network has none of its own."""

    name = "dinov2"
    fixed: ClassVar[Mapping[str, Any]] = {"use_mask_token": False}
    constants = (IMAGENET_MEAN, IMAGENET_STD)


class SigLIP(PatchTransformer):
    """The image tower of Zhai et al. 2023, arXiv 2303.15343; pooled by its head's attention, or by the mean."""

    name = "siglip_vision_model"
    prefix = 0
    processor: ClassVar[Mapping[str, Any]] = {"image_processor_type": "SiglipImageProcessor"}  # no type has it

    def _patches(self, x: Tensor) -> Tensor:
        return self.net.embeddings.patch_embedding(x).flatten(2).mT

    def _positions(self, x: Tensor) -> Tensor:
        return self._resampled(self.net.embeddings.position_embedding.weight[None], self._grid(x))

    def _norm(self, tokens: Tensor) -> Tensor:
        normed: Tensor = self.net.post_layernorm(tokens)
        return normed

    def _pool(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        head = getattr(self.net, "head", None)
        if head is None:
            return masked_mean(tokens, valid)
        probe = head.probe.expand(len(tokens), -1, -1)
        ignored = None if valid is None else ~attendable(valid)
        seen = head.attention(probe, tokens, tokens, key_padding_mask=ignored, need_weights=False)[0]
        pooled: Tensor = (seen + head.mlp(head.layernorm(seen)))[:, 0]
        return pooled


class AST(PatchTransformer):
    """Gong et al. 2021, arXiv 2104.01778, on filter banks (B, 1, M, T) of the length that it was built for.

    Patches overlap where their stride is smaller than their size, as it is by default; then they are no `patch_size`.
    """

    name = "audio-spectrogram-transformer"
    reads = "filter banks"
    prefix = 2

    def _strides(self) -> tuple[int, int]:
        return int(self.net.config.frequency_stride), int(self.net.config.time_stride)

    def _patch_size(self) -> tuple[int, ...] | None:
        size = pair(self.net.config.patch_size)
        return size if size == self._strides() else None

    def _grid(self, x: Tensor) -> tuple[int, ...]:
        sizes = zip(x.shape[-2:], pair(self.net.config.patch_size), self._strides(), strict=True)
        rows, columns = ((extent - size) // stride + 1 for extent, size, stride in sizes)
        return rows, columns

    def _places(self, valid: Tensor | None, grid: tuple[int, ...]) -> Tensor | None:
        if valid is None:
            return None
        size, stride = pair(self.net.config.patch_size)[1], self._strides()[1]
        kept = F.max_pool1d(valid.unsqueeze(1).float(), size, stride) > 0
        return kept.expand(-1, grid[0], -1).flatten(1)

    def _patches(self, x: Tensor) -> Tensor:
        return super()._patches(x[:, 0].mT)

    def _positions(self, x: Tensor) -> Tensor:
        positions: Tensor = self.net.embeddings.position_embeddings[:, 2:]
        return positions

    def _front(self) -> Tensor:
        embeddings = self.net.embeddings
        front = torch.cat([embeddings.cls_token, embeddings.distillation_token], dim=1)
        return front + embeddings.position_embeddings[:, :2]

    def _pool(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        return (tokens[:, 0] + tokens[:, 1]) / 2


class _OfClips(PatchTransformer):
    """Clips (B, C, T, H, W) of the size that the network was built for."""

    reads = "clips"

    def _grid(self, x: Tensor) -> tuple[int, ...]:
        check_configured(self, x)
        assert self.patch_size is not None
        return tuple(extent // size for extent, size in zip(x.shape[-3:], self.patch_size, strict=True))

    def _patches(self, x: Tensor) -> Tensor:
        self._grid(x)
        return super()._patches(x.transpose(1, 2))

    def _positions(self, x: Tensor) -> Tensor:
        positions: Tensor = self.net.embeddings.position_embeddings[:, self.prefix :]
        return positions


class VideoMAE(_OfClips):
    """Tong et al. 2022, arXiv 2203.12602; pooled is the mean of the tokens, which have a last norm where it says so.

    Its layers take no mask of padding.
    """

    name = "videomae"
    constants = (IMAGENET_MEAN, IMAGENET_STD)
    prefix = 0

    def _patch_size(self) -> tuple[int, ...] | None:
        return int(self.net.config.tubelet_size), *pair(self.net.config.patch_size)

    def _positions(self, x: Tensor) -> Tensor:
        # The library's are no buffer: without this they would travel to the device in every step.
        embeddings = self.net.embeddings
        embeddings.position_embeddings = embeddings.position_embeddings.to(x.device)
        return super()._positions(x).to(x.dtype)

    def _norm(self, tokens: Tensor) -> Tensor:
        return tokens if self.net.layernorm is None else super()._norm(tokens)

    def _pool(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        return masked_mean(tokens, valid)


class ViViT(_OfClips):
    """Arnab et al. 2021, arXiv 2103.15691, the form whose attention joins space and time; pooled is the class token."""

    name = "vivit"
    processor: ClassVar[Mapping[str, Any]] = {"offset": False}  # its published weights take [-1, 1]

    def _patch_size(self) -> tuple[int, ...] | None:
        return tuple(int(size) for size in self.net.config.tubelet_size)


def pair(size: Any) -> tuple[int, int]:
    """A configuration's height and width, which may be one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def check_configured(backbone: TransformersNetwork, x: Tensor) -> None:
    """Raise RecipeError where clips (B, C, T, H, W) are not of the size that the network was built for."""
    config = backbone.net.config
    built = (int(config.num_frames), *pair(config.image_size))
    check_clip(backbone.model, x, built, "num_frames and image_size")
