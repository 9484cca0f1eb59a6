"""Pairs of strangers and batches of one row: at chance through the library's tasks, and what is shared is found."""

from __future__ import annotations

import pytest
import torch

from mmssl import recipe as recipes
from mmssl.audit.arms import tokenizers_by_name
from mmssl.audit.networks import SmallNetwork, stand_in
from mmssl.audit.nulls import CODE, UNLIKE
from mmssl.audit.pairs import STRANGERS, Code, Strangers, audit_pairs, measure_pairs, own_halves
from mmssl.audit.twins import TWINS, Twins, audit_twins, measure_twins
from mmssl.build import build
from mmssl.errors import RecipeError
from mmssl.objectives.correspondence.contrastive import Contrastive
from mmssl.objectives.invariance.byol import BYOL

ROWS = {"image": torch.arange(12), "text": torch.arange(12), "text_mask": torch.arange(12), "id": torch.arange(12)}


def test_no_side_meets_its_own_row_and_masks_go_with_their_texts():
    for batch in [*Strangers(ROWS, 4, 0, None).batches(0, 20), *Strangers(ROWS, 4, 0, None).once()]:
        assert len(batch["image"]) == 4
        assert not set(batch["image"].tolist()) & set(batch["text"].tolist())
        assert torch.equal(batch["text"], batch["text_mask"])
        assert torch.equal(batch["image"], batch["id"])


def test_places_of_the_small_network_are_as_wide_as_the_whole():
    network = SmallNetwork()
    seen = network(torch.zeros(2, 3, 32, 24, dtype=torch.uint8))
    assert seen.tokens.shape == (2, seen.grid[0] * seen.grid[1], network.dim)
    assert seen.pooled.shape == (2, network.dim)


def test_each_row_is_tested_once():
    met = [torch.cat([batch["image"], batch["text"]]) for batch in Strangers(ROWS, 3, 0, None).once()]
    assert sorted(torch.cat(met).tolist()) == list(range(12))


def test_the_code_is_on_both_sides():
    ids = torch.full((8, 10), 5)
    mask = torch.arange(10) < 8
    rows = {
        "image": torch.zeros(8, 3, 4, 4, dtype=torch.uint8),
        "audio": torch.zeros(8, 1600),
        "text": ids,
        "text_mask": mask.expand(8, -1),
    }
    planted = Code(16000, 100).planted(rows, torch.arange(8))
    assert planted["image"].float().mean((1, 2, 3)).diff().min() > 10
    assert planted["audio"].abs().amax(1).diff().min() > 0
    assert planted["text"][:, 1].tolist() == list(range(99, 91, -1))
    assert planted["text"][:, [0, 7, 8, 9]].eq(5).all()


class SharesTheCrop(Contrastive):
    """Both sides are told the same number, as where one draw serves for both."""

    def transform(self, batch, draws):
        inputs = super().transform(batch, draws)
        shared = (draws.uniform() * 8).long().clamp(max=7)
        return inputs | {
            "a": (inputs["a"] * 0 + 30 * shared[:, None, None, None]).to(inputs["a"].dtype),
            "b": inputs["b"] * 0 + 5 + shared[:, None],
        }


@pytest.mark.long
def test_pairs_of_strangers_are_at_chance_and_a_shared_draw_is_found():
    given = recipes.load("contrastive_toy", {"training.workers": 0, "data.limit": 128, "data.image.size": 16})
    objective, _ = build(given)
    words = tokenizers_by_name(objective)
    control, clean = audit_pairs(given, objective.needs, words, steps=40)
    assert (control.arm.artifact, control.verdict) == (CODE, "leaks"), control
    assert clean.verdict == "clean", clean
    leaking = stand_in(given, words)
    leaking.__class__ = SharesTheCrop
    train, test = own_halves(given, objective.needs, words, 128)
    found = measure_pairs(leaking, STRANGERS, Strangers(train, 16, 1, None), Strangers(test, 16, 2, None), 40, 0)
    assert found.verdict == "leaks", found


def test_too_few_rows_are_named():
    given = recipes.load("contrastive_toy", {"training.workers": 0, "training.batch_size": 2, "data.limit": 5})
    objective, _ = build(given)
    with pytest.raises(RecipeError, match="pairs of strangers take 8 rows that differ on every side, and there are 5"):
        audit_pairs(given, objective.needs, tokenizers_by_name(objective))


def test_a_batch_is_one_row_many_times_and_in_the_control_it_is_not():
    rows = {"image": torch.arange(20)}
    same = [batch["image"].tolist() for batch in Twins(rows, 4, 0, unlike=False).batches(0, 10)]
    assert all(len(one) == 4 and len(set(one)) == 1 for one in same)
    assert len({one[0] for one in same}) > 3
    assert all(len(set(batch["image"].tolist())) == 4 for batch in Twins(rows, 4, 0, unlike=True).batches(0, 10))


class OneBrightness(BYOL):
    """Both views are as bright as one number that was drawn for the row."""

    def transform(self, batch, draws):
        inputs = super().transform(batch, draws)
        return inputs | {"views": inputs["views"] * draws.uniform().view(-1, 1, 1, 1, 1)}


@pytest.mark.long
def test_views_of_one_row_are_at_chance_and_a_shared_draw_is_found():
    given = recipes.load("byol_toy", {"training.workers": 0, "data.image.size": 16, "data.limit": 48})
    control, clean = audit_twins(given, ("image",), steps=20)
    assert (control.arm.artifact, control.verdict) == (UNLIKE, "leaks"), control
    assert clean.verdict == "clean", clean
    leaking = stand_in(given)
    leaking.__class__ = OneBrightness
    train, test = own_halves(given, ("image",), {}, 48)
    found = measure_twins(leaking, TWINS, Twins(train, 16, 1, unlike=False), Twins(test, 16, 2, unlike=False), 20, 0)
    assert found.verdict == "leaks", found
