"""Towers of open_clip: one of the two networks of a CLIP, and CLIPs put together from two of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.model import CustomTextCLIP
from torch import Tensor

from mmssl.encoders.backbones._clip import write_clip
from mmssl.encoders.backbones._files import write_json
from mmssl.encoders.backbones._open_clip_image import create_image_tower
from mmssl.encoders.backbones._open_clip_text import OpenClipText
from mmssl.encoders.backbones.base import Backbone, Library, Pretrained
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer


class OpenClip(Library):
    """The image or the text tower of a CLIP."""

    # A text tower of transformers would be fetched.
    refused = ("hf_model_name", "hf_model_pretrained", "timm_model_pretrained")
    modalities = ("image", "text", "audio", "video")

    @staticmethod
    def create(name: str, modality: str, pretrained: Pretrained, kwargs: Mapping[str, Any], **options: Any) -> Backbone:
        """See the base class."""
        if modality != "text":
            return create_image_tower(name, pretrained, kwargs)
        if options["pool"] is not None:
            raise RecipeError(f"open_clip/{name}: 'pool' is part of text_cfg here (pool_type)")
        if options["decoder"] or options["sentinels"]:
            raise RecipeError(f"open_clip/{name} has no decoder; take transformers/t5 or transformers/bart")
        return OpenClipText(name, options["tokenizer"] or Tokenizer.open_clip(name), pretrained, kwargs)


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
    preprocessing["origin"] = dict(image.origin)
    if image.decoding is not None:
        preprocessing["decoding"] = image.decoding.image.model_dump(mode="json", exclude_none=True)
    write_clip(directory, clip, config, preprocessing)
    write_json(directory / "preprocessing.json", preprocessing)
