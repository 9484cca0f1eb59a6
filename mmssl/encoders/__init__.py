"""Encoders: a backbone of timm, torchvision, open_clip or transformers, and what must travel with its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError

if TYPE_CHECKING:
    from mmssl.encoders.backbones.open_clip import export_clip_pair

__all__ = ["Encoder", "Features", "create", "export_clip_pair", "reinitialized", "start_in_words", "started"]


def __getattr__(name: str) -> Any:
    # Importing open_clip takes seconds.
    if name == "export_clip_pair":
        from mmssl.encoders.backbones.open_clip import export_clip_pair

        return export_clip_pair
    raise AttributeError(f"module 'mmssl.encoders' has no attribute '{name}'")


def create(model: str, modality: str, *, frozen: bool = False, **kwargs: Any) -> Encoder:
    """Build an encoder; random weights unless `pretrained` says otherwise.

    Args:
        model: `library/name`, for instance `timm/resnet18`, `torchvision/r3d_18`, `open_clip/ViT-B-32`,
            `transformers/bert`.
        modality: `image`, `text`, `audio` or `video`: what the encoder reads; `fusion` reads two encoders.
        frozen: whether it keeps the weights that it starts from; see `Encoder.freeze`.
        **kwargs: of the modality's class (`mean`, `rate`, `tokenizer` ...); all others go to the backbone's
            constructor. `pretrained` is False, True (the library's default weights), the name of weights that the
            library knows, a local file, or `local-dir:` and a directory that `Encoder.export` or the library wrote. A
            recipe may name a run directory, too, whose encoder of the same name is meant.

    Raises:
        RecipeError: for a library, name, keyword or value that does not exist or does not fit.
    """
    from mmssl.encoders.backbones.base import split_model
    from mmssl.registry import check_keywords, find

    split_model(model)
    kind = find("encoder", modality)
    if not isinstance(frozen, bool):
        raise RecipeError(f"{model}: frozen = {frozen!r} should be true or false")
    encoder: Encoder = kind(model, **check_keywords(kind, kwargs, model))
    encoder.origin = {"started_from": start_in_words(kwargs.get("pretrained"))}
    return encoder.freeze() if frozen else encoder


def start_in_words(pretrained: bool | str | None) -> str:
    """What an encoder starts from, as others may know it: of a place on this machine its last part."""
    if not isinstance(pretrained, str):
        return "the library's default weights" if pretrained else "random weights"
    place = Path(pretrained.removeprefix("local-dir:"))
    return place.name if os.path.exists(place) or pretrained.startswith(("local-dir:", "/", "~", ".")) else pretrained


def started(start: Encoder, model: str, modality: str, *, pretrained: str, **kwargs: Any) -> Encoder:
    """An encoder as `create` makes it, with the weights of another one, and its arguments where none are given.

    Args:
        start: of a run.
        model: as in `create`.
        modality: likewise.
        pretrained: where `start` is from, for errors.
        **kwargs: as in `create`.

    Raises:
        RecipeError: where the two are not the same network.
    """
    spec = start.spec
    if (model, modality) != (spec["model"], spec["modality"]):
        raise RecipeError(
            f"pretrained: {pretrained} has a {spec['model']} of {spec['modality']}, and this is a {model} of {modality}"
        )
    encoder = create(**{**spec, "model": model, "modality": modality, **kwargs})
    # Constants of the input are arguments.
    own, stored = (
        {key: value for key, value in one.state_dict().items() if not key.startswith("normalize.")}
        for one in (encoder, start)
    )
    odd = [key for key in own.keys() | stored.keys() if key not in own or key not in stored]
    odd += [key for key in own if key in stored and own[key].shape != stored[key].shape]
    if odd:
        raise RecipeError(f"pretrained: {pretrained} holds another network: {min(odd)} differs")
    encoder.load_state_dict(stored, strict=False)
    return encoder


def reinitialized(encoder: Encoder, seed: int) -> Encoder:
    """The same network with new random weights, in evaluation mode on the CPU: the baseline of every probe."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create(**encoder.spec).eval()
