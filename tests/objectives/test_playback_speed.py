"""Playback speed: which frames are taken, and that neither their place nor a cut says how fast."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.augment import color_jitter
from mmssl.ops.draws import Draws

FRAMES = 20
PLAIN = {"jitter": 0, "views": {"flip": None}}


def task(**hyper):
    torch.manual_seed(0)
    return create("playback_speed", tiny_encoders(), **{"frames": 4, **PLAIN} | hyper)


def numbered(rows, frames=FRAMES):
    """Every frame holds its number."""
    number = torch.arange(frames, dtype=torch.uint8).view(1, -1, 1, 1, 1)
    return {"video": number.expand(rows, -1, 3, 2, 2).clone()}


def moments(inputs):
    return inputs["video"][..., 0, 0, 0].long()


def test_a_clip_is_every_pth_frame_from_its_start_on_and_never_goes_round():
    inputs = task().transform(numbered(500), Draws(0, 0, 500))
    seen = moments(inputs)
    assert torch.equal(seen[:, 0], inputs["start"])
    assert torch.equal(seen.diff(dim=1), (inputs["pace"] + 1)[:, None].expand(-1, 3))
    assert seen.max() == FRAMES - 1
    assert set(inputs["pace"].tolist()) == {0, 1, 2, 3}


def test_where_a_clip_begins_says_nothing_of_its_pace():
    rows = 30_000
    inputs = task(equal_span=False).transform(numbered(rows), Draws(0, 0, rows))
    places = FRAMES - 13 + 1  # all where the quickest has room
    assert set(inputs["start"].tolist()) == set(range(places))
    table = torch.bincount(inputs["start"] * 4 + inputs["pace"], minlength=places * 4).view(places, 4)
    assert stats.chisquare(table.flatten().numpy()).pvalue > 1e-4


@pytest.mark.parametrize("frames", [13, FRAMES])
def test_all_paces_see_the_same_span(frames):
    """Early and late moments alike, where without an equal span the slow ones never see the late ones."""
    rows = 8_000
    table, apart = {}, {}
    for equal in (True, False):
        inputs = task(equal_span=equal).transform(numbered(rows, frames), Draws(0, 0, rows))
        seen, pace = moments(inputs), inputs["pace"]
        assert torch.equal(seen.diff(dim=1), (pace + 1)[:, None].expand(-1, 3))
        assert inputs["valid"].all()
        table[equal] = torch.stack([seen[pace == k].flatten().bincount(minlength=frames) for k in range(4)])
        center = seen.double().mean(1)
        apart[equal] = [abs(center[pace == k].mean() - (frames - 1) / 2) for k in range(4)]
    early_and_late = table[True][:, [0, -1]]
    assert (early_and_late > 0).all()
    assert (table[False][0, -3:] == 0).all()
    assert max(apart[True]) < 0.25 < max(apart[False])


def test_frozen_clips_are_equal_at_all_paces_and_no_frame_is_shown_twice():
    """Of a still all paces make one input; of noise each shows other frames, which are alike in distribution."""
    rows, built = 40, task(views={"area": [0.3, 0.9], "flip": 0.5})
    still = tiny_batch(rows, frames=1)["video"].expand(-1, FRAMES, -1, -1, -1)
    inputs = built.transform({"video": still}, Draws(0, 0, rows))
    assert torch.equal(inputs["video"], inputs["video"][:, :1].expand_as(inputs["video"]))
    assert not inputs["valid"].any()
    slow = [task(paces=paces).transform({"video": still}, Draws(0, 0, rows))["video"] for paces in (2, 4)]
    assert torch.equal(*slow)
    # Frames moved to the places that another pace reads: the same input under another label.
    built, noise = task(equal_span=False), tiny_batch(rows, frames=13)["video"]
    inputs = built.transform({"video": noise}, Draws(0, 0, rows))
    moved = noise.clone()
    for row, pace in enumerate(inputs["pace"].tolist()):
        read = [k * (pace + 1) for k in range(4)]
        rest = [k for k in range(13) if k not in read]
        moved[row] = noise[row, read + rest]
    assert torch.equal(moved[:, :4], inputs["video"])


def test_a_row_that_ends_in_a_still_counts_where_there_is_room_before_it():
    batch = numbered(6)
    batch["video"][0, 12:] = 12  # 13 frames: just enough
    batch["video"][1, 11:] = 11
    built = task()
    inputs = built.transform(batch, Draws(0, 0, 6))
    assert inputs["valid"].tolist() == [True, False, True, True, True, True]
    assert inputs["valid_rows"] == 5
    assert moments(inputs)[0].max() <= 12
    logits = torch.randn(6, 4)
    wrong = logits.clone()
    wrong[1] += 50 * torch.arange(4)
    assert built.loss({"logits": wrong}, inputs) == built.loss({"logits": logits}, inputs)
    counted = torch.nn.functional.cross_entropy(logits[inputs["valid"]], inputs["pace"][inputs["valid"]])
    torch.testing.assert_close(built.loss({"logits": logits}, inputs)["loss"], counted)


def test_a_clip_has_one_crop_and_each_frame_its_own_colors():
    rows = 200
    still = tiny_batch(rows, frames=1)["video"].expand(-1, FRAMES, -1, -1, -1)
    for views in ({"size": 6}, {"area": [0.2, 0.8]}, {"flip": 0.5}):
        clip = task(views=views).transform({"video": still}, Draws(0, 0, rows))["video"]
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
    clip = task(jitter=0.8).transform({"video": still}, Draws(0, 0, rows))["video"]
    plain = (clip == still[:, :4] / 255).flatten(2).all(2)
    assert stats.binomtest(int(plain.sum()), rows * 4, 0.2).pvalue > 1e-4
    assert (plain.any(1) & ~plain.all(1)).any()
    assert ((clip[:, 0] == clip[:, 1]).flatten(1).all(1) == (plain[:, 0] & plain[:, 1])).all()
    # As an image's: brightness alone, by numbers that are known.
    draws = Draws(0, 0, rows)
    draws.uniform(), draws.integers(4), draws.uniform()
    factors, order = draws.uniform(4, 4), draws.uniform(4, 4).argsort(-1)
    low, width = torch.tensor([0.2, 0.2, 0.2, -0.2]), torch.tensor([1.6, 1.6, 1.6, 0.4])
    expected = color_jitter((still[:, 2] / 255).contiguous(), factors[:, 2] * width + low, order[:, 2])
    torch.testing.assert_close(clip[:, 2][~plain[:, 2]], expected[~plain[:, 2]])


def test_chance_is_the_loss_of_equal_logits():
    built = task(paces=3)
    inputs = built.transform(tiny_batch(9, frames=FRAMES), Draws(0, 0, 9))
    losses, chance = built.loss({"logits": torch.zeros(9, 3)}, inputs), built.chance(9)
    assert math.isclose(losses["loss"], chance.loss, rel_tol=1e-6)
    assert chance.levels == {"loss": math.log(3), "accuracy": 1 / 3}
    assert built.loss({"logits": 50 * torch.eye(3)[inputs["pace"]]}, inputs)["accuracy"] == 1


def test_refuses_what_cannot_work():
    with pytest.raises(RecipeError, match="playback_speed: 1 paces of 4 frames say nothing of speed"):
        task(paces=1)
    with pytest.raises(RecipeError, match="reads video, and the encoder 'audio' reads audio"):
        task(encoder="audio")
    with pytest.raises(RecipeError, match="16 frames, 4 apart, need 61 of a row, and it has 20"):
        task(frames=16).transform(numbered(2), Draws(0, 0, 2))
