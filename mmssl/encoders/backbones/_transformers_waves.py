"""Networks of transformers that read waveforms: Wav2Vec2, HuBERT and WavLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmssl.encoders.backbones._transformers import TransformersNetwork, build, preprocessor
from mmssl.encoders.backbones.base import Pretrained
from mmssl.encoders.base import Features, at_depth, attendable, masked_mean
from mmssl.errors import RecipeError

# An encoder hides nothing on its own (SpecAugment), and drops no layer: one draw for the whole batch would make a run
# depend on how the batch is cut, and leave weights without gradient.
FIXED = {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0}


class WaveTransformer(TransformersNetwork):
    """Waveforms (B, S) through convolutions, then a transformer; a frame is an embedding every 320 samples.

    Baevski et al. 2020, arXiv 2006.11477 (`wav2vec2`); Hsu et al. 2021, arXiv 2106.07447 (`hubert`); Chen et al. 2021,
    arXiv 2110.13900 (`wavlm`). Pooled is the mean of the frames. A frame is valid where all samples that it is made of
    are; others are 0 before the transformer and not attended to. With `feat_extract_norm: group`, the default of the
    configurations, the first norm is one over all time, so that padding shifts the valid frames, too; published weights
    of this form were trained like that. With `layer` padding has no influence.

    A position is a convolution over the neighbors, so that no frame can be left out.

    Attributes:
        normalizes: whether the weights expect sounds of mean 0 and variance 1.
    """

    reads = "waveforms"

    def __init__(self, name: str, pretrained: Pretrained, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = f"transformers/{name}"
        self.net, self.kwargs = build(name, pretrained, kwargs, fixed=FIXED)
        config = self.net.config
        if getattr(config, "add_adapter", False):
            raise RecipeError(f"{self.model}: add_adapter shortens the output of the encoder; set it to false")
        self.dim, self.channels = int(config.hidden_size), 1
        self.normalizes = bool(preprocessor(pretrained).get("do_normalize", True))
        self._stride = math.prod(config.conv_stride)
        reach, step = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            reach, step = reach + (kernel - 1) * step, step * stride
        self._reach = reach

    def _frames(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the transformer reads, (B, N, D), and which frames are made of valid samples alone, (B, N)."""
        if x.shape[1] < self._reach:
            raise RecipeError(f"{self.model} needs {self._reach} samples at least, got {x.shape[1]}")
        projected = self.net.feature_projection(self.net.feature_extractor(x).mT)
        frames: Tensor = projected[0] if isinstance(projected, tuple) else projected
        if valid is None:
            return frames, None
        broken = F.max_pool1d((~valid).unsqueeze(1).to(x.dtype), self._reach, self._stride)[:, 0] > 0
        return frames, ~broken

    def _encode(self, frames: Tensor, valid: Tensor | None) -> Tensor:
        if valid is not None:
            frames, valid = frames.clone(), attendable(valid)  # the library writes zeros into what it is given
        encoded: Tensor = self.net.encoder(frames, attention_mask=valid).last_hidden_state
        return encoded

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Waveforms -> Features, grid (1, frames); see the class."""
        frames, valid = self._frames(x, valid)
        tokens = self._encode(frames, valid)
        return Features(tokens, masked_mean(tokens, valid), (1, tokens.shape[1]), valid)

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        """Frames with their positions, and after every layer; see the base class."""
        found: list[Tensor] = []
        blocks = self.net.encoder.layers
        # The positions are added inside of the library's encoder: what its first layer is given has them.
        handles = [blocks[0].register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))]
        for block in blocks:
            handles.append(
                block.register_forward_hook(
                    lambda module, inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
                )
            )
        try:
            frames, valid = self._frames(x, valid)
            self._encode(frames, valid)
        finally:
            for handle in handles:
                handle.remove()
        names = ("embeddings", *(f"layers.{i}" for i in range(len(blocks))))
        return {name: at_depth(tokens, (1, tokens.shape[1]), valid) for name, tokens in zip(names, found, strict=True)}
