"""Image towers of open_clip."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers import Mlp, resample_abs_pos_embed
from torch import Tensor, nn

from mmssl.encoders.backbones._clip import build, configuration, write_clip
from mmssl.encoders.backbones.base import Backbone, Pretrained
from mmssl.encoders.backbones.timm import TimmTrunk
from mmssl.encoders.base import Features, at_depth, attendable, hide, masked_mean, places
from mmssl.errors import RecipeError


def create_image_tower(name: str, pretrained: Pretrained, kwargs: Mapping[str, Any]) -> Backbone:
    """Build the image tower of `open_clip/name`; see `mmssl.encoders.backbones.base.Library.create`."""
    model = f"open_clip/{name}"
    clip, differences = build(name, pretrained, kwargs, model)
    net = clip.visual
    kinds = {VisionTransformer: OpenClipTransformer, ModifiedResNet: OpenClipResNet, TimmModel: OpenClipTimm}
    if type(net) not in kinds:
        raise RecipeError(f"model '{model}': its image tower, a {type(net).__name__}, is not supported")
    backbone: Backbone = kinds[type(net)](net, model, differences)
    return backbone


class _Tower(Backbone):
    """What image towers share. Tokens pass the tower's projection, so that they are as wide as its output.

    CLIP knows no padding: it is marked as not valid in the features, and attended to and pooled but by its own vision
    transformer, which passes it over.
    """

    def __init__(self, net: Any, model: str, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.net, self.model, self.kwargs = net, model, dict(kwargs)
        self.mean = tuple(getattr(net, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN)
        self.std = tuple(getattr(net, "image_std", None) or open_clip.OPENAI_DATASET_STD)
        self.config = configuration(model.partition("/")[2], kwargs, model)
        self.dim = int(self.config["embed_dim"])
        self.size = int(self.config["vision_cfg"].get("image_size", self.size))

    def export(self, directory: Path, preprocessing: Mapping[str, Any]) -> None:
        """A whole CLIP, its text tower with random weights: `open_clip.create_model("local-dir:" + directory)`."""
        clip = CustomTextCLIP(**copy.deepcopy(self.config))
        clip.visual.load_state_dict(self.net.state_dict())
        write_clip(directory, clip, self.config, preprocessing, random="text tower and logit scale")


class OpenClipTransformer(_Tower):
    """CLIP's own vision transformer."""

    def __init__(self, net: Any, model: str, kwargs: Mapping[str, Any]) -> None:
        super().__init__(net, model, kwargs)
        if self.config["vision_cfg"].get("patch_dropout"):
            raise RecipeError(f"{model}: patch_dropout is not for an encoder: it keeps all its patches")
        # Blocks of other kinds than CLIP's own read masks of another shape.
        self.padding = all(type(block) is ResidualAttentionBlock for block in net.transformer.resblocks)
        # Attentional pooling (CoCa) answers queries: what comes out has no places.
        self.subsets, self.patch_size = net.attn_pool is None, net.patch_size
        self.width = int(net.conv1.out_channels) if self.subsets else None

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Pictures -> tokens (B, h·w, width) with their positional embedding, resampled for other sizes."""
        if not self.subsets:
            return super().embed(x)
        return self._embed(x, hidden, mask_token)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        return x.shape[-2] // self.net.patch_size[0], x.shape[-1] // self.net.patch_size[1]

    def _embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        positions = resample_abs_pos_embed(
            self.net.positional_embedding[None, 1:],
            new_size=list(self._grid(x)),
            old_size=list(self.net.grid_size),
            num_prefix_tokens=0,
        )
        return hide(self.net.conv1(x).flatten(2).transpose(1, 2), hidden, mask_token) + positions

    def _start(self, tokens: Tensor) -> Tensor:
        front = self.net.class_embedding + self.net.positional_embedding[0]
        x: Tensor = self.net.ln_pre(torch.cat([front.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], dim=1))
        return x

    def _unseen(self, valid: Tensor | None) -> Tensor | None:
        """What is added to the scores of attention, (B·heads, from, to): nothing, or -inf for padding."""
        if valid is None or not self.padding:
            return None
        keys = torch.cat([valid.new_ones(len(valid), 1), attendable(valid)], dim=1)
        scores = torch.zeros(keys.shape, device=keys.device).masked_fill(~keys, -torch.inf)
        heads = self.net.transformer.resblocks[0].attn.num_heads
        return scores[:, None, None].expand(-1, heads, keys.shape[1], -1).flatten(0, 1)

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        """Any subset of the tokens of `embed` -> Features; places where `valid` is False are not attended to."""
        if not self.subsets:
            return super().encode(tokens, valid)
        if valid is not None and not self.padding:
            raise TypeError(f"{self.model} attends to every token that it is given")
        return self._encode(tokens, (), valid)

    def _encode(self, tokens: Tensor, grid: tuple[int, ...], valid: Tensor | None) -> Features:
        return self._end(self.net.transformer(self._start(tokens), attn_mask=self._unseen(valid)), grid, valid)

    def _end(self, x: Tensor, grid: tuple[int, ...], valid: Tensor | None) -> Features:
        net = self.net
        if net.attn_pool is not None:
            pooled, tokens = net._pool(x)
            grid, valid = (1, tokens.shape[1]), None
        else:
            x = x if net.final_ln_after_pool else net.ln_post(x)
            tokens = x[:, 1:]
            pooled = x[:, 0] if net.pool_type == "tok" else masked_mean(tokens, valid)
            if net.final_ln_after_pool:
                pooled, tokens = net.ln_post(pooled), net.ln_post(tokens)
        if net.proj is not None:
            pooled, tokens = pooled @ net.proj, tokens @ net.proj
        return Features(tokens, pooled, grid, valid)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Pictures -> Features; see the base class."""
        grid = self._grid(x)
        return self._encode(self._embed(x), grid, places(valid, grid))

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are the output of every block; see the base class."""
        grid = self._grid(x)
        valid = places(valid, grid)
        tokens, unseen = self._start(self._embed(x)), self._unseen(valid)
        depths = {}
        for i, block in enumerate(self.net.transformer.resblocks):
            tokens = block(tokens, attn_mask=unseen)
            depths[f"resblocks.{i}"] = at_depth(tokens[:, 1:], grid, valid)
        return self._end(tokens, grid, valid), depths


class OpenClipResNet(_Tower):
    """CLIP's residual network, which pools by attention."""

    def _maps(self, x: Tensor) -> dict[str, Tensor]:
        x = self.net.stem(x)
        maps = {"stem": x}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = maps[name] = getattr(self.net, name)(x)
        return maps

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Pictures -> Features; a token is the value that the pooling's attention takes from a place."""
        return self._features(self._maps(x)["layer4"], valid)

    def _features(self, last: Tensor, valid: Tensor | None) -> Features:
        pool = self.net.attnpool
        tokens = pool.c_proj(pool.v_proj(last.flatten(2).transpose(1, 2)))
        grid = tuple(last.shape[2:])
        return Features(tokens, pool(last), grid, places(valid, grid))

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are stem and stages; see the base class."""
        maps = self._maps(x)
        depths = {
            name: at_depth(value.flatten(2).transpose(1, 2), tuple(value.shape[2:]), places(valid, value.shape[2:]))
            for name, value in maps.items()
        }
        return self._features(maps["layer4"], valid), depths


class OpenClipTimm(_Tower, TimmTrunk):
    """A network of timm as image tower (SigLIP, ConvNeXt CLIPs)."""

    def __init__(self, net: Any, model: str, kwargs: Mapping[str, Any]) -> None:
        super().__init__(net, model, kwargs)
        self._find_layout()
        pointwise = all(isinstance(layer, nn.Linear | nn.Dropout | Mlp) for layer in net.head)
        if not pointwise or (len(net.head) == 0 and self._width != self.dim):
            raise RecipeError(f"model '{model}': its image tower gives no tokens as wide as its output")

    @property
    def trunk(self) -> Any:
        """The network of timm inside."""
        return self.net.trunk

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Pictures -> Features; see the base class."""
        return self._through_head(super().forward(x, valid))

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """See the base class."""
        features, depths = super().forward_layers(x, valid)
        return self._through_head(features), depths

    def _through_head(self, features: Features) -> Features:
        return features._replace(tokens=self.net.head(features.tokens), pooled=self.net.head(features.pooled))
