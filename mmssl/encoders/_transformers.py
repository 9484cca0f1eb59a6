"""Text models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from mmssl.encoders.backbones import (
    LOCAL_DIR,
    Pretrained,
    attendable,
    build_errors,
    masked_mean,
    nearest_model,
)
from mmssl.errors import RecipeError, nearest
from mmssl.media.text import Tokenizer

# What every configuration has beside its own keys.
NOT_ARCHITECTURE = {
    *("transformers_version", "model_type", "architectures", "_name_or_path", "dtype", "return_dict", "problem_type"),
    *("id2label", "label2id", "output_hidden_states", "output_attentions", "is_encoder_decoder"),
}


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
        self.model, self.pooling = f"transformers/{name}", pool
        if name not in CONFIG_MAPPING:
            hint = nearest_model(name, CONFIG_MAPPING.keys(), "transformers.CONFIG_MAPPING")
            raise RecipeError(
                f"model '{self.model}': transformers has no such model type{hint}; weights of the Hub are 'pretrained'"
            )
        kind = CONFIG_MAPPING[name]
        known = kind().to_dict().keys() - NOT_ARCHITECTURE | kind.attribute_map.keys()
        for key in kwargs:
            if key not in known:
                raise RecipeError(f"{self.model}: unknown key '{key}'{nearest(key, known)}")
        if pretrained is True:
            raise RecipeError(f"{self.model}: pretrained: a model type has no default weights; name some from the Hub")
        with build_errors(self.model):
            if pretrained:
                source = pretrained.removeprefix(LOCAL_DIR)
                config = AutoConfig.from_pretrained(source, trust_remote_code=False, **kwargs)
                if config.model_type != name:
                    raise RecipeError(f"{self.model}: pretrained: {source} is a {config.model_type}")
                self.net: Any
                self.net, report = AutoModel.from_pretrained(
                    source, config=config, output_loading_info=True, trust_remote_code=False
                )
                missing = [key for key in sorted(report["missing_keys"]) if not key.startswith("pooler.")]
                if missing:
                    raise RecipeError(f"{self.model}: pretrained: {source} has no weights for {missing[0]}")
                default = kind().to_dict()
                stored = config.to_dict()
                self.kwargs = {key: stored[key] for key in known & stored.keys() if stored[key] != default[key]}
                self.kwargs |= {"vocab_size": config.vocab_size, "pad_token_id": config.pad_token_id}
            else:
                vocabulary = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
                config = AutoConfig.for_model(name, **{**vocabulary, **kwargs})
                self.net = AutoModel.from_config(config)
                self.kwargs = dict(kwargs)
        embedding = self.net.get_input_embeddings()
        if config.is_encoder_decoder or not isinstance(embedding, nn.Embedding):
            raise RecipeError(f"model '{self.model}' is no text encoder; bert, roberta, distilbert and modernbert are")
        if embedding.num_embeddings < tokenizer.vocab_size:
            raise RecipeError(
                f"{self.model}: {embedding.num_embeddings} embeddings, but the tokenizer has {tokenizer.vocab_size} ids"
            )
        if getattr(self.net, "pooler", None) is not None:
            self.net.pooler = None
        self.dim = int(config.hidden_size)

    @property
    def token_embedding(self) -> nn.Parameter:
        """Weight of the input embedding."""
        weight: nn.Parameter = self.net.get_input_embeddings().weight
        return weight

    def _run(self, ids: Tensor, mask: Tensor, **options: bool) -> Any:
        limit = getattr(self.net.config, "max_position_embeddings", None)
        if limit and ids.shape[1] > limit:
            raise RecipeError(
                f"{self.model} reads {limit} ids, got {ids.shape[1]}: "
                "lower text.length or raise max_position_embeddings"
            )
        return self.net(input_ids=ids, attention_mask=attendable(mask).long(), **options)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) -> tokens (B, L, D), pooled (B, D)."""
        tokens: Tensor = self._run(ids, mask).last_hidden_state
        return tokens, tokens[:, 0] if self.pooling == "first" else masked_mean(tokens, mask)

    def depths(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Tokens behind the embedding and behind every layer."""
        embedded, *deeper = self._run(ids, mask, output_hidden_states=True).hidden_states
        return {"embeddings": embedded} | {f"layers.{i}": tokens for i, tokens in enumerate(deeper)}

    def export(self, directory: Path, tokenizer: Tokenizer) -> None:
        """`AutoModel` and `AutoTokenizer.from_pretrained` load it; a pooler that the first may add is not trained."""
        self.net.save_pretrained(directory)
        tokenizer.save(directory)
