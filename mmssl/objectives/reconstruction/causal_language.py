"""Causal language modeling: which token comes next?

Radford, Wu, Child, Luan, Amodei & Sutskever 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2): each
token of a text is predicted from those before it, by the network's last states and the tied input embedding, without a
bias. The loss is the mean over all predicted tokens of the global batch: the end token is one of them, padding and the
first token of a row are not. One row of the data is one text; texts are not packed.

`relative_error`, not the loss or the accuracy, says whether the network reads the text: it is the loss over that of the
running frequencies of tokens, which fall far below guessing without looking (see `mmssl.modules.unigram`).

Known traps. A network that sees later tokens makes the task trivial, and its loss looks excellent: the gradient with
respect to later tokens is taken when the task is built, and has to be exactly zero. GPT-2 pads with its end token, and
open_clip with id 0, which also is `!`: padding is asked of the mask. A mean of each row's mean weighs tokens unequally.
A causal network knows nothing of what follows: probes pool its tokens, never the first one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch, valid_tokens
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.modules.unigram import Unigram
from mmssl.modules.vocabulary import decode_rows
from mmssl.objectives._causal import blank_misses, prove_causal
from mmssl.objectives._concealed import Concealed, Later
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.losses import score_tokens, token_losses


class CausalLanguage(Objective):
    """Predict each token of a text from those before it.

    Args:
        encoders: holds the text encoder, which must be causal.
        encoder: its name.
    """

    needs = ("text",)
    divisors = ("predicted_tokens", "unigram_surprise")

    def __init__(self, encoders: Mapping[str, Encoder], *, encoder: str = "text") -> None:
        super().__init__(encoders)
        text = cast(TextEncoder, self.encoder(encoder, "text"))
        prove_causal(text, encoder, "causal_language")
        self.name, self.tokenizer = encoder, text.tokenizer
        self.tokens, width = text.token_embedding.shape
        # Some embeddings are narrower than the network.
        self.head = nn.Identity() if text.dim == width else nn.Linear(text.dim, width, bias=False)
        self.unigram = Unigram(self.tokens, self.tokenizer.vocab_size)

    def chance(self, rows: int) -> Chance:
        """Any token of the embedding table, equally likely; the relative error of knowing how frequent each is."""
        return Chance(math.log(self.tokens), {"accuracy": 1 / self.tokens, "relative_error": 1.0})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`text` (B, L) and `text_mask` as they are; nothing is random."""
        text, mask = batch["text"], valid_tokens(batch)
        target, valid = text[:, 1:], mask[:, 1:]
        self.unigram.see(target, valid)
        return {
            "text": text,
            "text_mask": mask,
            "predicted_tokens": valid.sum(),
            "unigram_surprise": (self.unigram.surprise(target) * valid).sum(),
        }

    def predict(self, inputs: Batch) -> Batch:
        """Of each next token (B, L - 1) its `log_likelihood_ratio`, and whether it was `right`; see `score_tokens`."""
        return score_tokens(self.logits(inputs), inputs["text"][:, 1:], inputs["text_mask"][:, 1:])

    def logits(self, inputs: Batch) -> Tensor:
        """Of all N valid next tokens, row by row, (N, V)."""
        text = cast(TextEncoder, self.encoder(self.name))
        # The whole text and not all but its last token, so that other tasks can share the pass.
        tokens = text(inputs["text"], inputs["text_mask"]).tokens[:, :-1]
        return F.linear(self.head(tokens[inputs["text_mask"][:, 1:]]), text.token_embedding)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy, means over the next tokens of the global batch, and the relative error."""
        valid = inputs["text_mask"][:, 1:]
        return token_losses(outputs, self.tokens, valid, inputs["predicted_tokens"], inputs["unigram_surprise"])

    def after_step(self, progress: float) -> None:
        """Count the step's tokens."""
        self.unigram.update()

    def concealed(self, inputs: Batch) -> Concealed:
        """Of each next token itself and all after it."""
        return Concealed(self.logits, later=Later.of("text", inputs["text_mask"][:, 1:], first=1))

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The text, the same with `_` for what the network did not predict, and its choices, given the true text."""
        text, mask = inputs["text"], inputs["text_mask"]
        choices = self.logits(inputs).argmax(-1).split(mask[:, 1:].sum(1).tolist())
        rows = list(zip(text[:, 1:], choices, mask[:, 1:], strict=True))
        return [
            Panel("text", decode_rows(self.tokenizer, text, mask)),
            Panel("predicted", [blank_misses(self.tokenizer, ids[valid], choice) for ids, choice, valid in rows]),
            Panel("prediction", [self.tokenizer.decode(choice) for choice in choices]),
        ]
