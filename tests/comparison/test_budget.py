"""The budget: what a step puts through the encoder."""

from __future__ import annotations

import pytest
import torch

from mmssl import recipe
from mmssl.build import build
from mmssl.comparison.budget import Budget, encoder_samples
from mmssl.errors import RecipeError

PLAIN = {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}


def samples(name: str, **changes: object) -> float:
    objective, loader = build(recipe.load(name, {"training.batch_size": 4, **changes}))
    before = dict(objective.encoder("image").__dict__)
    found = encoder_samples(objective, objective.encoder("image"), next(loader.batches(0, 1)), PLAIN)
    assert objective.encoder("image").__dict__.keys() == before.keys()  # nothing is left on it
    return found


@pytest.mark.parametrize(("name", "expected"), [("rotation_toy", 4), ("simclr_toy", 2), ("byol_toy", 2)])
def test_views_of_a_row_are_counted_and_passes_of_a_teacher_are_not(name, expected):
    assert samples(name) == pytest.approx(expected, rel=1e-6)


def test_a_masked_picture_counts_for_the_patches_that_are_seen():
    # Embedding sees all patches, the blocks a quarter of them.
    assert 0.25 < samples("masked_autoencoder_toy") < 0.6


def test_larger_pictures_count_for_more():
    assert samples("rotation_toy", **{"data.image.size": 64}) == pytest.approx(16, rel=0.1)


def test_budgets_are_read_in_three_units():
    assert Budget.of("steps=800").steps(256, 1.0) == 800
    assert Budget.of("samples=1e6").steps(256, 1.0) == 3906
    assert Budget.of("minutes=0.5").steps(256, 0.1) == 300


@pytest.mark.parametrize("text", ["800", "steps=", "steps=-1", "hours=3", "steps=nan", "samples=inf"])
def test_other_budgets_are_refused(text):
    with pytest.raises(RecipeError, match="should be one of steps=800"):
        Budget.of(text)
