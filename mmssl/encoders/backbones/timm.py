"""Image networks of timm: any of them whole, plain vision transformers token by token."""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import Attention, resample_abs_pos_embed
from timm.models import VisionTransformer, save_for_hf
from torch import Tensor, nn

from mmssl.encoders.backbones._files import LOCAL_DIR, read_config, write_json
from mmssl.encoders.backbones._timm_start import STARTS, start_as_published
from mmssl.encoders.backbones.base import (
    Backbone,
    Library,
    Pretrained,
    build_errors,
    nearest_model,
    refuse,
    refuse_path,
)
from mmssl.encoders.base import Features, at_depth, attendable, hide, masked_mean, places
from mmssl.errors import RecipeError

# What a configuration says of weights, and of pictures of their size, that an encoder does not have any more.
OF_TIMMS_WEIGHTS = {
    *("tag", "license", "origin_url", "paper_name", "paper_ids", "notes", "hf_hub_id", "url", "file", "pool_size"),
    *("test_input_size", "test_crop_pct", "min_input_size", "label_names", "label_descriptions"),
}


class TimmTrunk(Backbone):
    """Forward of any network of timm that has `forward_features`, `forward_head` and `forward_intermediates`.

    Some heads (MobileNetV3) have a layer between pooling and classifier; it then is applied to every place, so that
    tokens and pooled vector are of one width.
    """

    def _find_layout(self) -> None:
        trunk = self.trunk
        self._prefix = int(getattr(trunk, "num_prefix_tokens", 0))
        self._channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        self._width = int(getattr(trunk, "head_hidden_size", trunk.num_features))
        self._head_widens = self._width != trunk.num_features

    @property
    def trunk(self) -> Any:
        """The network of timm: the module itself, unless another library wraps it."""
        return self.net

    @property
    def undecayed(self) -> Iterable[nn.Parameter]:
        """Those that timm names in `no_weight_decay`."""
        names = self.trunk.no_weight_decay() if hasattr(self.trunk, "no_weight_decay") else ()
        return [parameter for name, parameter in self.trunk.named_parameters() if name in names]

    def _map(self, x: Tensor, features: Any) -> tuple[Tensor, tuple[int, ...]]:
        """Features in the library's own layout, and the extent of their places; `()` where that is not known."""
        if not isinstance(features, Tensor):
            raise RecipeError(f"model '{self.model}' has several maps at its end, which are not tokens of one grid")
        if features.ndim == 4:
            return features, tuple(features.shape[1:3] if self._channels_last else features.shape[2:])
        number = features.shape[1] - self._prefix
        embedding: Any = getattr(self.trunk, "patch_embed", None)
        if hasattr(embedding, "dynamic_feat_size"):
            height, width = embedding.dynamic_feat_size(x.shape[-2:])
            if height * width == number:
                return features, (height, width)
        return features, ()

    def _tokens(self, features: Tensor) -> Tensor:
        if features.ndim == 3:
            return features[:, self._prefix :]
        return features.flatten(1, 2) if self._channels_last else features.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Pictures (B, C, H, W) -> Features; see the base class."""
        return self._features(*self._map(x, self.trunk.forward_features(x)), valid)

    def _features(self, features: Tensor, grid: tuple[int, ...], valid: Tensor | None) -> Features:
        if valid is not None and not grid:
            raise RecipeError(f"model '{self.model}' tells no grid of its tokens, so that padding cannot be masked")
        valid = places(valid, grid)
        if valid is not None:
            features = self._fill(features, valid)
        pooled: Tensor = self.trunk.forward_head(features, pre_logits=True)
        tokens = self._tokens(features)
        if self._head_widens:
            tokens = self._tokens_through_head(tokens)
        return Features(tokens, pooled, grid or (1, tokens.shape[1]), valid)

    def _fill(self, features: Tensor, valid: Tensor) -> Tensor:
        """Put the mean of the valid places into the others, so that the library's own average pooling skips them."""
        tokens = self._tokens(features)
        filled = torch.where(valid.unsqueeze(2), tokens, masked_mean(tokens, valid).unsqueeze(1))
        if features.ndim == 3:
            return torch.cat([features[:, : self._prefix], filled], dim=1)
        if self._channels_last:
            return filled.reshape(features.shape)
        return filled.transpose(1, 2).reshape(features.shape)

    def _tokens_through_head(self, tokens: Tensor) -> Tensor:
        shape = (1, 1, tokens.shape[2]) if self._channels_last else (tokens.shape[2], 1, 1)
        single = tokens.flatten(0, 1).reshape(-1, *shape)
        return self.trunk.forward_head(single, pre_logits=True).unflatten(0, tokens.shape[:2])

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are the maps of `forward_intermediates`; see the base class."""
        features, maps = self.trunk.forward_intermediates(x)
        names = [info["module"] for info in self.trunk.feature_info]
        if len(names) != len(maps):
            names = [f"depth{i}" for i in range(len(maps))]
        depths = {
            name: at_depth(value.flatten(2).transpose(1, 2), tuple(value.shape[2:]), places(valid, value.shape[2:]))
            for name, value in zip(names, maps, strict=True)
        }
        return self._features(*self._map(x, features), valid), depths


class TimmNetwork(TimmTrunk):
    """A network of timm, whole."""

    def __init__(self, net: Any, model: str, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.net, self.model, self.kwargs = net, model, dict(kwargs)
        self._find_layout()
        self.dim = self._width
        self.channels = int(kwargs.get("in_chans", 3))
        config = net.pretrained_cfg
        built = getattr(getattr(net, "patch_embed", None), "img_size", None)
        self.size = int((built or config["input_size"][1:])[0])
        if self.channels == 3:
            self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        else:
            self.mean, self.std = (0.5,) * self.channels, (0.5,) * self.channels

    def export(self, directory: Path, preprocessing: Mapping[str, Any]) -> None:
        """`timm.create_model("local-dir:" + directory, pretrained=True)` loads it, constructor arguments included.

        `timm.data.resolve_model_data_config` of it is what the network was trained with. What timm's own weights of
        that name are and who may use them is left out.
        """
        net = copy.deepcopy(self.net).to(memory_format=torch.contiguous_format)
        constants = {key: list(preprocessing[key]) for key in ("mean", "std")}
        net.pretrained_cfg = {**net.pretrained_cfg, **constants}  # of three channels timm warns where there is one
        save_for_hf(
            net,
            directory,
            # How weights started is no business of who loads them.
            model_args={key: value for key, value in self.kwargs.items() if key != "weight_init"},
            safe_serialization=True,
        )
        path = directory / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        origin, mode = preprocessing.get("origin", {}), preprocessing.get("decoding", {}).get("fit", "crop")
        about = {key: value for key, value in config["pretrained_cfg"].items() if key not in OF_TIMMS_WEIGHTS}
        about |= {
            **constants,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "border" if mode == "pad" else "center",
        }
        if "input_size" in preprocessing:
            about["input_size"] = list(preprocessing["input_size"])
        if "license" in origin:
            about["license"] = origin["license"]
        if origin:
            about["notes"] = [f"trained with mmssl, {key.replace('_', ' ')}: {value}" for key, value in origin.items()]
        write_json(path, {**config, "pretrained_cfg": about})


class TimmTransformer(TimmNetwork):
    """timm's VisionTransformer, cut between its embedding and its blocks."""

    subsets = True
    patch_size: tuple[int, int]

    def __init__(self, net: Any, model: str, kwargs: Mapping[str, Any]) -> None:
        super().__init__(net, model, kwargs)
        self.patch_size, self.width = tuple(net.patch_embed.patch_size), int(net.embed_dim)

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Positional embedding (1, P + h·w, D), resampled where the grid is not the one the network was built with."""
        if self.net.pos_embed is None:
            return None
        positions: Tensor = resample_abs_pos_embed(
            self.net.pos_embed,
            new_size=list(grid),
            old_size=list(self.net.patch_embed.grid_size),
            num_prefix_tokens=self._embedded_prefix,
        )
        return positions

    @property
    def _embedded_prefix(self) -> int:
        """Number of prefix tokens that have a positional embedding."""
        return 0 if self.net.no_embed_class else self._prefix

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Pictures (B, C, H, W) -> tokens (B, h·w, D) with their positional embedding, without class token."""
        tokens: Tensor = self.net.patch_embed(x)
        grid = self.net.patch_embed.dynamic_feat_size(x.shape[-2:])
        if tokens.ndim == 4:
            tokens = tokens.flatten(1, 2)
        tokens = hide(tokens, hidden, mask_token)
        positions = self._positions(grid)
        return tokens if positions is None else tokens + positions[:, self._embedded_prefix :]

    def _start(self, tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Input of the first block, prefix tokens in front, and the keywords of every block."""
        net = self.net
        prefix = [token for token in (net.cls_token, net.reg_token) if token is not None]
        if prefix:
            front = torch.cat(prefix, dim=1)
            if net.pos_embed is not None and not net.no_embed_class:
                front = front + net.pos_embed[:, : self._prefix]
            tokens = torch.cat([front.expand(len(tokens), -1, -1), tokens], dim=1)
        x = net.norm_pre(net.pos_drop(tokens))
        if valid is None:
            return x, {}
        keys = torch.cat([valid.new_ones(len(valid), self._prefix), attendable(valid)], dim=1)
        return x, {"attn_mask": keys[:, None, None, :]}

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        """Any subset of the tokens of `embed` -> Features; places where `valid` is False are not attended to."""
        x, keywords = self._start(tokens, valid)
        if keywords:
            for block in self.net.blocks:
                x = block(x, **keywords)
        else:
            x = self.net.blocks(x)
        return self._end(x, valid, ())

    def _end(self, x: Tensor, valid: Tensor | None, grid: tuple[int, ...]) -> Features:
        x = self.net.norm(x)
        if valid is not None:
            x = self._fill(x, valid)
        return Features(x[:, self._prefix :], self.net.forward_head(x, pre_logits=True), grid, valid)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """`encode` of all tokens; see the base class."""
        grid = self.net.patch_embed.dynamic_feat_size(x.shape[-2:])
        return self.encode(self.embed(x), places(valid, grid))._replace(grid=tuple(grid))

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are the output of every block; see the base class."""
        grid = tuple(self.net.patch_embed.dynamic_feat_size(x.shape[-2:]))
        valid = places(valid, grid)
        tokens, keywords = self._start(self.embed(x), valid)
        depths = {}
        for i, block in enumerate(self.net.blocks):
            tokens = block(tokens, **keywords)
            depths[f"blocks.{i}"] = at_depth(tokens[:, self._prefix :], grid, valid)
        return self._end(tokens, valid, grid), depths

    def attention(self, x: Tensor, valid: Tensor | None = None) -> Tensor | None:
        """That of the last block, averaged over its heads; see the base class."""
        last = self.net.blocks[-1].attn
        if self.net.global_pool != "token" or not isinstance(last, Attention):
            return None
        fused, last.fused_attn = last.fused_attn, False  # the fused kernel shows its weights to nobody
        found: list[Tensor] = []
        hook = last.attn_drop.register_forward_pre_hook(lambda module, given: found.append(given[0]))
        self(x, valid)
        hook.remove()
        last.fused_attn = fused
        return found[0].mean(1)[:, 0, self._prefix :]


def _weights(name: str, pretrained: Pretrained, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constructor arguments stored with the weights, and timm's own keywords for where the weights are."""
    if not isinstance(pretrained, str):
        return {}, {"model_name": name, "pretrained": bool(pretrained)}
    if pretrained.startswith(LOCAL_DIR):
        directory = Path(pretrained.removeprefix(LOCAL_DIR))
        config = read_config(directory, "config.json")
        if config.get("architecture") != name.partition(".")[0]:
            raise RecipeError(f"{model}: pretrained: {directory} holds a {config.get('architecture')}")
        overlay = {"file": str(directory / "model.safetensors"), "num_classes": config.get("num_classes", 1000)}
        overlay |= {key: config["pretrained_cfg"][key] for key in ("mean", "std")}
        stored = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
        return stored, {"model_name": name, "pretrained": True, "pretrained_cfg_overlay": overlay}
    if Path(pretrained).is_file():
        return {}, {"model_name": name, "pretrained": True, "pretrained_cfg_overlay": {"file": pretrained}}
    refuse_path(model, pretrained)
    return {}, {"model_name": f"{name.partition('.')[0]}.{pretrained}", "pretrained": True}


class Timm(Library):
    """Image networks of timm: any of them whole, plain vision transformers token by token."""

    # An encoder has no classifier, keeps all its patches and gives one map; `pretrained` says where weights are from.
    refused = ("num_classes", "patch_drop_rate", "features_only", *inspect.signature(timm.create_model).parameters)
    modalities = ("image", "audio", "video")

    @staticmethod
    def create(
        name: str, modality: str, pretrained: Pretrained, kwargs: Mapping[str, Any], **options: Any
    ) -> TimmNetwork:
        """See the base class. Transformers that can be built for pictures of several sizes are (`dynamic_img_size`).

        `weight_init` of a plain transformer may be `mae` or `moco_v3`, too; see `start_as_published`.
        """
        model = f"timm/{name}"
        if not timm.is_model(name):
            known = timm.list_models() + timm.list_models(pretrained=True) if "." in name else timm.list_models()
            raise RecipeError(
                f"model '{model}': timm has no such network{nearest_model(name, known, 'timm.list_models()')}"
            )
        arguments, source = _weights(name, pretrained, model)
        if modality == "audio":
            arguments["in_chans"] = 1
        arguments.update(kwargs)
        refuse(model, arguments)
        if arguments.get("global_pool") in ("", "catavgmax"):
            raise RecipeError(
                f"{model}: global_pool = {arguments['global_pool']!r} gives no vector of the tokens' width"
            )

        def keywords_of(owner: str) -> Iterable[str]:
            function = timm.model_entrypoint(name)
            network = getattr(sys.modules[function.__module__], owner, None)
            return [] if network is None else set(inspect.signature(network).parameters) - {"num_classes", "kwargs"}

        start = arguments.pop("weight_init") if arguments.get("weight_init") in STARTS else None
        with build_errors(model, keywords_of):
            try:
                arguments = {"dynamic_img_size": True, **arguments}
                net = timm.create_model(**source, num_classes=0, **arguments)
            except TypeError as error:
                if "dynamic_img_size" not in str(error) or "dynamic_img_size" in kwargs:
                    raise
                del arguments["dynamic_img_size"]
                net = timm.create_model(**source, num_classes=0, **arguments)
        if start is not None:
            arguments["weight_init"] = start
            if not pretrained:
                start_as_published(net, start, model)
        plain = isinstance(net, VisionTransformer) and all(
            getattr(type(net), method) is getattr(VisionTransformer, method)
            for method in ("_pos_embed", "forward_features")
        )
        if not plain:
            return TimmNetwork(net, model, arguments)
        backbone = TimmTransformer(net, model, arguments)
        size = net.patch_embed.img_size
        if any(pixels % patch for pixels, patch in zip(size, backbone.patch_size, strict=True)):
            raise RecipeError(f"{model}: img_size {size} cannot be cut into patches of {backbone.patch_size}")
        return backbone
