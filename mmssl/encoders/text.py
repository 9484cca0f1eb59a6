"""Texts: a transformer of transformers, or a text tower of open_clip, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmssl.encoders.backbones import (
    Pretrained,
    at_depth,
    split_model,
    write_json,
)
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer


class TextEncoder(Encoder):
    """Token ids int64 (B, L) and which are `valid`, bool (B, L), -> Features, grid (L,).

    A row without any valid token counts as valid throughout: its vectors mean nothing, but they are finite.

    Args:
        model: `transformers/` and a model type (`bert`, `roberta`, `distilbert`, `modernbert`, `gpt2` ...), or
            `open_clip/` and a model name. Of an encoder-decoder (`t5`, `bart` ...) it is the encoder.
        tokenizer: makes the ids; a name or directory is loaded. open_clip's own one for `open_clip/...` if left out.
        pretrained: see `mmssl.encoders.create`; for transformers a name on the Hub or `local-dir:...`.
        pool: how a text becomes one vector: `mean` of its valid tokens (default), or its `first` token. A tower of
            open_clip pools as its own configuration says.
        decoder: build the decoder of an encoder-decoder too, for a task that decodes; else it is left out.
        sentinels: number of T5's sentinel tokens that the tokenizer has, or gets above its other ids.
        **kwargs: of the model's configuration, for instance `hidden_size`, `num_hidden_layers`; for open_clip
            `embed_dim`, `text_cfg`, `vision_cfg` (differences from the named model).

    Attributes:
        decodes: whether `decode` and `logits` can be called.
    """

    modality = "text"
    decodes: bool

    def __init__(
        self,
        model: str,
        *,
        tokenizer: Tokenizer | str | None = None,
        pretrained: Pretrained = False,
        pool: Literal["mean", "first"] | None = None,
        decoder: bool = False,
        sentinels: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        library, name = split_model(model)
        if isinstance(tokenizer, str):
            tokenizer = Tokenizer.load(tokenizer)
        if tokenizer is not None:
            tokenizer = tokenizer.with_sentinels(sentinels)
        if library == "open_clip":
            from mmssl.encoders._open_clip import OpenClipText

            if pool is not None:
                raise RecipeError(f"{model}: 'pool' is part of text_cfg here (pool_type)")
            if decoder or sentinels:
                raise RecipeError(f"{model} has no decoder; take transformers/t5 or transformers/bart")
            tokenizer = tokenizer or Tokenizer.open_clip(name)
            self.backbone: Any = OpenClipText(name, tokenizer, pretrained, kwargs)
        elif library == "transformers":
            if tokenizer is None:
                raise RecipeError(
                    f"{model}: missing key 'tokenizer', for instance train:8000 or google-bert/bert-base-uncased"
                )
            from mmssl.encoders._transformers import TransformersText

            self.backbone = TransformersText(name, tokenizer, pretrained, pool or "mean", decoder, kwargs)
        else:
            raise RecipeError(f"model '{model}': {library} has no text encoders; use transformers/... or open_clip/...")
        self.tokenizer, self.dim = tokenizer, self.backbone.dim
        self.spec = {"model": model, "modality": "text", "tokenizer": tokenizer, **self.backbone.kwargs}
        self.decodes = decoder
        self.embeds_segments: bool = getattr(self.backbone, "embeds_segments", False)
        if pool is not None:
            self.spec["pool"] = pool
        if decoder:
            self.spec["decoder"] = True

    @property
    def token_embedding(self) -> nn.Parameter:
        """Weight (V, D_in) of the input embedding, for heads that are tied to it."""
        weight: nn.Parameter = self.backbone.token_embedding
        return weight

    def forward(self, x: Tensor, valid: Tensor | None = None, segments: Tensor | None = None) -> Features:
        """Ids -> Features; see the class.

        Args:
            x: int64 (B, L).
            valid: bool (B, L), False where an id is padding.
            segments: int64 (B, L), 1 in the second part of a pair, else 0; only where the network `embeds_segments`.
        """
        if valid is None:
            valid = torch.ones_like(x, dtype=torch.bool)
        tokens, pooled = self.backbone(x, valid) if segments is None else self.backbone(x, valid, segments)
        return Features(tokens, pooled, (x.shape[1],), valid)

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        """See the base class."""
        if valid is None:
            valid = torch.ones_like(x, dtype=torch.bool)
        return {name: at_depth(tokens, (x.shape[1],), valid) for name, tokens in self.backbone.depths(x, valid).items()}

    def shift(self, target: Tensor) -> Tensor:
        """What the decoder reads to say `target` (B, L): the same, one place to the right, after a starting token."""
        shifted: Tensor = self._decoding.shift(target)
        return shifted

    def decode(self, ids: Tensor, valid: Tensor, memory: Features) -> Tensor:
        """The decoder: each place sees the ids up to its own, and all of `memory` that is valid.

        Args:
            ids: int64 (B, L), already shifted.
            valid: bool (B, L).
            memory: of the encoder, (B, N, D); any other of the same width will do.

        Returns:
            (B, L, D), of which `logits` makes predictions.
        """
        hidden: Tensor = self._decoding.decode(ids, valid, memory.tokens, memory.valid)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V): the model's own output layer, tied to its input embedding."""
        logits: Tensor = self._decoding.logits(hidden)
        return logits

    @property
    def _decoding(self) -> Any:
        if not self.decodes:
            raise RecipeError(f"{self.spec['model']} was built without a decoder; set decoder: true")
        return self.backbone

    def export(self, directory: Path) -> None:
        """Write the model's native files with its tokenizer, and `preprocessing.json`; see the base class."""
        preprocessing = {"modality": "text", "model": self.spec["model"], "pool": self.backbone.pooling}
        self.backbone.export(Path(directory), self.tokenizer)
        write_json(Path(directory) / "preprocessing.json", preprocessing)
