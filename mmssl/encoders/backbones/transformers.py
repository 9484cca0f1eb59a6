"""Networks of transformers: texts, images, sounds and clips, by their model type."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mmssl.encoders.backbones._transformers import configuration
from mmssl.encoders.backbones._transformers_maps import ConvNeXt, TimeSformer
from mmssl.encoders.backbones._transformers_patches import AST, DINOv2, SigLIP, VideoMAE, ViT, ViViT
from mmssl.encoders.backbones._transformers_text import TransformersText
from mmssl.encoders.backbones._transformers_waves import WaveTransformer
from mmssl.encoders.backbones.base import Backbone, Library, Pretrained
from mmssl.errors import RecipeError

PICTURES: dict[str, Any] = {"vit": ViT, "dinov2": DINOv2, "siglip_vision_model": SigLIP, "convnext": ConvNeXt}
SOUNDS: dict[str, Any] = {
    "audio-spectrogram-transformer": AST,
    **{name: partial(WaveTransformer, name) for name in ("wav2vec2", "hubert", "wavlm")},
}
CLIPS: dict[str, Any] = {"videomae": VideoMAE, "vivit": ViViT, "timesformer": TimeSformer}
# An image network sees the spectrogram of a sound, and the frames of a clip one by one.
NETWORKS = {"image": PICTURES, "audio": SOUNDS | PICTURES, "video": CLIPS | PICTURES}


class Transformers(Library):
    """Models of transformers; weights are a folder's or the Hub's."""

    refused = ("auto_map", "trust_remote_code", "use_kernels")
    modalities = ("image", "text", "audio", "video")

    @staticmethod
    def create(name: str, modality: str, pretrained: Pretrained, kwargs: Mapping[str, Any], **options: Any) -> Backbone:
        """See the base class."""
        model = f"transformers/{name}"
        if modality == "text":
            tokenizer = options["tokenizer"]
            if tokenizer is None:
                raise RecipeError(
                    f"{model}: missing key 'tokenizer', for instance train:8000 or google-bert/bert-base-uncased"
                )
            return TransformersText(name, tokenizer, pretrained, options["pool"] or "mean", options["decoder"], kwargs)
        configuration(name)
        networks = NETWORKS[modality]
        if name not in networks:
            raise RecipeError(f"model '{model}' is no network for {modality}; {', '.join(networks)} are")
        if modality == "audio" and name in PICTURES:
            kwargs = {"num_channels": 1, **kwargs}
        backbone: Backbone = networks[name](pretrained, kwargs)
        return backbone
