"""Whole words and spans: BERT's and SpanBERT's order of events, against loops that follow the published text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mmssl.ops.draws import Draws
from mmssl.ops.words import as_places, choose_spans, choose_words, run_of, span_lengths

ROWS, LENGTH = 300, 40


def texts(seed: int = 0, rows: int = ROWS, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Numbers of words of 1 to 5 tokens between a start and an end token, and what may be chosen."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(rows, length, generator=generator) < 0.5
    begins[:, 1] = True
    word = begins[:, 1:].long().cumsum(1) - 1
    word = torch.cat([torch.full((rows, 1), -1), word], 1)
    last = torch.randint(1, length, (rows, 1), generator=generator)
    word = torch.where(torch.arange(length) < last, word, -1)
    candidates = (word >= 0) & (torch.rand(rows, length, generator=generator) < 0.95)
    return word, candidates


def test_words_are_taken_as_in_berts_loop():
    word, candidates = texts()
    counts = torch.randint(0, 12, (ROWS,), generator=torch.Generator().manual_seed(1))
    chosen = choose_words(word, candidates, counts, Draws(0, 3, ROWS))
    score = Draws(0, 3, ROWS).uniform(LENGTH).tolist()
    skipped = 0
    for row, (words, may, count) in enumerate(zip(word.tolist(), candidates.tolist(), counts.tolist(), strict=True)):
        groups: dict[int, list[int]] = {w: [] for w in words if w >= 0}
        for place, w in enumerate(words):
            if may[place]:
                groups[w].append(place)
        taken: list[int] = []
        for w in sorted((w for w in groups if groups[w]), key=score[row].__getitem__):
            if len(taken) >= count:
                break
            if len(taken) + len(groups[w]) > count:
                skipped += 1
                continue
            taken += groups[w]
        assert chosen[row].nonzero()[:, 0].tolist() == sorted(taken)
    assert skipped > 100


def test_every_word_is_as_likely_as_any_other_of_its_length():
    word = torch.tensor([-1, 0, 0, 1, 2, 2, 3, 4, 4, -1]).expand(6000, -1)
    chosen = choose_words(word, word >= 0, torch.full((6000,), 3), Draws(0, 0, 6000))
    hits = chosen.sum(0)[[1, 4, 7]], chosen.sum(0)[[3, 6]]
    for counts in hits:
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert torch.equal(chosen[:, 1], chosen[:, 2])


def test_span_lengths_are_spanberts():
    lengths = span_lengths(Draws(0, 0, 4000), 10, 0.2, 10)
    assert lengths.shape == (4000, 10)
    share = 0.8 ** np.arange(10)
    share /= share.sum()
    assert math.isclose(share @ np.arange(1, 11), 3.797, abs_tol=5e-4)
    counts = torch.bincount(lengths.flatten(), minlength=11)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy(), share * 40_000).pvalue > 1e-4


def test_spans_begin_at_words_and_are_cut_at_the_count():
    word, candidates = texts(2)
    counts = (0.15 * candidates.sum(1)).ceil().long()
    chosen = choose_spans(word, candidates, counts, 8, Draws(0, 0, ROWS), stop=0.2, longest=10)
    assert torch.equal(chosen.sum(1), counts)
    assert not (chosen & ~candidates).any()
    cut = 0
    for row in range(ROWS):
        words = word[row][chosen[row]].unique()
        torn = [
            w for w in words.tolist() if (candidates[row] & (word[row] == w)).sum() > chosen[row][word[row] == w].sum()
        ]
        assert len(torn) <= 1  # the last span's last word alone
        for w in torn:
            inside = chosen[row][(word[row] == w) & candidates[row]].tolist()
            assert inside == sorted(inside, reverse=True)
        cut += len(torn)
    assert cut > 20
    everything = choose_spans(
        word, candidates, torch.full((ROWS,), LENGTH), LENGTH, Draws(0, 0, ROWS), stop=0.2, longest=3
    )
    assert torch.equal(everything, candidates)


def published_spans(word: np.ndarray, count: int, random: np.random.Generator) -> set[int]:
    """The order of events of the paper's section 3.1 and its code, one text at a time: anchors until one is free."""
    share = 0.8 ** np.arange(10)
    mask: set[int] = set()
    while len(mask) < count:
        length = random.choice(10, p=share / share.sum()) + 1
        anchor = random.integers(len(word))
        if anchor in mask:
            continue
        place = int(np.flatnonzero(word == word[anchor])[0])
        while place < len(word) and word[place] < word[anchor] + length and len(mask) < count:
            mask.add(place)
            place += 1
    return mask


def test_spans_are_distributed_as_in_the_published_loop():
    rows, count = 4000, 9
    word = torch.tensor(
        [0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 6, 7, 8, 9, 10, 10, 11, 12, 12, 12, 13, 14, 15, 16, 17, 18, 18, 19]
    )
    own = choose_spans(
        word.expand(rows, -1), torch.ones(rows, len(word), dtype=torch.bool), torch.full((rows,), count), count,
        Draws(0, 0, rows), stop=0.2, longest=10,
    )  # fmt: skip
    random = np.random.default_rng(0)
    other = torch.zeros_like(own)
    for row in range(rows):
        other[row, sorted(published_spans(word.numpy(), count, random))] = True
    assert (own.sum(1) == count).all()
    # How often each place is hidden, and how many runs there are.
    for values in ([c.sum(0) for c in (own, other)], [torch.bincount(runs(c), minlength=9) for c in (own, other)]):
        table = torch.stack(values)
        assert stats.chi2_contingency(table[:, table.sum(0) > 10].numpy()).pvalue > 1e-3


def runs(chosen: Tensor) -> Tensor:
    return (chosen[:, 1:] & ~chosen[:, :-1]).sum(1) + chosen[:, 0]


def test_places_are_in_order_and_know_their_run():
    chosen = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    places, valid = as_places(chosen, 4)
    assert places.tolist() == [[1, 2, 4, 5], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert valid.tolist() == [[True] * 4, [False] * 4, [True] * 4]
    assert run_of(places)[0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("choose", ["words", "spans"])
def test_a_row_does_not_depend_on_the_others_nor_on_the_process(choose):
    word, candidates = texts(3, rows=8)
    counts = torch.full((8,), 4)

    def run(rows: slice, **share: int) -> Tensor:
        draws = Draws(0, 1, rows.stop - rows.start, **share)
        if choose == "words":
            return choose_words(word[rows], candidates[rows], counts[rows], draws)
        return choose_spans(word[rows], candidates[rows], counts[rows], 4, draws, stop=0.2, longest=10)

    halves = [run(slice(4 * i, 4 * i + 4), share=i, shares=2) for i in range(2)]
    assert torch.equal(torch.cat(halves), run(slice(0, 8)))
