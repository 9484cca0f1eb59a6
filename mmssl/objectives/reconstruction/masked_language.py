"""Masked language modeling: which token was here?

Devlin, Chang, Lee & Toutanova 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
arXiv 1810.04805, with the counts of its published code: in each text exactly max(1, round(0.15 · length)) tokens, where
the length includes the start and end token, are predicted; 80 % of them are seen as `[MASK]`, 10 % as a random token,
10 % as they are. As in RoBERTa (arXiv 1907.11692) places are drawn anew at every step, and random tokens come from the
vocabulary without its special tokens. The loss is the mean over the masked tokens of the global batch.

Unit `word` hides whole words (Google's BERT, release of May 2019): words in random order, of which one that overshoots
the number of tokens is passed over. Unit `span`: Joshi et al. 2020, "SpanBERT", arXiv 1907.10529, without its boundary
objective: spans of 1 to 10 words, 3.8 on average, up to ceil(0.15 · length) tokens, length without start and end token;
a span, and neighboring spans as one, is masked, replaced or kept as a whole. Count `bernoulli` draws each token on its
own, as the collators of transformers do.

`relative_error`, not the loss or the accuracy, says whether the network reads the text: it is the loss over that of the
running frequencies of tokens, which fall far below guessing without looking (see `mmssl.modules.unigram`).

Known traps. One Bernoulli draw a token gives another number of masked tokens in each text (a standard deviation of 4 at
128 tokens). Special tokens and padding are never chosen. A mean of each process's mean weighs tokens unequally. Pieces
of a word are found by their place in the text: `##` marks them in BERT's own vocabulary alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor

from mmssl.batch import Batch, valid_tokens
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.modules.unigram import Unigram
from mmssl.modules.vocabulary import TiedHead, Vocabulary
from mmssl.objectives._concealed import Concealed
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.losses import score_tokens, token_losses
from mmssl.ops.masking import KEPT, take
from mmssl.ops.transfers import upload
from mmssl.ops.words import as_places, choose_spans, choose_words, run_of
from mmssl.ranges import Positive, Ratio

# A text has more Bernoulli-masked tokens than there are places for with this probability; the last ones stay visible.
OVERFLOW = 1e-9


class MaskedLanguage(Objective):
    """Predict hidden tokens from the rest of the text.

    Args:
        encoders: holds the text encoder, whose tokenizer has a mask token.
        encoder: its name.
        mask_ratio: share of a text's tokens that are predicted.
        count: `exact`, or `bernoulli` for that share on average.
        unit: what is hidden together: a `token`, a `word` or a `span` of words.
        stop: of spans: the geometric distribution's probability that a span ends after a word.
        longest: of spans: largest number of words.
    """

    needs: tuple[str, ...] = ("text",)
    divisors = ("masked_tokens", "unigram_surprise")

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "text",
        mask_ratio: Ratio = 0.15,
        count: Literal["exact", "bernoulli"] = "exact",
        unit: Literal["token", "word", "span"] = "token",
        stop: Ratio = 0.2,
        longest: Positive = 10,
    ) -> None:
        super().__init__(encoders)
        text = cast(TextEncoder, self.encoder(encoder, "text"))
        if count == "bernoulli" and unit != "token":
            raise RecipeError(f"masked_language: count: bernoulli draws each token on its own; leave out unit: {unit}")
        if unit != "token":
            self.needs = ("text", "text_word")
        self.name, self.mask_ratio, self.count, self.unit = encoder, mask_ratio, count, unit
        self.stop, self.longest, self.tokens = stop, longest, len(text.token_embedding)
        self.vocabulary = Vocabulary(text, encoder, "masked_language")
        self.head = TiedHead(text.dim, text)
        self.unigram = Unigram(self.tokens, len(self.vocabulary.ordinary))

    def chance(self, rows: int) -> Chance:
        """Any token of the embedding table, equally likely; the relative error of knowing how frequent each is."""
        return Chance(math.log(self.tokens), {"accuracy": 1 / self.tokens, "relative_error": 1.0})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`text` (B, L) -> the corrupted `text`, `places` and their `target` tokens (B, M), `chosen` bool (B, M).

        M is the number of masked tokens of a text that fills the row; shorter texts leave the last places unchosen.
        """
        text, valid = batch["text"], valid_tokens(batch)
        candidates = valid & ~self.vocabulary.special[text]
        places, chosen = self._choose(batch, valid, candidates, draws)
        together = run_of(places) if self.unit == "span" else None
        target = text.gather(1, places)
        self.unigram.see(text, candidates)
        return {
            "text": self.vocabulary.corrupt(text, places, chosen, draws, together=together),
            "text_mask": valid,
            "places": places,
            "chosen": chosen,
            "target": target,
            "masked_tokens": chosen.sum(),
            "unigram_surprise": (self.unigram.surprise(target) * chosen).sum(),
        }

    def _choose(self, batch: Batch, valid: Tensor, candidates: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        length = valid.shape[1]
        if self.count == "bernoulli":
            from scipy.stats import binom

            slots = min(length, int(binom.isf(OVERFLOW, length, self.mask_ratio)) + 1)
            return as_places(candidates & draws.chance(self.mask_ratio, length), slots)
        if self.unit == "token":
            return self.vocabulary.choose(batch["text"], valid, self.mask_ratio, draws)
        if self.unit == "word":
            count_of = [max(1, round(self.mask_ratio * n)) for n in range(length + 1)]
            counts = upload(count_of, valid.device)[valid.sum(1)]
            chosen = choose_words(batch["text_word"], candidates, counts, draws)
        else:
            count_of = [math.ceil(self.mask_ratio * n) for n in range(length + 1)]
            counts = upload(count_of, valid.device)[candidates.sum(1)]
            chosen = choose_spans(
                *(batch["text_word"], candidates, counts, max(count_of), draws), stop=self.stop, longest=self.longest
            )
        return as_places(chosen, max(count_of))

    def predict(self, inputs: Batch) -> Batch:
        """Of each chosen token (B, M) its `log_likelihood_ratio`, and whether it was `right`; see `score_tokens`."""
        return score_tokens(self.logits(inputs), inputs["target"], inputs["chosen"])

    def logits(self, inputs: Batch) -> Tensor:
        """Of all N chosen tokens, row by row, (N, V)."""
        text = cast(TextEncoder, self.encoder(self.name))
        tokens = text(inputs["text"], inputs["text_mask"]).tokens
        logits: Tensor = self.head(take(tokens, inputs["places"])[inputs["chosen"]], text)
        return logits

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy, means over the masked tokens of the global batch, and the relative error."""
        return token_losses(outputs, self.tokens, inputs["chosen"], inputs["masked_tokens"], inputs["unigram_surprise"])

    def after_step(self, progress: float) -> None:
        """Count the step's tokens."""
        self.unigram.update()

    def concealed(self, inputs: Batch) -> Concealed:
        """The chosen tokens, a tenth of which stays in the text."""
        target, seen = inputs["target"], inputs["text"].gather(1, inputs["places"])
        hidden = {"target": torch.ones_like(target, dtype=torch.bool)}
        return Concealed(self.logits, hidden, shown=(seen == target)[inputs["chosen"]], allowed=KEPT)

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The corrupted text, the original, and the text with the network's choices filled in."""
        seen, places, chosen = inputs["text"], inputs["places"], inputs["chosen"]
        texts = self.vocabulary.filled_in(seen, inputs["text_mask"], places, chosen)
        return [
            Panel("input", texts(seen.gather(1, places)[chosen])),
            Panel("target", texts(inputs["target"][chosen])),
            Panel("prediction, «wrong»", texts(self.logits(inputs).argmax(-1), inputs["target"][chosen])),
        ]
