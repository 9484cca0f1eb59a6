"""Networks of transformers that read waveforms: Wav2Vec2, HuBERT and WavLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoders.backbones._transformers import TransformersNetwork, build, preprocessor
from mmssl.encoders.backbones.base import Pretrained
from mmssl.encoders.base import Features, at_depth, attendable, hide, masked_mean
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

    A position is a convolution over the neighbors, so that no frame can be left out: `embed` puts the mask token in
    place of those that are hidden, before the positions, and `encode` takes all of them.

    Attributes:
        normalizes: whether the weights expect sounds of mean 0 and variance 1.
        frame_width: width C of what `convolve` returns.
        stride: samples from frame to frame.
        reach: samples that a frame is made of.
    """

    reads = "waveforms"

    def __init__(self, name: str, pretrained: Pretrained, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = f"transformers/{name}"
        self.net, self.kwargs = build(name, pretrained, kwargs, fixed=FIXED)
        # In training the library makes its input a leaf that asks for a gradient, which nobody reads and which refuses
        # an input that was computed.
        self.net.feature_extractor._requires_grad = False
        config = self.net.config
        if getattr(config, "add_adapter", False):
            raise RecipeError(f"{self.model}: add_adapter shortens the output of the encoder; set it to false")
        self.dim, self.width, self.channels = int(config.hidden_size), int(config.hidden_size), 1
        self.frame_width = int(config.conv_dim[-1])
        self.normalizes = bool(preprocessor(pretrained).get("do_normalize", True))
        self.stride = math.prod(config.conv_stride)
        reach, step = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            reach, step = reach + (kernel - 1) * step, step * stride
        self.reach = reach

    def valid_frames(self, valid: Tensor) -> Tensor:
        """Which samples are no padding (B, S) -> which frames are made of such alone (B, N)."""
        return F.max_pool1d((~valid).unsqueeze(1).float(), self.reach, self.stride)[:, 0] == 0

    def convolve(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the convolutions make of waveforms, normalized, (B, N, C), and which frames are valid, (B, N)."""
        if x.shape[1] < self.reach:
            raise RecipeError(f"{self.model} needs {self.reach} samples at least, got {x.shape[1]}")
        found: Tensor = self.net.feature_extractor(x).mT
        # Networks of one family differ in whether they have this norm.
        norm = getattr(self.net.feature_projection, "layer_norm", nn.Identity())
        return norm(found), None if valid is None else self.valid_frames(valid)

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Waveforms, or what `convolve` makes of them -> what the transformer reads, (B, N, D); see the base class."""
        frames = x if x.ndim == 3 else self.convolve(x)[0]
        projection = self.net.feature_projection
        return hide(projection.dropout(projection.projection(frames)), hidden, mask_token)

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        """All tokens of `embed` -> Features, grid (1, frames)."""
        # The library writes zeros into what it is given.
        given, heard = (tokens, None) if valid is None else (tokens.clone(), attendable(valid))
        encoded: Tensor = self.net.encoder(given, attention_mask=heard).last_hidden_state
        return Features(encoded, masked_mean(encoded, valid), (1, encoded.shape[1]), valid)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Waveforms -> Features, grid (1, frames); see the class."""
        frames, valid = self.convolve(x, valid)
        return self.encode(self.embed(frames), valid)

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are frames with their positions, and after every layer; see the base class."""
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
            features = self(x, valid)
        finally:
            for handle in handles:
                handle.remove()
        names = ("embeddings", *(f"layers.{i}" for i in range(len(blocks))))
        depths = {
            name: at_depth(tokens, (1, tokens.shape[1]), features.valid)
            for name, tokens in zip(names, found, strict=True)
        }
        return features, depths
