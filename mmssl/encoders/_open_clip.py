"""Towers of open_clip: one of the two networks of a CLIP, and CLIPs put together from two of them."""

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
from open_clip.transformer import TextTransformer, VisionTransformer
from safetensors.torch import save_file
from timm.layers import Mlp, resample_abs_pos_embed
from torch import Tensor, nn

from mmssl.encoders._timm import TimmBackbone
from mmssl.encoders.backbones import (
    LOCAL_DIR,
    Pretrained,
    VisionBackbone,
    build_errors,
    native_state,
    nearest_model,
    read_config,
    write_json,
)
from mmssl.encoders.base import Features
from mmssl.errors import RecipeError, nearest
from mmssl.media.text import Tokenizer

SECTIONS = ("vision_cfg", "text_cfg")
KEYS = ("embed_dim", "quick_gelu", *SECTIONS)


def configuration(name: str, kwargs: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The named CLIP's configuration with the given differences, as `CustomTextCLIP` takes it.

    Raises:
        RecipeError: for an unknown name or key.
    """
    config = open_clip.get_model_config(name) if ":" not in name else None
    if config is None:
        hint = nearest_model(name, open_clip.list_models(), "open_clip.list_models()")
        raise RecipeError(f"model '{model}': open_clip has no such model{hint}")
    config = {key: copy.deepcopy(config[key]) for key in KEYS if key in config}
    for key, value in kwargs.items():
        if key not in KEYS:
            raise RecipeError(f"{model}: unknown key '{key}'{nearest(key, KEYS)}")
        config[key] = {**config[key], **value} if key in SECTIONS else value
    config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    return config


def build(name: str, pretrained: Pretrained, kwargs: Mapping[str, Any], model: str) -> tuple[nn.Module, dict[str, Any]]:
    """A whole CLIP with separate towers, and the differences that build it again.

    Raises:
        RecipeError: where a value does not fit, or there are no such weights.
    """
    differences = dict(kwargs)
    if isinstance(pretrained, str) and pretrained.startswith(LOCAL_DIR):
        stored = read_config(pretrained.removeprefix(LOCAL_DIR), "open_clip_config.json")["model_cfg"]
        differences = {key: stored[key] for key in KEYS if key in stored} | differences
    config = configuration(name, differences, model)
    with build_errors(model, lambda owner: getattr(open_clip, owner).__dataclass_fields__):
        if not pretrained:
            return CustomTextCLIP(**config), differences
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is True:
            raise RecipeError(f"{model}: pretrained: open_clip has no default weights; name one of: {', '.join(tags)}")
        if pretrained.startswith(LOCAL_DIR):
            return open_clip.create_model(pretrained, force_custom_text=True, require_pretrained=True), differences
        if pretrained not in tags and not Path(pretrained).is_file():
            raise RecipeError(f"{model}: pretrained: there are no weights '{pretrained}'{nearest(pretrained, tags)}")
        clip = open_clip.create_model(
            name, pretrained=pretrained, force_custom_text=True, require_pretrained=True, **config
        )
        return clip, differences


def create_open_clip(name: str, pretrained: Pretrained, kwargs: Mapping[str, Any]) -> VisionBackbone:
    """Build the image tower of `open_clip/name`; see `mmssl.encoders.backbones.create_vision`."""
    model = f"open_clip/{name}"
    clip, differences = build(name, pretrained, kwargs, model)
    net = clip.visual
    kinds = {VisionTransformer: OpenClipTransformer, ModifiedResNet: OpenClipResNet, TimmModel: OpenClipTimm}
    if type(net) not in kinds:
        raise RecipeError(f"model '{model}': its image tower, a {type(net).__name__}, is not supported")
    backbone: VisionBackbone = kinds[type(net)](net, model, differences)
    return backbone


class _Tower(VisionBackbone):
    """What image towers share. Tokens pass the tower's projection, so that they are as wide as its output."""

    def __init__(self, net: nn.Module, model: str, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.net, self.model, self.kwargs = net, model, dict(kwargs)
        self.mean = tuple(getattr(net, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN)
        self.std = tuple(getattr(net, "image_std", None) or open_clip.OPENAI_DATASET_STD)
        self.config = configuration(model.partition("/")[2], kwargs, model)
        self.dim = int(self.config["embed_dim"])

    def export(self, directory: Path, preprocessing: Mapping[str, Any]) -> None:
        """A whole CLIP whose text tower has random weights; `open_clip.create_model("local-dir:" + directory)` loads it."""
        clip = CustomTextCLIP(**copy.deepcopy(self.config))
        clip.visual.load_state_dict(self.net.state_dict())
        write_clip(directory, clip, self.config, preprocessing, random="text tower and logit scale")


class OpenClipTransformer(_Tower):
    """CLIP's own vision transformer."""

    def __init__(self, net: nn.Module, model: str, kwargs: Mapping[str, Any]) -> None:
        super().__init__(net, model, kwargs)
        if self.config["vision_cfg"].get("patch_dropout"):
            raise RecipeError(f"{model}: patch_dropout is not for an encoder: it keeps all its patches")
        # Attentional pooling (CoCa) answers queries: what comes out has no places.
        self.subsets, self.patch_size = net.attn_pool is None, net.patch_size

    def embed(self, x: Tensor) -> Tensor:
        """Pictures -> tokens (B, h·w, D_in) with their positional embedding, resampled for other sizes."""
        if not self.subsets:
            return super().embed(x)
        return self._embed(x)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        return x.shape[-2] // self.net.patch_size[0], x.shape[-1] // self.net.patch_size[1]

    def _embed(self, x: Tensor) -> Tensor:
        positions = resample_abs_pos_embed(
            self.net.positional_embedding[None, 1:],
            new_size=list(self._grid(x)),
            old_size=list(self.net.grid_size),
            num_prefix_tokens=0,
        )
        return self.net.conv1(x).flatten(2).transpose(1, 2) + positions

    def _start(self, tokens: Tensor) -> Tensor:
        front = self.net.class_embedding + self.net.positional_embedding[0]
        x: Tensor = self.net.ln_pre(torch.cat([front.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], dim=1))
        return x

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Features:
        """Any subset of the tokens of `embed` -> Features."""
        if not self.subsets:
            return super().encode(tokens, mask)
        if mask is not None:
            raise TypeError(f"{self.model} attends to every token it is given")
        return self._encode(tokens, ())

    def _encode(self, tokens: Tensor, grid: tuple[int, ...]) -> Features:
        net = self.net
        pooled, tokens = net._pool(net.transformer(self._start(tokens)))
        if net.final_ln_after_pool and net.attn_pool is None:
            tokens = net.ln_post(tokens)
        if net.proj is not None:
            pooled, tokens = pooled @ net.proj, tokens @ net.proj
        return Features(tokens, pooled, grid if net.attn_pool is None else (1, tokens.shape[1]))

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Features:
        """Pictures -> Features; see the base class."""
        return self._encode(self._embed(x), self._grid(x))

    def layers(self, x: Tensor, columns: Tensor | None = None) -> dict[str, Tensor]:
        """Every block, averaged over its patches; see the base class."""
        tokens = self._start(self._embed(x))
        depths = {}
        for i, block in enumerate(self.net.transformer.resblocks):
            tokens = block(tokens)
            depths[f"resblocks.{i}"] = tokens[:, 1:].mean(dim=1)
        return depths


class OpenClipResNet(_Tower):
    """CLIP's residual network, which pools by attention."""

    def _maps(self, x: Tensor) -> dict[str, Tensor]:
        x = self.net.stem(x)
        maps = {"stem": x}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = maps[name] = getattr(self.net, name)(x)
        return maps

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Features:
        """Pictures -> Features; a token is the value that the pooling's attention takes from a place."""
        last = self._maps(x)["layer4"]
        pool = self.net.attnpool
        tokens = pool.c_proj(pool.v_proj(last.flatten(2).transpose(1, 2)))
        return Features(tokens, pool(last), tuple(last.shape[2:]))

    def layers(self, x: Tensor, columns: Tensor | None = None) -> dict[str, Tensor]:
        """Stem and stages, averaged; see the base class."""
        return {name: value.mean(dim=(2, 3)) for name, value in self._maps(x).items()}


class OpenClipTimm(_Tower, TimmBackbone):
    """A network of timm as image tower (SigLIP, ConvNeXt CLIPs)."""

    def __init__(self, net: nn.Module, model: str, kwargs: Mapping[str, Any]) -> None:
        _Tower.__init__(self, net, model, kwargs)
        self._find_layout()
        pointwise = all(isinstance(layer, nn.Linear | nn.Dropout | Mlp) for layer in net.head)
        if not pointwise or (len(net.head) == 0 and self._width != self.dim):
            raise RecipeError(f"model '{model}': its image tower gives no tokens as wide as its output")

    @property
    def trunk(self) -> nn.Module:
        """The network of timm inside."""
        return self.net.trunk

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Features:
        """Pictures -> Features; see the base class."""
        features = TimmBackbone.forward(self, x, columns)
        return features._replace(tokens=self.net.head(features.tokens), pooled=self.net.head(features.pooled))


class OpenClipText(nn.Module):
    """The text tower of a CLIP, pooled as its configuration says.

    A tokenizer other than open_clip's own changes the size of the vocabulary, and the place that is pooled: its end
    token instead of the highest id.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, pretrained: Pretrained, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = f"open_clip/{name}"
        clip, self.kwargs = build(name, pretrained, _with_vocabulary(name, tokenizer, kwargs, self.model), self.model)
        self.config = configuration(name, self.kwargs, self.model)
        self.net = clip.text
        if not isinstance(self.net, TextTransformer):
            raise RecipeError(f"model '{self.model}': its text tower is of transformers; build it as transformers/...")
        if self.net.vocab_size < tokenizer.vocab_size:
            raise RecipeError(
                f"{self.model}: {self.net.vocab_size} embeddings, but the tokenizer has {tokenizer.vocab_size} ids"
            )
        self.dim, self.pooling = int(self.config["embed_dim"]), self.net.pool_type

    @property
    def token_embedding(self) -> nn.Parameter:
        """Weight of the input embedding."""
        weight: nn.Parameter = self.net.token_embedding.weight
        return weight

    def _pad(self, ids: Tensor) -> Tensor:
        """Ids as long as the tower's context, which its attention masks have."""
        room = self.net.context_length - ids.shape[1]
        if room < 0:
            raise RecipeError(
                f"{self.model} reads {self.net.context_length} ids, got {ids.shape[1]}: "
                "lower text.length or raise text_cfg.context_length"
            )
        return nn.functional.pad(ids, (0, room), value=self.net.pad_id)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) -> tokens (B, L, D), pooled (B, D)."""
        output = self.net.forward_intermediates(self._pad(ids), indices=1, output_fmt="NLC")
        tokens = self.net.ln_final(output["text_intermediates"][0][:, : ids.shape[1]])
        projection = self.net.text_projection
        if projection is not None:
            tokens = projection(tokens) if isinstance(projection, nn.Module) else tokens @ projection
        return tokens, output["text_features"]

    def depths(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Tokens behind every block."""
        maps = self.net.forward_intermediates(self._pad(ids), intermediates_only=True, output_fmt="NLC")[
            "text_intermediates"
        ]
        return {f"resblocks.{i}": tokens[:, : ids.shape[1]] for i, tokens in enumerate(maps)}

    def export(self, directory: Path, tokenizer: Tokenizer) -> None:
        """A whole CLIP whose image tower has random weights; `open_clip.create_model("local-dir:" + directory)` loads it."""
        clip = CustomTextCLIP(**copy.deepcopy(self.config))
        clip.text.load_state_dict(self.net.state_dict())
        tokenizer.save(directory)
        write_clip(directory, clip, self.config, {}, random="image tower and logit scale")


def _with_vocabulary(name: str, tokenizer: Tokenizer, kwargs: Mapping[str, Any], model: str) -> dict[str, Any]:
    """`kwargs` with the tokenizer's vocabulary in `text_cfg`, where it is not open_clip's own."""
    default = configuration(name, kwargs, model)["text_cfg"]
    if default.get("vocab_size", 49408) == tokenizer.vocab_size:
        return dict(kwargs)
    ids, mask = tokenizer("", 8)
    vocabulary = {
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "eos_id": int(ids[mask][-1]),
        "pool_type": "eos",
        # open_clip then reads the tokenizer of the directory that the model is in.
        "hf_tokenizer_name": "local",
    }
    return {**kwargs, "text_cfg": {**vocabulary, **kwargs.get("text_cfg", {})}}


def write_clip(
    directory: Path, clip: nn.Module, config: Mapping[str, Any], preprocessing: Mapping[str, Any], random: str = ""
) -> None:
    """Write `open_clip_config.json` and `open_clip_model.safetensors`; `random` says which weights are not trained."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(native_state(clip), directory / "open_clip_model.safetensors")
    normalisation = {key: list(preprocessing[key]) for key in ("mean", "std") if key in preprocessing}
    content = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": normalisation}
    if random:
        content["untrained"] = random
    write_json(directory / "open_clip_config.json", content)
