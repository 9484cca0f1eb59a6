"""How a network of transformers is built: random from a configuration, or from a folder or the Hub."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import CONFIG_MAPPING, AutoModel, FeatureExtractionMixin, PreTrainedConfig
from transformers.utils import logging

from mmssl.encoders.backbones._files import LOCAL_DIR, write_json
from mmssl.encoders.backbones.base import Backbone, Pretrained, build_errors, nearest_model
from mmssl.errors import RecipeError, nearest

# What every configuration has in addition to its own keys.
NOT_ARCHITECTURE = {
    *("transformers_version", "model_type", "architectures", "_name_or_path", "dtype", "return_dict", "problem_type"),
    *("id2label", "label2id", "output_hidden_states", "output_attentions", "is_encoder_decoder"),
    *("out_features", "out_indices", "_out_features", "_out_indices", "stage_names"),
    *("pooler_output_size", "pooler_act", "output_hidden_size"),
}


class TransformersNetwork(Backbone):
    """What all networks of transformers share.

    Attributes:
        processor: what the library's class that prepares the input is told in addition.
    """

    processor: ClassVar[Mapping[str, Any]] = {}

    @property
    def loads_with(self) -> dict[str, bool]:
        """What `AutoModel.from_pretrained` is to be called with so that it adds no layer that was not trained."""
        asks = "add_pooling_layer" in inspect.signature(type(self.net).__init__).parameters
        return {"add_pooling_layer": False} if asks and getattr(self.net, "pooler", None) is None else {}

    def export(self, directory: Path, preprocessing: Mapping[str, Any]) -> None:
        """`AutoModel.from_pretrained(directory)` loads it.

        By `preprocessor_config.json` the library's image processor or feature extractor makes what the network reads of
        pictures and clips of the run's size, and of sounds. Where the network has no pooler, `add_pooling_layer=False`
        keeps `AutoModel` from adding one.
        """
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self.net.save_pretrained(directory)
        finally:
            if shown:
                logging.enable_progress_bar()
        config = self._processor(preprocessing)
        if config:
            write_json(directory / "preprocessor_config.json", {**config, **self.processor})

    def _processor(self, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
        """What `preprocessor_config.json` holds; see `export`."""
        if self.reads in ("pictures", "clips"):
            constants = {"image_mean": list(preprocessing["mean"]), "image_std": list(preprocessing["std"])}
            scale = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
            return {**constants, **scale, "do_resize": False, "do_center_crop": False}
        if "rate" not in preprocessing:
            return {}
        heard: dict[str, Any] = {"feature_size": 1, "sampling_rate": preprocessing["rate"], "padding_value": 0.0}
        net = self.net.config
        if self.reads == "waveforms":
            heard |= {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": preprocessing["normalize"]}
            return heard | {"return_attention_mask": net.feat_extract_norm == "layer"}
        mean, std = preprocessing["mean"][0], preprocessing["std"][0] / 2  # the library divides by twice of it
        sizes = {"num_mel_bins": net.num_mel_bins, "max_length": net.max_length}
        return heard | sizes | {"feature_extractor_type": "ASTFeatureExtractor", "mean": mean, "std": std}


def preprocessor(pretrained: Pretrained) -> dict[str, Any]:
    """What a folder or the Hub says of the input that its weights expect; empty where it says nothing."""
    if not isinstance(pretrained, str):
        return {}
    try:
        stored, _ = FeatureExtractionMixin.get_feature_extractor_dict(pretrained.removeprefix(LOCAL_DIR))
    except (OSError, ValueError):
        return {}
    return dict(stored)


def normalization(
    pretrained: Pretrained, mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel: of the weights, else those given, of which the first serves other channels."""
    stored = preprocessor(pretrained)
    found = stored.get("image_mean", mean), stored.get("image_std", std)
    mean, std = (tuple(float(v) for v in values) for values in found)
    return (mean, std) if len(mean) == len(std) == channels else ((mean[0],) * channels, (std[0],) * channels)


def configuration(name: str) -> Any:
    """The class of a model type's configurations.

    Raises:
        RecipeError: for an unknown type.
    """
    if name not in CONFIG_MAPPING:
        hint = nearest_model(name, CONFIG_MAPPING.keys(), "transformers.CONFIG_MAPPING")
        raise RecipeError(
            f"model 'transformers/{name}': transformers has no such model type{hint}; weights of the Hub are "
            "'pretrained'"
        )
    return CONFIG_MAPPING[name]


def build(
    name: str,
    pretrained: Pretrained,
    kwargs: Mapping[str, Any],
    *,
    default: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
    unused: tuple[str, ...] = ("pooler.",),
    auto: Any = AutoModel,
) -> tuple[Any, dict[str, Any]]:
    """A network, and the keys of the configuration that build it again.

    Args:
        name: model type, for instance `bert` or `dinov2`.
        pretrained: False, a name on the Hub or `local-dir:...`.
        kwargs: of the configuration.
        default: what replaces the configuration's own defaults; weights that are loaded come with theirs.
        fixed: what a recipe cannot change.
        unused: beginnings of the names of weights that may be missing, because they are thrown away.
        auto: transformers' loader.

    Raises:
        RecipeError: for an unknown name or key, values that do not fit, or weights of another network.
    """
    model, kind = f"transformers/{name}", configuration(name)
    own, default, fixed = kind().to_dict(), default or {}, fixed or {}
    known = (own.keys() - NOT_ARCHITECTURE | kind.attribute_map.keys() | default.keys()) - fixed.keys()
    for key in kwargs:
        if key not in known:
            raise RecipeError(f"{model}: unknown key '{key}'{nearest(key, known)}")
    if pretrained is True:
        raise RecipeError(f"{model}: pretrained: a model type has no default weights; name some from the Hub")
    with build_errors(model):
        if not pretrained:
            config = kind(**{**default, **kwargs, **fixed})
            return auto.from_config(config), dict(kwargs)
        source = pretrained.removeprefix(LOCAL_DIR)
        stored, _ = PreTrainedConfig.get_config_dict(source)
        # A model of two towers has the configuration of each.
        types = [
            part["model_type"] for part in (stored, *stored.values()) if isinstance(part, dict) and "model_type" in part
        ]
        if name not in types:
            raise RecipeError(
                f"{model}: pretrained: {source} is a {' with '.join(types) or 'folder without model_type'}"
            )
        config = kind.from_pretrained(source, **{**kwargs, **fixed})
        net, report = auto.from_pretrained(
            source, config=config, output_loading_info=True, trust_remote_code=False, dtype=torch.float32
        )
    missing = [key for key in sorted(report["missing_keys"]) if not key.startswith(unused)]
    if missing:
        raise RecipeError(f"{model}: pretrained: {source} has no weights for {missing[0]}")
    values = config.to_dict()
    given = {key: values[key] for key in known & values.keys() if values[key] != own.get(key)}
    return net, given | {key: getattr(config, key) for key in default}
