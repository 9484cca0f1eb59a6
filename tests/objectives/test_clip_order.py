"""Clip order: what is shuffled and how, and that nothing but the pictures tells."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
import torch
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.transformation.clip_order import PairHead
from mmssl.ops.draws import Draws

FRAMES = 20


def task(**hyper):
    torch.manual_seed(0)
    return create("clip_order", tiny_encoders(), **{"frames": 2, "gap": 1, "width": 8, "dropout": 0} | hyper)


def numbered(rows, frames=FRAMES):
    """Every frame holds its number."""
    number = torch.arange(frames, dtype=torch.uint8).view(1, -1, 1, 1, 1)
    return {"video": number.expand(rows, -1, 3, 12, 12).clone()}


def moments(inputs):
    """The numbers of the frames, (B, K, f)."""
    assert (inputs["clips"] == inputs["clips"][..., :1, :1, :1]).all()
    return inputs["clips"][..., 0, 0, 0].long()


@pytest.mark.parametrize("clips", [2, 3, 4])
def test_place_i_holds_the_clip_that_the_order_names(clips):
    built = task(clips=clips)
    inputs = built.transform(numbered(400), Draws(0, 0, 400))
    assert built.orders.tolist() == [list(order) for order in permutations(range(clips))]
    seen = moments(inputs)
    first = seen.flatten(1).amin(1)
    for row in range(400):
        order = built.orders[inputs["order"][row]]
        # In its own order the row is clips of two frames with one between them.
        expected = first[row] + 3 * order[:, None] + torch.arange(2)
        assert torch.equal(seen[row], expected)
    counts = torch.bincount(inputs["order"], minlength=math.factorial(clips))
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.long
def test_the_place_of_the_clips_says_nothing_of_their_order():
    inputs = task().transform(numbered(20_000), Draws(0, 0, 20_000))
    first = inputs["start"].amin(1)
    assert set(first.tolist()) == set(range(FRAMES - 8 + 1))
    table = torch.bincount(first * 6 + inputs["order"]).view(-1, 6)
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-4


def test_a_right_and_a_wrong_answer_have_their_ends_in_common():
    rows = 4000
    inputs = task(form="verification", frames=1).transform(numbered(rows), Draws(0, 0, rows))
    seen = moments(inputs)[..., 0]
    origin = seen.amin(1)
    first, right, wrong, last = ((seen - seen[:, 1:2]) // 2).unbind(1)
    assert torch.equal(right, torch.zeros(rows, dtype=torch.long))
    assert set(zip(first.tolist(), last.tolist(), strict=True)) == {(-1, 1), (1, -1)}  # time runs either way
    assert set(wrong.tolist()) == {-2, 2}
    assert origin.max() > 0
    table = torch.bincount((first > 0).long() * 2 + (wrong > 0).long()).view(2, 2)
    assert stats.chisquare(table.flatten().numpy()).pvalue > 1e-4


def test_frozen_clips_and_swapped_ones_make_equal_inputs():
    """Of a still every order is one input; and that of order p is the input in order of the clips shuffled by p.

    So where clips can be exchanged, as in noise, no network tells the orders apart.
    """
    rows, built = 60, task()
    still = tiny_batch(rows, frames=1)["video"].expand(-1, FRAMES, -1, -1, -1)
    inputs = built.transform({"video": still}, Draws(0, 0, rows))
    assert torch.equal(inputs["clips"], still[:, :6].unflatten(1, (3, 2)))
    assert not inputs["valid"].any()
    noise = tiny_batch(rows, frames=8)["video"]  # no room: every row starts at frame 0
    shuffled = built.transform({"video": noise}, Draws(0, 0, rows))
    moved = noise.clone()
    for row, order in enumerate(built.orders[shuffled["order"]].tolist()):
        for place, clip in enumerate(order):
            moved[row, 3 * place : 3 * place + 2] = noise[row, 3 * clip : 3 * clip + 2]
    in_order = moved.unfold(1, 2, 3).permute(0, 1, 5, 2, 3, 4)
    assert torch.equal(shuffled["clips"], in_order)

    asked = task(form="verification", frames=1, gap=0)
    inputs = asked.transform({"video": still}, Draws(0, 0, rows))
    assert torch.equal(inputs["clips"][:, 1], inputs["clips"][:, 2])
    losses = asked.loss(
        asked.predict(inputs), inputs | {"valid": torch.ones(rows) > 0, "valid_rows": torch.tensor(rows)}
    )
    assert (losses["ranking"], losses["accuracy"]) == (0.5, 0.5)


def test_a_row_that_ends_in_a_still_counts_where_there_is_room_before_it():
    batch = numbered(6)
    batch["video"][0, 7:] = 7  # 8 frames: just enough
    batch["video"][1, 6:] = 6
    built = task()
    inputs = built.transform(batch, Draws(0, 0, 6))
    assert inputs["valid"].tolist() == [True, False, True, True, True, True]
    assert inputs["valid_rows"] == 5
    assert sorted(moments(inputs)[0].flatten().tolist()) == [0, 1, 3, 4, 6, 7]
    outputs = built.predict(inputs)
    wrong = outputs["logits"].clone()
    wrong[1] += 50 * torch.arange(6)
    assert built.loss({"logits": wrong}, inputs) == built.loss(outputs, inputs)
    expected = torch.nn.functional.cross_entropy(outputs["logits"][inputs["valid"]], inputs["order"][inputs["valid"]])
    torch.testing.assert_close(built.loss(outputs, inputs)["loss"], expected)


@pytest.mark.parametrize("form", ["order", "verification"])
def test_clips_are_cropped_each_on_its_own_and_their_frames_alike(form):
    still = tiny_batch(30, frames=1)["video"].expand(-1, FRAMES, -1, -1, -1)
    for views in ({"size": 6}, {"area": [0.2, 0.8]}, {"flip": 0.5}):
        clips = task(form=form, views=views).transform({"video": still}, Draws(0, 0, 30))["clips"]
        assert torch.equal(clips, clips[:, :, :1].expand_as(clips))
        assert not torch.equal(clips, clips[:, :1].expand_as(clips))


def test_the_head_sees_each_pair_through_one_layer():
    torch.manual_seed(0)
    head, clips = PairHead(5, 4, 7, 24, 0.0).double(), torch.rand(3, 4, 5, dtype=torch.float64)
    pairs = [head.pair(torch.cat([clips[:, i], clips[:, j]], 1)).relu() for i, j in combinations(range(4), 2)]
    torch.testing.assert_close(head(clips), head.answer(torch.cat(pairs, 1)))


@pytest.mark.parametrize("form", ["order", "verification"])
def test_chance_is_the_loss_of_equal_logits(form):
    built = task(form=form)
    inputs = built.transform(tiny_batch(8, frames=FRAMES), Draws(0, 0, 8))
    outputs = {key: torch.zeros_like(value) for key, value in built.predict(inputs).items()}
    losses, chance = built.loss(outputs, inputs), built.chance(8)
    assert math.isclose(losses["loss"], chance.loss, rel_tol=1e-6)
    assert math.isclose(chance.loss, math.log({"order": 6, "verification": 2}[form]))
    if form == "verification":
        sure = built.loss({"logits": torch.tensor([[3.0, -3.0]]).expand(8, 2)}, inputs)
        assert (sure["accuracy"], sure["ranking"], losses["ranking"]) == (1, 1, 0.5)
    else:
        sure = built.loss({"logits": 50 * torch.eye(6)[inputs["order"]]}, inputs)
        assert sure["accuracy"] == 1


@pytest.mark.parametrize(
    ("hyper", "says"),
    [
        ({"clips": 1}, "clips = 1 should be from 2 to 5"),
        ({"clips": 6}, "clips = 6 should be from 2 to 5"),
        ({"form": "verification", "clips": 4}, "verification shows 3 clips, not 4"),
        ({"encoder": "image"}, "clip_order reads video, and the encoder 'image' reads image"),
    ],
)
def test_refuses_what_cannot_work(hyper, says):
    with pytest.raises(RecipeError, match=says):
        task(**hyper)


def test_says_how_many_frames_it_needs():
    with pytest.raises(RecipeError, match="3 clips of 16 frames with 8 between them are 64 frames, and a row has 20"):
        task(frames=16, gap=8).transform(numbered(2), Draws(0, 0, 2))


@pytest.mark.quick(1)
@pytest.mark.parametrize(("form", "steps"), [("order", 60), ("verification", 140)])
def test_it_is_learned_where_time_shows(form, steps):
    built = task(form=form, width=64)
    optimizer = torch.optim.Adam(built.parameters(), 0.02)
    ramp = torch.linspace(0, 0.8, FRAMES).view(1, -1, 1, 1, 1)  # everything grows brighter
    for step in range(steps):
        batch = {"video": torch.rand(16, 1, 3, 12, 12) * 0.2 + ramp}
        losses = built(built.transform(batch, Draws(0, step, 16)))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["accuracy"] > 0.8
