"""Masked language modeling: which token stood here?

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
running frequencies of tokens, which fall far below guessing without looking (see `mmssl.ops.unigram`).

Known traps. One Bernoulli draw a token gives another number of masked tokens in each text (a standard deviation of 4 at
128 tokens). Special tokens and padding are never chosen. A mean of each process's mean weighs tokens unequally. Pieces
of a word are found by their place in the text: `##` marks them in BERT's own vocabulary alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over, token_gains
from mmssl.ops.masking import choose_places, corrupt_tokens, take
from mmssl.ops.unigram import Unigram
from mmssl.ops.words import as_places, choose_spans, choose_words, run_of

# A text has more Bernoulli-masked tokens than there are places for with this probability; the last ones stay visible.
OVERFLOW = 1e-9


class MaskedLanguage(Objective):
    """Predict hidden tokens from the rest of the text.

    Args:
        encoders: holds the text encoder, whose tokenizer has a mask token.
        encoder: its name.
        rate: share of a text's tokens that are predicted.
        count: `exact`, or `bernoulli` for that share on average.
        unit: what is hidden together: a `token`, a `word` or a `span` of words.
        stop: of spans: the geometric distribution's probability that a span ends after a word.
        longest: of spans: largest number of words.
    """

    needs: tuple[str, ...] = ("text",)
    divisors = ("masked_tokens", "unigram_surprise")
    vocabulary: Tensor
    special: Tensor

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "text",
        rate: float = 0.15,
        count: Literal["exact", "bernoulli"] = "exact",
        unit: Literal["token", "word", "span"] = "token",
        stop: float = 0.2,
        longest: int = 10,
    ) -> None:
        super().__init__(encoders)
        text = cast(TextEncoder, self.encoder(encoder))
        if text.modality != "text":
            raise RecipeError(f"masked_language reads text, and the encoder '{encoder}' reads {text.modality}")
        if not 0 < rate < 1:
            raise RecipeError(f"masked_language: rate = {rate} should be a share between 0 and 1")
        if not 0 < stop < 1 or longest < 1:
            raise RecipeError(f"masked_language: stop = {stop} should lie between 0 and 1, longest = {longest} above 0")
        if count == "bernoulli" and unit != "token":
            raise RecipeError(f"masked_language: count: bernoulli draws each token on its own; leave out unit: {unit}")
        self.tokenizer = text.tokenizer
        if self.tokenizer.mask_id is None:
            raise RecipeError(
                f"masked_language needs a mask token, and the tokenizer of the encoder '{encoder}' has none; "
                "take a masked model's tokenizer, or train:8000 for one made from the texts"
            )
        if unit != "token":
            self.needs = ("text", "text_word")
        self.name, self.rate, self.mask_id = encoder, rate, self.tokenizer.mask_id
        self.count, self.unit, self.stop, self.longest = count, unit, stop, longest
        special = torch.zeros(self.tokenizer.vocab_size, dtype=torch.bool)
        special[sorted(self.tokenizer.special_ids)] = True
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("vocabulary", (~special).nonzero()[:, 0], persistent=False)
        self.tokens, width = text.token_embedding.shape
        self.head = nn.Sequential(nn.Linear(text.dim, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(self.tokens))
        self.unigram = Unigram(self.tokens, len(self.vocabulary))

    def chance(self, rows: int) -> Chance:
        """Any token of the embedding table, equally likely; the relative error of knowing how frequent each is."""
        return Chance(math.log(self.tokens), {"accuracy": 1 / self.tokens, "relative_error": 1.0})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`text` (B, L) -> the corrupted `text`, `places` and their `target` tokens (B, M), `chosen` bool (B, M).

        M is the number of masked tokens of a text that fills the row; shorter texts leave the last places unchosen.
        """
        text = batch["text"]
        mask = batch.get("text_mask", torch.ones_like(text, dtype=torch.bool))
        candidates = mask & ~self.special[text]
        places, chosen = self._choose(batch, mask, candidates, draws)
        seen = corrupt_tokens(
            *(text, places, chosen, draws),
            mask_id=self.mask_id,
            vocabulary=self.vocabulary,
            together=run_of(places) if self.unit == "span" else None,
        )
        target = text.gather(1, places)
        self.unigram.see(text[candidates])
        return {
            "text": seen,
            "text_mask": mask,
            "places": places,
            "chosen": chosen,
            "target": target,
            "masked_tokens": chosen.sum(),
            "unigram_surprise": (self.unigram.surprise(target) * chosen).sum(),
        }

    def _choose(self, batch: Batch, mask: Tensor, candidates: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        length = mask.shape[1]
        if self.count == "bernoulli":
            from scipy.stats import binom

            slots = min(length, int(binom.isf(OVERFLOW, length, self.rate)) + 1)
            return as_places(candidates & draws.chance(self.rate, length), slots)
        spans = self.unit == "span"
        count_of = [math.ceil(self.rate * n) if spans else max(1, round(self.rate * n)) for n in range(length + 1)]
        counts = torch.tensor(count_of, device=mask.device)[(candidates if spans else mask).sum(1)]
        slots = max(count_of)
        if self.unit == "token":
            return choose_places(candidates, counts, slots, draws)
        word = batch["text_word"]
        if spans:
            chosen = choose_spans(word, candidates, counts, slots, draws, stop=self.stop, longest=self.longest)
        else:
            chosen = choose_words(word, candidates, counts, draws)
        return as_places(chosen, slots)

    def predict(self, inputs: Batch) -> Batch:
        """Of each chosen token (B, M): `gain`, nats better than a guess among all, and whether it was `right`.

        See `token_gains`.
        """
        gain, right = token_gains(self.logits(inputs), inputs["target"], inputs["chosen"])
        return {"gain": gain, "right": right}

    def logits(self, inputs: Batch) -> Tensor:
        """Of all N chosen tokens, row by row, (N, V): transform, GELU, norm, then the tied embedding and a bias."""
        text = cast(TextEncoder, self.encoder(self.name))
        tokens = text(inputs["text"], inputs["text_mask"]).tokens
        hidden = take(tokens, inputs["places"])[inputs["chosen"]]
        return F.linear(self.head(hidden), text.token_embedding, self.bias)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy, means over the masked tokens of the global batch, and the relative error."""
        chosen, surprise = inputs["chosen"], math.log(self.tokens) - outputs["gain"]
        return {
            "loss": mean_over(surprise, chosen, inputs["masked_tokens"]),
            "accuracy": mean_over(outputs["right"], chosen, inputs["masked_tokens"]),
            "relative_error": mean_over(surprise.detach(), chosen, inputs["unigram_surprise"]),
        }

    def after_step(self, progress: float) -> None:
        """Count the step's tokens."""
        self.unigram.update()

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The corrupted text, the original, and the text with the network's choices filled in."""
        # Unchosen places keep the token that the network saw there, which is the original.
        seen = inputs["text"].gather(1, inputs["places"])

        def texts(tokens: Tensor) -> list[Tensor | str]:
            filled = inputs["text"].scatter(1, inputs["places"], seen.masked_scatter(inputs["chosen"], tokens))
            return [self.tokenizer.decode(ids[mask]) for ids, mask in zip(filled, inputs["text_mask"], strict=True)]

        return [
            Panel("input", texts(seen[inputs["chosen"]])),
            Panel("target", texts(inputs["target"][inputs["chosen"]])),
            Panel("prediction", texts(self.logits(inputs).argmax(-1))),
        ]
