"""Span denoising: what was in the gaps?

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (T5),
arXiv 1910.10683, section 3.1.4, with the counts of its published code: round(0.15 · n) of a text's n tokens are removed
in round(removed / 3) spans, whose lengths, and those of what is left between them, are uniform among all divisions. The
encoder reads the text with one sentinel token in place of each span; the decoder says each sentinel and what it stands
for, then the end token. Sentinels are T5's `<extra_id_0>`, `<extra_id_1>` ..., the highest ids in descending order: a
tokenizer of T5 has them, any other gets them by `sentinels: 100` of the encoder. 568 tokens become 512 and 114.

What transfers is the encoder; export writes it with its decoder, for AutoModelForSeq2SeqLM.

Known traps. The published pattern begins with what is left and ends with a span, so that the last token is always
removed and the first never: `random_roll` turns it by a random number of places, which can cut one span in two. With
the published code's roll a text that begins with a span has it in front of the first sentinel; here the sentinel comes
first everywhere. Sentinels and the end token, a quarter of what is said, are easily learned: the loss is far below
chance before any word is. Start and end tokens and padding are never removed. A mean of each process's mean weighs
tokens unequally.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from mmssl.batch import Batch, valid_tokens
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives.reconstruction._text_to_text import TextToText, pack
from mmssl.ops.draws import Draws
from mmssl.ops.masking import choose_places
from mmssl.ops.transfers import upload
from mmssl.ranges import Ratio


def count_spans(length: int, mask_ratio: float = 0.15, span: float = 3.0) -> tuple[int, int]:
    """Tokens removed from a text of `length` tokens, and the number of spans they are in; none of fewer than two."""
    removed = min(max(round(mask_ratio * length), 1), length - 1) if length > 1 else 0
    return removed, min(max(round(removed / span), 1), removed, length - removed)


def corrupted_lengths(length: int, mask_ratio: float = 0.15, span: float = 3.0) -> tuple[int, int]:
    """Tokens that encoder and decoder see of `length` tokens, an end token each; a roll that cuts a span adds one."""
    removed, spans = count_spans(length, mask_ratio, span)
    return length - removed + spans + 1, removed + spans + 1


def draw_spans(lengths: Tensor, removed: Tensor, spans: Tensor, width: int, draws: Draws, *, roll: bool) -> Tensor:
    """Which places are removed: a random division of both kinds of tokens into equally many parts, taken in turn.

    Args:
        lengths: int64 (B,), tokens n of each row.
        removed: int64 (B,), of them removed.
        spans: int64 (B,), in so many spans.
        width: W, at least the largest length.
        draws: source of randomness.
        roll: turn the pattern within its row.

    Returns:
        bool (B, W), False from place n on.
    """
    place = torch.arange(width, device=lengths.device)
    kept, lengths = (lengths - removed)[:, None], lengths[:, None]
    inside, second = place < lengths, place >= kept
    # The tokens that stay, then those that go; a part begins at the first of each kind and at spans - 1 others of it.
    begins = torch.zeros_like(inside)
    for kind in (~second, second):
        others = inside & kind & (place != 0) & (place != kept)
        places, chosen = choose_places(others, spans - 1, width, draws)
        begins |= torch.zeros_like(inside).scatter(1, places, chosen)
    part = begins.cumsum(1) - second * (spans[:, None] - 1)
    turn = torch.where(inside, 2 * part + second, 2 * width + 2)
    pattern = (second & inside).gather(1, turn.argsort(dim=1, stable=True))
    if roll:
        by = (draws.uniform(1) * lengths).long()
        pattern = pattern.gather(1, ((place + by) % lengths.clamp(min=1)).expand_as(pattern))
    return pattern & inside


class SpanDenoising(TextToText):
    """Say what was removed from a text.

    Args:
        encoders: holds the text encoder, built with its decoder and with a tokenizer that has sentinels.
        encoder: its name.
        mask_ratio: share of a text's tokens that are removed.
        span: mean length of a removed span, in tokens.
        random_roll: turn the pattern by a random number of places; off as published.
    """

    needs = ("text",)
    sentinels: Tensor

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "text",
        mask_ratio: Ratio = 0.15,
        span: Annotated[float, Ge(1)] = 3.0,
        random_roll: bool = True,
    ) -> None:
        super().__init__(encoders, encoder, "span_denoising")
        if not self.tokenizer.sentinel_ids:
            raise RecipeError(
                f"span_denoising needs sentinels, and the tokenizer of the encoder '{encoder}' has none: "
                f"set encoders.{encoder}.sentinels: 100"
            )
        self.mask_ratio, self.span, self.random_roll = mask_ratio, span, random_roll
        self.register_buffer("sentinels", torch.tensor(self.tokenizer.sentinel_ids), persistent=False)

    def _widths(self, length: int) -> tuple[int, int]:
        """The most tokens that encoder and decoder see of a text with its start and end token in `length` places."""
        frame = 1 + (self.start_id >= 0)
        most = [(0, 0)]
        for inside in range(length + 1):
            read, said = corrupted_lengths(inside, self.mask_ratio, self.span)
            cut = int(self.random_roll and inside > 1)
            most.append((read - 1 + cut + min(frame, length - inside), said + cut))
        return max(read for read, _ in most), max(said for _, said in most)

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`text` (B, L) -> the `text` with sentinels, (B, N), and `target` (B, T), each with its mask.

        N and T are what the longest text of L tokens can need.
        """
        text, mask, width = batch["text"], valid_tokens(batch), batch["text"].shape[1]
        inside = self.inside(text, mask)
        counts = [count_spans(n, self.mask_ratio, self.span) for n in range(width + 1)]
        if max(spans for _, spans in counts) + self.random_roll > len(self.sentinels):
            raise RecipeError(
                f"span_denoising: {width} tokens have up to {counts[-1][1] + self.random_roll} spans, and the "
                f"tokenizer has {len(self.sentinels)} sentinels; raise encoders.{self.name}.sentinels"
            )
        lengths = inside.sum(1)
        removed, spans = upload(counts, text.device)[lengths].unbind(1)
        pattern = draw_spans(lengths, removed, spans, width, draws, roll=self.random_roll)
        # Its first place is the first token after the start token.
        gone = inside & pattern.gather(1, (inside.cumsum(1) - 1).clamp(min=0))

        begins = gone & ~torch.cat([torch.zeros_like(gone[:, :1]), gone[:, :-1]], dim=1)
        sentinel = self.sentinels[(begins.cumsum(1) - 1).clamp(min=0)]
        read, said = self._widths(width)
        seen = torch.where(begins, sentinel, text)
        seen, seen_mask = pack(seen, mask & (~gone | begins), read, self.tokenizer.pad_id)
        # Each removed token after a place for the sentinel of its span, and the end token after all.
        end = torch.full_like(text[:, :1], self.end_id)
        pairs, wanted = torch.stack([sentinel, text], dim=2), torch.stack([begins, gone], dim=2)
        target = torch.cat([pairs.flatten(1), end], dim=1)
        wanted = torch.cat([wanted.flatten(1), torch.ones_like(gone[:, :1])], dim=1)
        target, target_mask = pack(target, wanted, said, self.tokenizer.pad_id)
        return {
            "text": seen,
            "text_mask": seen_mask,
            "target": target,
            "target_mask": target_mask,
            "target_tokens": target_mask.sum(),
        }
