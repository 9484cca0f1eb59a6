"""Encoders: a backbone of timm, torchvision, open_clip or transformers, and what must travel with its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError

if TYPE_CHECKING:
    from mmssl.encoders.backbones.open_clip import export_clip_pair

__all__ = ["Encoder", "Features", "create", "export_clip_pair", "reinitialized"]


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
            library knows, a local file, or `local-dir:` and a directory that `Encoder.export` or the library wrote.

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
    return encoder.freeze() if frozen else encoder


def reinitialized(encoder: Encoder, seed: int) -> Encoder:
    """The same network with new random weights, in evaluation mode on the CPU: the baseline of every probe."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create(**encoder.spec).eval()
