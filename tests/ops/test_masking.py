"""Choice of places and corruption of tokens: exact counts, uniform places, stated shares."""

from __future__ import annotations

import random

import pytest
import torch
from scipy import stats
from transformers.models.flava.image_processing_flava import FlavaMaskingGenerator

from mmssl.ops.draws import Draws
from mmssl.ops.masking import choose_places, corrupt_tokens, mask_blocks


def test_chosen_places_are_distinct_candidates_in_the_stated_number():
    generator = torch.Generator().manual_seed(0)
    candidates = torch.rand(200, 20, generator=generator) < 0.4
    counts = torch.randint(0, 9, (200,), generator=generator)
    places, chosen = choose_places(candidates, counts, 8, Draws(0, 0, 200))
    assert torch.equal(chosen.sum(1), counts.minimum(candidates.sum(1)))
    for row in range(200):
        taken = places[row][chosen[row]]
        assert len(set(taken.tolist())) == len(taken)
        assert candidates[row, taken].all()
        assert len(set(places[row].tolist())) == 8


def test_places_are_uniform():
    candidates = torch.ones(4000, 12, dtype=torch.bool)
    places, _ = choose_places(candidates, torch.full((4000,), 3), 3, Draws(0, 0, 4000))
    assert stats.chisquare(torch.bincount(places.flatten()).numpy()).pvalue > 1e-4


def test_tokens_are_masked_replaced_or_kept_in_the_stated_shares():
    rows, slots = 2000, 10
    tokens = torch.full((rows, 30), 7)
    places = torch.arange(slots).expand(rows, -1)
    chosen = places < 8
    vocabulary = torch.arange(10, 60)
    seen = corrupt_tokens(tokens, places, chosen, Draws(0, 0, rows), mask_id=4, vocabulary=vocabulary)
    assert (seen[:, 8:] == 7).all()
    hit = seen[:, :8].flatten()
    for happened, share in ((hit == 4, 0.8), (hit == 7, 0.1), (hit >= 10, 0.1)):
        assert stats.binomtest(int(happened.sum()), hit.numel(), share).pvalue > 1e-4
    assert ((hit == 4) | (hit == 7) | (hit >= 10)).all()
    counts = torch.bincount(hit[hit >= 10], minlength=60)[10:]
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.long
def test_blocks_hide_what_the_published_generator_hides():
    random.seed(0)
    published = FlavaMaskingGenerator()
    theirs = torch.stack([published().flatten() for _ in range(1500)]).bool()
    ours = mask_blocks((14, 14), 75, Draws(0, 0, 3000))
    assert ours.sum(1).max() == 75
    assert stats.ks_2samp(ours.sum(1), theirs.sum(1)).pvalue > 1e-3
    share = ours.float().mean(0)
    assert torch.corrcoef(torch.stack([share, theirs.float().mean(0)]))[0, 1] > 0.99  # corners are hidden rarely
    assert abs(float(share.mean() - theirs.float().mean())) < 0.003
    # Blocks, not single places: neighbors differ far more rarely than two places do, 47 %.
    edges = [float((m.view(-1, 14, 14).float().diff(dim=1)).abs().mean()) for m in (ours, theirs)]
    assert edges[0] < 0.2
    assert abs(edges[0] - edges[1]) < 0.005


def test_blocks_fit_any_grid_and_a_row_draws_alone():
    for grid, total in (((4, 4), 6), ((3, 9), 11), ((8, 20), 60)):
        hidden = mask_blocks(grid, total, Draws(0, 3, 40), smallest=2)
        counts = hidden.sum(1)
        assert counts.max() == total
        assert counts.min() >= 0.7 * total
        half = mask_blocks(grid, total, Draws(0, 3, 20, share=1, shares=2), smallest=2)
        assert torch.equal(half, hidden[20:])
