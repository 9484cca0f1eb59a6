"""Text models of transformers: encoders, and encoder-decoders, whose encoder is what a probe sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSeq2SeqLM

from mmssl.encoders.backbones._files import read_config, write_json
from mmssl.encoders.backbones._transformers import TransformersNetwork, build, configuration
from mmssl.encoders.backbones.base import Pretrained
from mmssl.encoders.base import Features, at_depth, attendable, masked_mean
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer

# Those of transformers' encoder-decoders that read texts and start to decode as their tokenizer and configuration say.
ENCODER_DECODERS = ("bart", "mt5", "pegasus", "t5")
NO_TEXT_ENCODER = (
    f"is no text encoder; bert, roberta, distilbert, modernbert and the encoders of {', '.join(ENCODER_DECODERS)} are"
)


class TransformersText(TransformersNetwork):
    """A text-only model of transformers, without its pooler, and of an encoder-decoder the encoder unless asked.

    Args:
        name: model type.
        tokenizer: whose vocabulary a new model gets.
        pretrained: False, a name on the Hub or `local-dir:...`.
        pool: `mean` or `first`.
        decoder: keep the decoder and the output layer of an encoder-decoder.
        kwargs: of the configuration.
    """

    reads = "texts"

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        pretrained: Pretrained,
        pool: str,
        decoder: bool,
        kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.pooling = f"transformers/{name}", tokenizer, pool
        default = configuration(name)().to_dict()
        if decoder and name not in ENCODER_DECODERS:
            raise RecipeError(f"{self.model} has no decoder; take one of {', '.join(ENCODER_DECODERS)}")
        if default.get("is_encoder_decoder") and name not in ENCODER_DECODERS:
            raise RecipeError(f"model '{self.model}' {NO_TEXT_ENCODER}")
        vocabulary = _vocabulary(default, tokenizer) if name in ENCODER_DECODERS else _ends(default, tokenizer)
        vocabulary |= {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
        whole = name in ENCODER_DECODERS and not decoder
        self.net, self.kwargs = build(
            name,
            pretrained,
            kwargs,
            default=vocabulary,
            unused=("pooler.", "decoder.") if whole else ("pooler.",),
            auto=AutoModelForSeq2SeqLM if decoder else AutoModel,
        )
        embedding = self.net.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise RecipeError(f"model '{self.model}' {NO_TEXT_ENCODER}")
        if embedding.num_embeddings < tokenizer.vocab_size:
            raise RecipeError(
                f"{self.model}: {embedding.num_embeddings} embeddings, but the tokenizer has {tokenizer.vocab_size} ids"
            )
        if getattr(self.net, "pooler", None) is not None:
            self.net.pooler = None
        if whole:
            self.net.decoder = None
        self.decodes = decoder
        self.embeds_segments = getattr(self.net.config, "type_vocab_size", 1) > 1
        self.dim = int(self.net.config.hidden_size)
        self.context = getattr(self.net.config, "max_position_embeddings", None)

    @property
    def token_embedding(self) -> nn.Parameter:
        """Weight of the input embedding."""
        weight: nn.Parameter = self.net.get_input_embeddings().weight
        return weight

    def _run(self, ids: Tensor, valid: Tensor, **options: bool | Tensor) -> Any:
        self._check_length(ids)
        net = self.net.get_encoder() if self.net.config.is_encoder_decoder else self.net
        return net(input_ids=ids, attention_mask=attendable(valid).long(), **options)

    def _check_length(self, ids: Tensor) -> None:
        if self.context and ids.shape[1] > self.context:
            raise RecipeError(
                f"{self.model} reads {self.context} ids, got {ids.shape[1]}: "
                "lower text.length or raise max_position_embeddings"
            )

    def forward(self, x: Tensor, valid: Tensor | None = None, segments: Tensor | None = None) -> Features:
        """Ids (B, L) -> Features; see the base class and `TextEncoder.forward`."""
        valid = torch.ones_like(x, dtype=torch.bool) if valid is None else valid
        types = {} if segments is None else {"token_type_ids": segments}
        return self._features(self._run(x, valid, **types).last_hidden_state, valid)

    def _features(self, tokens: Tensor, valid: Tensor) -> Features:
        pooled = tokens[:, 0] if self.pooling == "first" else masked_mean(tokens, valid)
        return Features(tokens, pooled, (tokens.shape[1],), valid)

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are tokens after the embedding and after every layer; see the base class."""
        valid = torch.ones_like(x, dtype=torch.bool) if valid is None else valid
        output = self._run(x, valid, output_hidden_states=True)
        embedded, *deeper = output.hidden_states
        depths = {"embeddings": embedded} | {f"layers.{i}": tokens for i, tokens in enumerate(deeper)}
        told = {name: at_depth(tokens, (x.shape[1],), valid) for name, tokens in depths.items()}
        return self._features(output.last_hidden_state, valid), told

    def shift(self, target: Tensor) -> Tensor:
        """(B, L) -> what the decoder reads to say it: one place to the right, after the model's starting token."""
        start = self.net.config.decoder_start_token_id
        return torch.cat([torch.full_like(target[:, :1], start), target[:, :-1]], dim=1)

    def decode(self, ids: Tensor, valid: Tensor, memory: Tensor, memory_valid: Tensor | None) -> Tensor:
        """(B, L) and what the encoder said (B, N, D) -> (B, L, D)."""
        self._check_length(ids)
        hidden: Tensor = self.net.get_decoder()(
            input_ids=ids,
            attention_mask=attendable(valid).long(),
            encoder_hidden_states=memory,
            encoder_attention_mask=None if memory_valid is None else attendable(memory_valid).long(),
            use_cache=False,
        ).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), by the model's own output layer."""
        # T5 divides what its tied embedding reads by the square root of the width.
        if getattr(self.net.config, "scale_decoder_outputs", False):
            hidden = hidden * self.dim**-0.5
        logits: Tensor = self.net.lm_head(hidden)
        bias = getattr(self.net, "final_logits_bias", None)
        return logits if bias is None else logits + bias

    def export(self, directory: Path, preprocessing: Mapping[str, Any]) -> None:
        """`AutoTokenizer` and `AutoModel.from_pretrained` load it, `AutoModelForSeq2SeqLM` where there is a decoder.

        A decoder that `AutoModel` adds where there was none is not trained, as it warns.
        """
        super().export(directory, preprocessing)
        self.tokenizer.save(directory)
        length = preprocessing.get("decoding", {}).get("length", self.context)
        path = Path(directory) / "tokenizer_config.json"
        if length is not None:
            write_json(path, {**read_config(directory, path.name), "model_max_length": length})


def _ends(default: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, int | None]:
    """Start and end of a text for models that name them, which would else look for those of their published weights."""
    first, last = tokenizer.start_id, tokenizer.end_id
    own = {"bos_token_id": first, "eos_token_id": last, "cls_token_id": first, "sep_token_id": last}
    return {key: value for key, value in own.items() if default.get(key) is not None}


def _vocabulary(default: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, int | None]:
    """The keys of an encoder-decoder's configuration that name tokens, in place of those of its published weights."""
    first, last, pad = tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id
    starts_with_end = default.get("decoder_start_token_id") == default["eos_token_id"]
    found = {"eos_token_id": last, "decoder_start_token_id": last if starts_with_end and last is not None else pad}
    optional = {"bos_token_id": first, "forced_eos_token_id": last}
    return found | {key: value for key, value in optional.items() if key in default}
