"""Which tokens of a text are hidden where whole words, or spans of words, are."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.ops.draws import Draws


def choose_words(word: Tensor, candidates: Tensor, counts: Tensor, draws: Draws) -> Tensor:
    """Whole words in random order, as many as make up `counts` tokens; one that overshoots is passed over.

    That is the order of BERT's published code for whole-word masking. All rows go at once: each pass takes every word
    up to the first that overshoots.

    Args:
        word: int64 (B, L), number of the word that a token belongs to; below 0 for none.
        candidates: bool (B, L), tokens that may be chosen.
        counts: int64 (B,), tokens wanted; a row gives fewer where its words do not add up to that.
        draws: source of randomness.

    Returns:
        bool (B, L).
    """
    own = word.clamp(min=0)
    candidates = candidates & (word >= 0)
    size = torch.zeros_like(word).scatter_add_(1, own, candidates.long())
    order = draws.uniform(word.shape[1]).masked_fill(size == 0, 2.0).argsort(dim=1, stable=True)
    size, left = size.gather(1, order), counts
    taken = torch.zeros_like(candidates)
    while True:
        fits = ~taken & (size > 0) & (size <= left[:, None])
        now = fits & ((size * fits).cumsum(1) <= left[:, None])
        if not now.any():
            break
        taken = taken | now
        left = left - (size * now).sum(1)
    return torch.zeros_like(taken).scatter_(1, order, taken).gather(1, own) & candidates


def choose_spans(
    word: Tensor, candidates: Tensor, counts: Tensor, slots: int, draws: Draws, *, stop: float, longest: int
) -> Tensor:
    """Spans of whole words, each from a random token's word on, until `counts` tokens are chosen (arXiv 1907.10529).

    The last span is cut where the count is reached, inside a word if need be: rows have exactly as many as they should.
    A span may run over tokens that were chosen before.

    Args:
        word: int64 (B, L), increasing along a row; below 0 for tokens of no word.
        candidates: bool (B, L), tokens that may be chosen.
        counts: int64 (B,); a row with fewer candidates gives all it has.
        slots: at least the largest count.
        draws: source of randomness.
        stop: parameter of the geometric distribution of a span's length in words.
        longest: length that it is cut at.

    Returns:
        bool (B, L).
    """
    candidates = candidates & (word >= 0)
    score = draws.uniform(word.shape[1])
    lengths = span_lengths(draws, slots, stop, longest)
    chosen, left = torch.zeros_like(candidates), counts
    # Each span adds a token at least, so that there are enough lengths.
    for length in lengths.unbind(1):
        free = candidates & ~chosen
        if not (free & (left > 0)[:, None]).any():
            break
        # The free token that comes first in a random order of all is any of them with equal probability.
        first = word.gather(1, score.masked_fill(~free, 2.0).argmin(1, keepdim=True))
        span = free & (word >= first) & (word < first + length[:, None])
        span &= span.cumsum(1) <= left[:, None]
        chosen = chosen | span
        left = left - span.sum(1)
    return chosen


def span_lengths(draws: Draws, count: int, stop: float, longest: int) -> Tensor:
    """int64 (B, count) in 1..longest, n with probability proportional to (1 - stop)^(n - 1)."""
    share = (1 - stop) ** torch.arange(longest, device=draws.device, dtype=torch.float64)
    bounds = (share.cumsum(0) / share.sum())[:-1]
    return torch.bucketize(draws.uniform(count).double(), bounds, right=True) + 1


def as_places(chosen: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Chosen tokens bool (B, L) as int64 (B, slots) places, in order, and bool (B, slots), True where one is chosen.

    Of a row with more than `slots` the last are left out.
    """
    places = (~chosen).to(torch.int8).argsort(dim=1, stable=True)[:, :slots]
    return places, torch.arange(slots, device=chosen.device) < chosen.sum(1, keepdim=True)


def run_of(places: Tensor) -> Tensor:
    """int64 (B, M): which run of neighbors each of these increasing places belongs to, from 0."""
    begins = places[:, 1:] != places[:, :-1] + 1
    return torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))
