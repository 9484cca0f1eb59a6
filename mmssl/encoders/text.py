"""Texts: a transformer of transformers, or a text tower of open_clip, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmssl.encoders.backbones import (
    LOCAL_DIR,
    Pretrained,
    attendable,
    build_errors,
    masked_mean,
    nearest_model,
    split_model,
    write_json,
)
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError, nearest
from mmssl.media.text import Tokenizer


class TextEncoder(Encoder):
    """Token ids int64 (B, L) and their mask bool (B, L) -> Features, grid (L,).

    A row without any valid token counts as valid throughout: its vectors mean nothing, but they are finite.

    Args:
        model: `transformers/` and a model type (`bert`, `roberta`, `distilbert`, `modernbert`, `gpt2` ...), or
            `open_clip/` and a model name.
        tokenizer: makes the ids; a name or directory is loaded. open_clip's own one for `open_clip/...` if left out.
        pretrained: see `mmssl.encoders.create`; for transformers a name on the Hub or `local-dir:...`.
        pool: how a text becomes one vector: `mean` of its valid tokens (default), or its `first` token. A tower of
            open_clip pools as its own configuration says.
        **kwargs: of the model's configuration, for instance `hidden_size`, `num_hidden_layers`; for open_clip
            `embed_dim`, `text_cfg`, `vision_cfg` (differences from the named model).
    """

    modality = "text"

    def __init__(
        self,
        model: str,
        *,
        tokenizer: Tokenizer | str | None = None,
        pretrained: Pretrained = False,
        pool: Literal["mean", "first"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        library, name = split_model(model)
        if isinstance(tokenizer, str):
            tokenizer = Tokenizer.load(tokenizer)
        if library == "open_clip":
            from mmssl.encoders._open_clip import OpenClipText

            if pool is not None:
                raise RecipeError(f"{model}: 'pool' is part of text_cfg here (pool_type)")
            tokenizer = tokenizer or Tokenizer.open_clip(name)
            self.backbone: TransformersText | OpenClipText = OpenClipText(name, tokenizer, pretrained, kwargs)
        elif library == "transformers":
            if tokenizer is None:
                raise RecipeError(
                    f"{model}: missing key 'tokenizer', for instance train:8000 or google-bert/bert-base-uncased"
                )
            self.backbone = TransformersText(name, tokenizer, pretrained, pool or "mean", kwargs)
        else:
            raise RecipeError(f"model '{model}': {library} has no text encoders; use transformers/... or open_clip/...")
        self.tokenizer, self.dim = tokenizer, self.backbone.dim
        self.spec = {"model": model, "modality": "text", "tokenizer": tokenizer, **self.backbone.kwargs}
        if pool is not None:
            self.spec["pool"] = pool

    @property
    def token_embedding(self) -> nn.Parameter:
        """Weight (V, D_in) of the input embedding, for heads that are tied to it."""
        return self.backbone.token_embedding

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Ids and mask -> Features; see the class."""
        if mask is None:
            mask = torch.ones_like(x, dtype=torch.bool)
        tokens, pooled = self.backbone(x, mask)
        return Features(tokens, pooled, (x.shape[1],), mask)

    def layers(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Every depth, averaged over the valid tokens; see the base class."""
        if mask is None:
            mask = torch.ones_like(x, dtype=torch.bool)
        return {name: masked_mean(tokens, mask) for name, tokens in self.backbone.depths(x, mask).items()}

    def export(self, directory: Path) -> None:
        """Write the model's native files with its tokenizer, and `preprocessing.json`; see the base class."""
        preprocessing = {"modality": "text", "model": self.spec["model"], "pool": self.backbone.pooling}
        self.backbone.export(Path(directory), self.tokenizer)
        write_json(Path(directory) / "preprocessing.json", preprocessing)


class TransformersText(nn.Module):
    """A text-only model of transformers, without its pooler.

    Args:
        name: model type.
        tokenizer: whose vocabulary a new model gets.
        pretrained: False, a name on the Hub or `local-dir:...`.
        pool: `mean` or `first`.
        kwargs: of the configuration.
    """

    def __init__(
        self, name: str, tokenizer: Tokenizer, pretrained: Pretrained, pool: str, kwargs: Mapping[str, Any]
    ) -> None:
        super().__init__()
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

        model = f"transformers/{name}"
        if name not in CONFIG_MAPPING:
            hint = nearest_model(name, CONFIG_MAPPING.keys(), "transformers.CONFIG_MAPPING")
            raise RecipeError(
                f"model '{model}': transformers has no model type of this name{hint}; weights go to 'pretrained'"
            )
        if pretrained is True:
            raise RecipeError(f"{model}: pretrained: a model type has no default weights; name some from the Hub")
        known = CONFIG_MAPPING[name]().to_dict()
        for key in kwargs:
            if key not in known:
                raise RecipeError(f"{model}: unknown key '{key}'{nearest(key, known)}")
        self.kwargs, self.pooling = dict(kwargs), pool
        with build_errors(model):
            if pretrained:
                source = pretrained.removeprefix(LOCAL_DIR)
                config = AutoConfig.from_pretrained(source, **kwargs)
                if config.model_type != name:
                    raise RecipeError(f"{model}: pretrained: {source} is a {config.model_type}")
                net = AutoModel.from_pretrained(source, config=config)
                stored = config.to_diff_dict()
                self.kwargs = {
                    key: stored[key] for key in stored if key in known and not key.startswith(("_", "transformers"))
                }
            else:
                vocabulary = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
                config = AutoConfig.for_model(name, **{**vocabulary, **kwargs})
                net = AutoModel.from_config(config)
        embedding = net.get_input_embeddings()
        if config.is_encoder_decoder or not isinstance(embedding, nn.Embedding):
            raise RecipeError(f"model '{model}' is no text encoder; bert, roberta, distilbert, modernbert and gpt2 are")
        if embedding.num_embeddings < tokenizer.vocab_size:
            raise RecipeError(
                f"{model}: {embedding.num_embeddings} embeddings, but the tokenizer has {tokenizer.vocab_size} ids"
            )
        if getattr(net, "pooler", None) is not None:
            net.pooler = None
        self.net, self.dim = net, int(config.hidden_size)

    @property
    def token_embedding(self) -> nn.Parameter:
        """Weight of the input embedding."""
        return self.net.get_input_embeddings().weight

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) -> tokens (B, L, D), pooled (B, D)."""
        tokens: Tensor = self.net(input_ids=ids, attention_mask=attendable(mask).long()).last_hidden_state
        return tokens, tokens[:, 0] if self.pooling == "first" else masked_mean(tokens, mask)

    def depths(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Tokens behind the embedding and behind every layer."""
        output = self.net(input_ids=ids, attention_mask=attendable(mask).long(), output_hidden_states=True)
        embedded, *deeper = output.hidden_states
        return {"embeddings": embedded} | {f"layers.{i}": tokens for i, tokens in enumerate(deeper)}

    def export(self, directory: Path, tokenizer: Tokenizer) -> None:
        """`AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained` load it; a pooler that they add is not trained."""
        self.net.save_pretrained(directory)
        tokenizer.save(directory)
