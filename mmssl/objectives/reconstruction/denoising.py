"""Denoising: what did the text say before it was damaged?

Lewis et al. 2020, "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation, Translation, and
Comprehension", arXiv 1910.13461, sections 2.2 and 3.1. The sentences of a text are put in random order; then spans of
words, their lengths drawn from a Poisson distribution, are each replaced by ONE mask token until 30 % of the words are
gone, and a span of length zero puts a mask token where nothing was. The encoder reads what is left, the decoder says
the untouched text, start and end token included. As in the published code (fairseq) every tenth mask token is a random
token instead.

What transfers is the encoder; export writes it with its decoder, for AutoModelForSeq2SeqLM.

Known traps. The published code's defaults are not the published settings: those are a mean length of 3.5 (the paper
says 3), all sentences, no rotation of the document (left out here), one mask a span. Its spans may overlap, so that
fewer words go than asked for; here they do not, and exactly ceil(mask_ratio · words) go. A span never gets more mask
tokens than one, nor a text more than words were removed: what the encoder reads is never longer than the text. The last
span is cut to what is left of the budget. No span reaches over an end, so that the first and last word go half as often
as those inside. A mean of each process's mean weighs tokens unequally.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, cast

import torch
from annotated_types import Gt
from torch import Tensor

from mmssl.batch import Batch, valid_tokens
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.modules.vocabulary import Vocabulary
from mmssl.objectives.reconstruction._text_to_text import TextToText
from mmssl.ops.draws import Draws
from mmssl.ops.masking import choose_places
from mmssl.ops.transfers import upload
from mmssl.ranges import Share


def permute_sentences(sentence: Tensor, draws: Draws) -> Tensor:
    """An order of the places in which each row's sentences come in random order, and all else where it was.

    Args:
        sentence: int64 (B, L), number of the sentence, -1 for start, end and padding.
        draws: source of randomness.

    Returns:
        int64 (B, L), a permutation of the places.
    """
    inside, width = sentence >= 0, sentence.shape[1]
    rank = draws.permutations(width).gather(1, sentence.clamp(min=0))
    before = inside.cumsum(1) == 0
    key = torch.where(inside, rank, torch.where(before, -1, width))
    return key.argsort(dim=1, stable=True)


def draw_lengths(budgets: Tensor, slots: int, mean: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Poisson lengths until their sum is the budget; the last is cut to fit, and there are no more than the budget.

    Args:
        budgets: int64 (B,), words to remove.
        slots: S, at least the largest of them.
        mean: of the lengths.
        draws: source of randomness.

    Returns:
        int64 (B, S) lengths, and bool (B, S), True for those that are used, which come first.
    """
    # Inverse of the cumulative distribution; what lies beyond the table is less likely than a float can tell.
    counts = torch.arange(math.ceil(mean + 10 * mean**0.5 + 20), dtype=torch.float64)
    cumulative = (counts * math.log(mean) - mean - torch.lgamma(counts + 1)).exp().cumsum(0)
    uniform = draws.uniform(slots)
    drawn = torch.searchsorted(cumulative.to(uniform)[:-1].contiguous(), uniform, right=True)
    budget, slot = budgets[:, None], torch.arange(slots, device=budgets.device)
    rest = budget - (drawn.cumsum(1) - drawn)
    lengths = torch.where(slot == budget - 1, rest, drawn.minimum(rest))
    return lengths, (rest > 0) & (slot < budget)


class Denoising(TextToText):
    """Say the text from what is left of it.

    Args:
        encoders: holds the text encoder, built with its decoder and with a tokenizer that has a mask token.
        encoder: its name.
        mask_ratio: share of a text's words that are removed.
        span: mean length of a removed span, in words; 3.5 in the published code.
        random: share of the mask tokens that are a random token instead.
        permute: put the sentences in random order.
    """

    needs = ("text", "text_word", "text_sentence")

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "text",
        mask_ratio: Share = 0.3,
        span: Annotated[float, Gt(0)] = 3.0,
        random: Share = 0.1,
        permute: bool = True,
    ) -> None:
        super().__init__(encoders, encoder, "denoising")
        self.mask_ratio, self.span, self.random, self.permute = mask_ratio, span, random, permute
        self.vocabulary = Vocabulary(cast(TextEncoder, self.encoder(encoder)), encoder, "denoising")

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`text` (B, L) -> the damaged `text` and `target`, the untouched one, both (B, L), each with its mask."""
        text, word, mask = batch["text"], batch["text_word"], valid_tokens(batch)
        seen = text
        if self.permute:
            order = permute_sentences(batch["text_sentence"], draws)
            seen, word = text.gather(1, order), word.gather(1, order)
        seen, seen_mask = self._infill(seen, word, mask, draws)
        return {
            "text": seen,
            "text_mask": seen_mask,
            "target": text,
            "target_mask": mask,
            "target_tokens": mask.sum(),
        }

    def _infill(self, text: Tensor, word: Tensor, mask: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Each span of words becomes one mask token: int64 (B, L), and bool (B, L), True where there is a token.

        Spans and words that stay are items of one row, in uniformly random order: a mask token per span, the words in
        the order of the text.
        """
        width = text.shape[1]
        place = torch.arange(width, device=text.device)
        inside = word >= 0
        begins = inside & (word != torch.cat([torch.full_like(word[:, :1], -1), word[:, :-1]], dim=1))
        number = (begins.cumsum(1) - 1).clamp(min=0)
        words = begins.sum(1)
        # Rounding first: 0.55 x 100 is more than 55 in floating point.
        budget_of = [min(n, math.ceil(round(self.mask_ratio * n, 9))) for n in range(width + 1)]
        budgets, slots = upload(budget_of, text.device)[words], max(1, budget_of[-1])
        lengths, used = draw_lengths(budgets, slots, self.span, draws)
        items = words - budgets + used.sum(1)
        places, chosen = choose_places(place < items[:, None], used.sum(1), slots, draws)

        span = torch.full_like(text, -1).scatter(1, places, torch.where(chosen, lengths, -1))
        is_span = span >= 0
        sizes = torch.where(is_span, span, 1)
        first = sizes.cumsum(1) - sizes
        # Of each word that stays: how many mask tokens come before it. The last column takes what is no such word.
        stays = ~is_span & (place < items[:, None])
        at = torch.where(stays, first, width)
        before = torch.full_like(text[:, :1], -1).repeat(1, width + 1).scatter(1, at, is_span.cumsum(1))[:, :width]
        before = before.gather(1, number)
        kept = mask & (~inside | (before >= 0))
        # Start tokens have none before them, end tokens all.
        before = torch.where(inside, before, torch.where(inside.cumsum(1) > 0, used.sum(1)[:, None], 0))

        at = torch.where(kept, kept.cumsum(1) - 1 + before, width)
        other = self.vocabulary.ordinary[draws.integers(len(self.vocabulary.ordinary), width)]
        holes = torch.where(draws.chance(self.random, width), other, self.vocabulary.mask_id)
        seen = torch.cat([holes, holes[:, :1]], dim=1).scatter(1, at, text)[:, :width]
        seen_mask = place < (kept.sum(1) + used.sum(1))[:, None]
        return seen.masked_fill(~seen_mask, self.tokenizer.pad_id), seen_mask
