"""Whole CLIPs of open_clip: their configuration, weights and files. An encoder is one of the two networks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from torch import nn

from mmssl.encoders.backbones._files import LOCAL_DIR, native_state, read_config, write_json
from mmssl.encoders.backbones.base import Pretrained, build_errors, nearest_model
from mmssl.errors import RecipeError, nearest

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


def write_clip(
    directory: Path, clip: nn.Module, config: Mapping[str, Any], preprocessing: Mapping[str, Any], random: str = ""
) -> None:
    """Write `open_clip_config.json` and `open_clip_model.safetensors`; `random` says which weights are not trained."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(native_state(clip), directory / "open_clip_model.safetensors")
    pictures: dict[str, Any] = {key: list(preprocessing[key]) for key in ("mean", "std") if key in preprocessing}
    if pictures:
        fit = preprocessing.get("decoding", {}).get("fit", "crop")
        pictures |= {"interpolation": "bicubic", "resize_mode": "longest" if fit == "pad" else "shortest"}
        pictures |= {"fill_color": 255}
    content: dict[str, Any] = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": pictures}
    if preprocessing.get("origin"):
        content["origin"] = dict(preprocessing["origin"])
    if random:
        content["untrained"] = random
    write_json(directory / "open_clip_config.json", content)
