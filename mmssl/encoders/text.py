"""Texts: a transformer of transformers, or a text tower of open_clip, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmssl.encoders._network import NetworkEncoder
from mmssl.encoders.backbones.base import Pretrained, create_backbone
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import DataError, RecipeError
from mmssl.media.text import Tokenizer
from mmssl.ranges import Count
from mmssl.recipe import Data


class TextEncoder(NetworkEncoder):
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
    shapes: ClassVar[dict[int, str]] = {2: "(B, L)"}
    backbone: Any
    tokenizer: Tokenizer
    decodes: bool

    def __init__(
        self,
        model: str,
        *,
        tokenizer: Tokenizer | str | None = None,
        pretrained: Pretrained = False,
        pool: Literal["mean", "first"] | None = None,
        decoder: bool = False,
        sentinels: Count = 0,
        **kwargs: Any,
    ) -> None:
        if isinstance(tokenizer, str):
            tokenizer = Tokenizer.load(tokenizer)
        if tokenizer is not None:
            tokenizer = tokenizer.with_sentinels(sentinels)
        options = {"tokenizer": tokenizer, "pool": pool, "decoder": decoder, "sentinels": sentinels}
        super().__init__(create_backbone(model, "text", pretrained, kwargs, **options))
        self.tokenizer, self.decodes = self.backbone.tokenizer, decoder
        self.embeds_segments: bool = getattr(self.backbone, "embeds_segments", False)
        self.spec = {"model": model, "modality": "text", "tokenizer": self.tokenizer, **self.backbone.kwargs}
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
        given = {} if segments is None else {"segments": segments}
        features: Features = self.backbone(*self.checked(x, valid), **given)
        return features

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Ids as they are; see the base class."""
        return x, torch.ones_like(x, dtype=torch.bool) if valid is None else valid

    def built_for(self) -> dict[str, Any]:
        """See the base class."""
        most = self.backbone.context
        return {} if most is None else {"length": min(64, most)}

    def decode_one(self, cell: Any, data: Data) -> tuple[Tensor, Tensor]:
        """See the base class."""
        if not isinstance(cell, str):
            raise DataError(f"{type(cell).__name__} is no text")
        return self.tokenizer(cell, data.text.length)

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

    def preprocessing(self) -> dict[str, Any]:
        """See the base class."""
        return {"pool": self.backbone.pooling}


def tokenizers_of(encoders: Mapping[str, Encoder]) -> dict[str, Tokenizer]:
    """Modality -> tokenizer, for those encoders that have one."""
    found = {e.modality: getattr(e, "tokenizer", None) for e in encoders.values()}
    return {modality: value for modality, value in found.items() if isinstance(value, Tokenizer)}
