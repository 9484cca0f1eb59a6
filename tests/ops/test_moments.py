"""Moments of a clip: draws are even over what is allowed, and a beat sounds like the next."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy import stats

from mmssl.ops.draws import Draws
from mmssl.ops.moments import correlation_over_lags, draw_allowed, draw_apart, loudness, sound_alike


def test_every_allowed_entry_has_the_same_probability_and_no_other_one_any():
    allowed = torch.tensor([[True, False, True, True], [False] * 4, [False, False, False, True]]).repeat(4000, 1)
    entry, found = draw_allowed(allowed, Draws(0, 0, len(allowed)))
    assert found.view(-1, 3).all(0).tolist() == [True, False, True]
    assert not found.view(-1, 3)[:, 1].any()
    assert allowed[found].gather(1, entry[found, None]).all()
    assert stats.chisquare(torch.bincount(entry.view(-1, 3)[:, 0], minlength=4)[[0, 2, 3]].numpy()).pvalue > 1e-4


def test_sets_of_places_far_enough_apart_are_all_alike():
    sets = [s for s in itertools.combinations(range(9), 3) if min(np.diff(s)) >= 3]
    drawn = [tuple(row) for row in draw_apart(9, 3, 3, Draws(0, 0, 5000)).tolist()]
    assert set(drawn) == set(sets)
    assert stats.chisquare([drawn.count(s) for s in sets]).pvalue > 1e-4


def test_loudness_is_that_of_each_frame():
    sounds = torch.randn(2, 3, 40, dtype=torch.float64)
    expected = np.sqrt((sounds.numpy().reshape(2, 3, 4, 10) ** 2).mean(-1))
    np.testing.assert_allclose(loudness(sounds, 10).numpy(), expected)


def test_likeness_is_the_correlation_of_smoothed_loudness():
    windows = torch.rand(1, 6, 20, dtype=torch.float64)
    padded = np.pad(windows[0].numpy(), ((0, 0), (1, 1)), mode="edge")
    smooth = np.stack([np.convolve(one, [0.25, 0.5, 0.25], mode="valid") for one in padded])
    for threshold in (0.1, 0.5, 0.9):
        assert np.array_equal(sound_alike(windows, threshold)[0].numpy(), np.corrcoef(smooth) > threshold)


def test_silences_are_alike_and_a_click_is_unlike_them():
    click = torch.zeros(20).scatter(0, torch.tensor([7]), 1.0)
    alike = sound_alike(torch.stack([torch.zeros(20), torch.ones(20), click, 3 * click])[None], 0.99)[0]
    assert alike.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2


def test_correlation_over_lags_is_that_of_numpy():
    late, early = 1000 * torch.randn(2, 3, 9, 4, dtype=torch.float64)
    found = correlation_over_lags(late, early, 11)
    assert found.shape == (3, 23)
    for row in range(3):
        a, b = ((x[row] - x[row].mean(0)).numpy() for x in (late, early))
        full = (
            sum(np.correlate(a[:, d], b[:, d], mode="full") for d in range(4)) / np.linalg.norm(a) / np.linalg.norm(b)
        )
        np.testing.assert_allclose(found[row, 3:-3].numpy(), full, atol=1e-9)
        assert not found[row, :3].any()  # no moment is in both
    moved = torch.randn(1, 30, 2, dtype=torch.float64)
    assert correlation_over_lags(moved[:, :20], moved[:, 3:23], 5).argmax() - 5 == 3
    still = torch.full((3, 9, 4), 0.1)
    assert correlation_over_lags(still, late.float(), 2).abs().max() < 1e-3
