"""Teacher forcing: an encoder reads one text, and its decoder says another one, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.modules.vocabulary import decode_rows
from mmssl.objectives._causal import blank_misses
from mmssl.objectives._concealed import Concealed, Later
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.losses import mean_over, score_tokens


def pack(tokens: Tensor, keep: Tensor, width: int, fill: int) -> tuple[Tensor, Tensor]:
    """Move the kept tokens of each row together.

    Args:
        tokens: int64 (B, L).
        keep: bool (B, L), at most `width` a row.
        width: of the result, W.
        fill: what comes after them.

    Returns:
        int64 (B, W), and bool (B, W), True where there is a token.
    """
    place = torch.where(keep, keep.cumsum(1) - 1, width)
    packed = tokens.new_full((len(tokens), width + 1), fill).scatter(1, place, tokens)[:, :width]
    return packed, torch.arange(width, device=keep.device) < keep.sum(1, keepdim=True)


class TextToText(Objective):
    """What the tasks of an encoder-decoder have in common: all but the texts that it reads and says.

    Args:
        encoders: holds the text encoder, built with its decoder.
        name: of the encoder.
        task: of the task, for errors.
    """

    divisors = ("target_tokens",)

    def __init__(self, encoders: Mapping[str, Encoder], name: str, task: str) -> None:
        super().__init__(encoders)
        text = cast(TextEncoder, self.encoder(name, "text"))
        if not text.decodes:
            raise RecipeError(
                f"{task} needs a decoder, and the encoder '{name}' has none: set encoders.{name}.decoder: true "
                "on an encoder-decoder such as transformers/t5 or transformers/bart"
            )
        tokenizer = text.tokenizer
        if tokenizer.end_id is None:
            raise RecipeError(f"{task} needs a token at the end of a text, and the tokenizer of '{name}' has none")
        self.name, self.tokenizer, self.tokens = name, tokenizer, len(text.token_embedding)
        self.start_id, self.end_id = -1 if tokenizer.start_id is None else tokenizer.start_id, tokenizer.end_id

    def chance(self, rows: int) -> Chance:
        """Any token of the embedding table, equally likely."""
        return Chance(math.log(self.tokens), {"accuracy": 1 / self.tokens})

    def inside(self, text: Tensor, mask: Tensor) -> Tensor:
        """Bool (B, L), True where a token is valid and neither the first that starts nor the last that ends a text."""
        edge = torch.zeros_like(mask[:, :1])
        first, last = mask & ~torch.cat([edge, mask[:, :-1]], 1), mask & ~torch.cat([mask[:, 1:], edge], 1)
        return mask & ~(first & (text == self.start_id)) & ~(last & (text == self.end_id))

    def predict(self, inputs: Batch) -> Batch:
        """Of each target token (B, T) its `log_likelihood_ratio`, and whether it was `right`; see `score_tokens`."""
        return score_tokens(self.logits(inputs), inputs["target"], inputs["target_mask"])

    def logits(self, inputs: Batch) -> Tensor:
        """Of all N valid target tokens, row by row, given the corrupted text and the true tokens before: (N, V)."""
        text, target, said = cast(TextEncoder, self.encoder(self.name)), inputs["target"], inputs["target_mask"]
        memory = text(inputs["text"], inputs["text_mask"])
        return text.logits(text.decode(text.shift(target), said, memory)[said])

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy, means over the target tokens of the global batch."""
        said, count = inputs["target_mask"], inputs["target_tokens"]
        return {
            "loss": mean_over(math.log(self.tokens) - outputs["log_likelihood_ratio"], said, count),
            "accuracy": mean_over(outputs["right"], said, count),
        }

    def concealed(self, inputs: Batch) -> Concealed:
        """Of each token that is said itself and all after it."""
        return Concealed(self.logits, later=Later.of("target", inputs["target_mask"]))

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The corrupted text, what should be said, the same with `_` for what the decoder did not predict, its choices.

        Each token is chosen given the true ones before it.
        """
        target, said = inputs["target"], inputs["target_mask"]
        choices = self.logits(inputs).argmax(-1).split(said.sum(1).tolist())
        rows = zip(target, choices, said, strict=True)
        return [
            Panel("input", decode_rows(self.tokenizer, inputs["text"], inputs["text_mask"])),
            Panel("target", decode_rows(self.tokenizer, target, said)),
            Panel("predicted", [blank_misses(self.tokenizer, ids[mask], choice) for ids, choice, mask in rows]),
            Panel("prediction", [self.tokenizer.decode(choice) for choice in choices]),
        ]
