"""Text towers of open_clip."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

from mmssl.encoders.backbones._clip import build, configuration, write_clip
from mmssl.encoders.backbones.base import Backbone, Pretrained
from mmssl.encoders.base import Features, at_depth
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer


class OpenClipText(Backbone):
    """The text tower of a CLIP, pooled as its configuration says.

    A tokenizer other than open_clip's own changes the size of the vocabulary, and the place that is pooled: its end
    token instead of the highest id.
    """

    reads = "texts"

    def __init__(self, name: str, tokenizer: Tokenizer, pretrained: Pretrained, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.model = f"open_clip/{name}"
        clip, self.kwargs = build(name, pretrained, _with_vocabulary(name, tokenizer, kwargs, self.model), self.model)
        self.config = configuration(name, self.kwargs, self.model)
        self.net: Any = clip.text
        if self.net.vocab_size < tokenizer.vocab_size:
            raise RecipeError(
                f"{self.model}: {self.net.vocab_size} embeddings, but the tokenizer has {tokenizer.vocab_size} ids"
            )
        self.dim, self.pooling = int(self.config["embed_dim"]), self.net.pool_type
        self.context = int(self.net.context_length)

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

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Ids (B, L) -> Features; the tower reads padding as its configuration says, whatever `valid` is."""
        return self._features(x, valid, self.net.forward_intermediates(self._pad(x), indices=1, output_fmt="NLC"))

    def _features(self, x: Tensor, valid: Tensor | None, output: Mapping[str, Any]) -> Features:
        tokens = self.net.ln_final(output["text_intermediates"][-1][:, : x.shape[1]])
        projection = self.net.text_projection
        if projection is not None:
            tokens = projection(tokens) if isinstance(projection, nn.Module) else tokens @ projection
        return Features(tokens, output["text_features"], (x.shape[1],), valid)

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are the output of every block; see the base class."""
        output = self.net.forward_intermediates(self._pad(x), output_fmt="NLC")
        maps, grid = output["text_intermediates"], (x.shape[1],)
        depths = {f"resblocks.{i}": at_depth(tokens[:, : grid[0]], grid, valid) for i, tokens in enumerate(maps)}
        return self._features(x, valid, output), depths

    def export(self, directory: Path, preprocessing: Mapping[str, Any]) -> None:
        """A whole CLIP, its image tower with random weights: `open_clip.create_model("local-dir:" + directory)`."""
        clip = CustomTextCLIP(**copy.deepcopy(self.config))
        clip.text.load_state_dict(self.net.state_dict())
        self.tokenizer.save(directory)
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
