"""Towers of open_clip: one of the two networks of a CLIP, and CLIPs put together from two of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor, nn

from mmssl.encoders.backbones import (
    LOCAL_DIR,
    Pretrained,
    build_errors,
    native_state,
    nearest_model,
    read_config,
    write_json,
)
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError, nearest
from mmssl.media.text import Tokenizer

SECTIONS = ("vision_cfg", "text_cfg")
KEYS = ("embed_dim", "quick_gelu", *SECTIONS)


def configuration(name: str, kwargs: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The named CLIP's configuration with the given differences, as `CustomTextCLIP` takes it.

    Raises:
        RecipeError: for an unknown name or key.
    """
    config = open_clip.get_model_config(name)
    if config is None:
        hint = nearest_model(name, open_clip.list_models(), "open_clip.list_models()")
        raise RecipeError(f"model '{model}': open_clip has no such model{hint}")
    for key in kwargs:
        if key not in KEYS:
            raise RecipeError(f"{model}: unknown key '{key}'{nearest(key, KEYS)}")
    config = merge({key: config[key] for key in KEYS if key in config}, kwargs)
    config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        raise RecipeError(
            f"model '{model}': its text tower is of transformers; build the two apart, as transformers/..."
        )
    return config


def merge(config: Mapping[str, Any], differences: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `differences`, key by key inside the two sections; a copy."""
    inner = {key: {**config.get(key, {}), **differences.get(key, {})} for key in SECTIONS}
    return copy.deepcopy({**config, **differences, **{key: value for key, value in inner.items() if value}})


def build(name: str, pretrained: Pretrained, kwargs: Mapping[str, Any], model: str) -> tuple[Any, dict[str, Any]]:
    """A whole CLIP with separate towers, and the differences that build it again.

    Raises:
        RecipeError: where a value does not fit, or there are no such weights.
    """
    differences = dict(kwargs)
    if isinstance(pretrained, str) and pretrained.startswith(LOCAL_DIR):
        stored = read_config(pretrained.removeprefix(LOCAL_DIR), "open_clip_config.json")["model_cfg"]
        differences = merge({key: stored[key] for key in KEYS if key in stored}, differences)
    config = configuration(name, differences, model)
    with build_errors(model, lambda owner: getattr(open_clip, owner).__dataclass_fields__):
        if not pretrained:
            return CustomTextCLIP(**config), differences
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is True:
            raise RecipeError(f"{model}: pretrained: open_clip has no default weights{nearest('', tags[:9])}")
        if pretrained.startswith(LOCAL_DIR):
            return open_clip.create_model(
                pretrained, force_custom_text=True, require_pretrained=True, **config
            ), differences
        if pretrained not in tags and not Path(pretrained).is_file():
            raise RecipeError(f"{model}: pretrained: there are no weights '{pretrained}'{nearest(pretrained, tags)}")
        clip = open_clip.create_model(
            name, pretrained=pretrained, force_custom_text=True, require_pretrained=True, **config
        )
        return clip, differences


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
        self.net: Any = clip.text
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

    def forward(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) -> tokens (B, L, D), pooled (B, D)."""
        output = self.net.forward_intermediates(self._pad(ids), indices=1, output_fmt="NLC")
        tokens = self.net.ln_final(output["text_intermediates"][0][:, : ids.shape[1]])
        projection = self.net.text_projection
        if projection is not None:
            tokens = projection(tokens) if isinstance(projection, nn.Module) else tokens @ projection
        return tokens, output["text_features"]

    def depths(self, ids: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Tokens after every block."""
        maps = self.net.forward_intermediates(self._pad(ids), intermediates_only=True, output_fmt="NLC")[
            "text_intermediates"
        ]
        return {f"resblocks.{i}": tokens[:, : ids.shape[1]] for i, tokens in enumerate(maps)}

    def export(self, directory: Path, tokenizer: Tokenizer) -> None:
        """A whole CLIP, its image tower with random weights: `open_clip.create_model("local-dir:" + directory)`."""
        clip = CustomTextCLIP(**copy.deepcopy(self.config))
        clip.text.load_state_dict(self.net.state_dict())
        tokenizer.save(directory)
        write_clip(directory, clip, self.config, {}, random="image tower and logit scale")


def _with_vocabulary(name: str, tokenizer: Tokenizer, kwargs: Mapping[str, Any], model: str) -> dict[str, Any]:
    """`kwargs` with the tokenizer's vocabulary in `text_cfg`, where it is not open_clip's own."""
    default = configuration(name, kwargs, model)["text_cfg"]
    if default.get("vocab_size", 49408) == tokenizer.vocab_size:
        return dict(kwargs)
    ids, valid = tokenizer("", 8)
    vocabulary = {
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "eos_id": int(ids[valid][-1]),
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
    normalization = {key: list(preprocessing[key]) for key in ("mean", "std") if key in preprocessing}
    content: dict[str, Any] = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": normalization}
    if random:
        content["untrained"] = random
    write_json(directory / "open_clip_config.json", content)


def export_clip_pair(
    image: Encoder,
    text: Encoder,
    directory: str | Path,
    logit_scale: Tensor | float | None = None,
    logit_bias: Tensor | float | None = None,
) -> None:
    """Write an image and a text tower as one CLIP: `open_clip.create_model("local-dir:" + directory)` loads it.

    Args:
        image: an image encoder `open_clip/...`.
        text: a text encoder `open_clip/...`; the two agree in `embed_dim` and `quick_gelu`.
        directory: made if missing.
        logit_scale: logarithm of the factor on cosine similarities, as CLIP stores it; ln(1 / 0.07) by default.
        logit_bias: added to them (SigLIP); none if left out.

    Raises:
        RecipeError: where the towers do not make one CLIP.
    """
    directory = Path(directory)
    towers: list[Any] = [image.backbone, text.backbone]
    seen, read = (getattr(tower, "config", None) for tower in towers)
    if seen is None or read is None or image.modality != "image" or text.modality != "text":
        raise RecipeError("one CLIP is made of an image and a text encoder that are both open_clip/...")
    for key in ("embed_dim", "quick_gelu"):
        if seen.get(key) != read.get(key):
            raise RecipeError(f"the two towers make no CLIP: {key} is {seen.get(key)} and {read.get(key)}")
    config = {**seen, "text_cfg": read["text_cfg"]}
    if logit_bias is not None:
        config["init_logit_bias"] = float(logit_bias)
    if logit_scale is not None:
        config["init_logit_scale"] = float(logit_scale)
    clip = CustomTextCLIP(**copy.deepcopy(config))
    clip.visual.load_state_dict(towers[0].net.state_dict())
    clip.text.load_state_dict(towers[1].net.state_dict())
    tokenizer: Tokenizer = text.spec["tokenizer"]
    tokenizer.save(directory)
    preprocessing = {"modality": "image and text", "mean": image.spec["mean"], "std": image.spec["std"]}
    write_clip(directory, clip, config, preprocessing)
    write_json(directory / "preprocessing.json", preprocessing)
