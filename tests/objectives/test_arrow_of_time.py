"""Arrow of time: a clip and its exact reverse, and nothing known of either where nothing moves."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tiny_encoders import TinyVideo, tiny_batch, tiny_encoders

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws

FRAMES = 12


def task(**hyper):
    torch.manual_seed(0)
    return create("arrow_of_time", tiny_encoders(), **{"frames": 4, "views": {"flip": None}} | hyper)


@pytest.mark.parametrize("views", [{"flip": None}, {}, {"size": 6}, {"area": [0.2, 0.8]}])
def test_both_directions_are_one_clip_under_one_crop(views):
    rows = 20
    batch = tiny_batch(rows, frames=FRAMES)
    inputs = task(views=views).transform(batch, Draws(0, 0, rows))
    assert inputs["clips"].shape[:4] == (rows, 2, 4, 3)
    assert torch.equal(inputs["clips"][:, 1], inputs["clips"][:, 0].flip(1))
    assert not torch.equal(inputs["clips"][:, 1], inputs["clips"][:, 0])
    if views == {"flip": None}:
        for row, start in enumerate(inputs["start"].tolist()):
            assert torch.equal(inputs["clips"][row, 0], batch["video"][row, start : start + 4])


def test_frozen_clips_score_exactly_chance():
    rows = 10
    still = tiny_batch(rows, frames=1)["video"].expand(-1, FRAMES, -1, -1, -1)
    built = task(views={"area": [0.2, 0.8], "flip": 0.5})
    inputs = built.transform({"video": still}, Draws(0, 0, rows))
    assert torch.equal(inputs["clips"][:, 0], inputs["clips"][:, 1])
    assert not inputs["valid"].any()
    assert built.loss(built.predict(inputs), inputs)["loss"] == 0  # nothing to learn from
    counting = {"valid": torch.ones(rows, dtype=torch.bool), "valid_rows": torch.tensor(rows)}
    losses = built.loss(built.predict(inputs), inputs | counting)
    assert (losses["accuracy"], losses["ranking"]) == (0.5, 0.5)
    assert losses["loss"] >= math.log(2)  # as no answer to two equal questions does better


def test_noise_reversed_is_noise():
    """The input of a clip is that of the reversed clip with both directions swapped: no network tells noise apart."""
    rows, built = 10, task()
    noise = tiny_batch(rows, frames=4)["video"]
    forward, backward = (
        built.transform({"video": clip}, Draws(0, 0, rows))["clips"] for clip in (noise, noise.flip(1))
    )
    assert torch.equal(forward, backward.flip(1))


def test_the_still_at_the_end_is_never_seen():
    batch = tiny_batch(600, frames=FRAMES)
    batch["video"][::2, 7:] = batch["video"][::2, 7:8]
    batch["video"][1, 2:] = batch["video"][1, 2:3]
    inputs = task().transform(batch, Draws(0, 0, 600))
    assert inputs["valid"].tolist() == [True, False, *[True] * 598]
    assert set(inputs["start"][::2].tolist()) == set(range(5))
    counts = torch.bincount(inputs["start"][3::2])
    assert len(counts) == FRAMES - 4 + 1
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_it_can_be_learned_by_a_network_that_sees_order():
    torch.manual_seed(0)
    built = create("arrow_of_time", {"video": TinyVideo()}, frames=6, views={"flip": None})
    optimizer = torch.optim.Adam(built.parameters(), 0.02)
    ramp = torch.linspace(0, 0.8, FRAMES).view(1, -1, 1, 1, 1)  # everything grows brighter
    for step in range(80):
        batch = {"video": (torch.rand(16, 1, 3, 12, 12) * 0.2 + ramp)}
        losses = built(built.transform(batch, Draws(0, step, 16)))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["ranking"] == 1


def test_a_network_of_pictures_sees_the_order_in_what_changes():
    create("arrow_of_time", {"video": create_encoder("timm/test_resnet", "video", difference=True)})
    video = torch.rand(2, 4, 3, 32, 32)
    for difference in (False, True):
        encoder = create_encoder("timm/test_resnet", "video", difference=difference).eval()
        told = not torch.allclose(encoder(video).pooled, encoder(video.flip(1)).pooled, atol=1e-5)
        assert told == encoder.sees_order == difference


def test_chance_is_the_loss_of_equal_logits():
    built = task()
    inputs = built.transform(tiny_batch(4, frames=FRAMES), Draws(0, 0, 4))
    losses, chance = built.loss({"logits": torch.zeros(4, 2)}, inputs), built.chance(4)
    assert math.isclose(losses["loss"], chance.loss, rel_tol=1e-6)
    assert (losses["accuracy"], losses["ranking"]) == (0.5, 0.5)
    some = built.loss({"logits": torch.tensor([[2.0, 1.0], [-1.0, -2.0], [0.5, 0.5], [-1.0, 1.0]])}, inputs)
    assert (some["ranking"], some["accuracy"]) == (2.5 / 4, 3 / 8)


def test_refuses_what_cannot_work():
    with pytest.raises(RecipeError, match="timm/test_resnet sees each frame alone, so that a clip and its reverse are"):
        create("arrow_of_time", {"video": create_encoder("timm/test_resnet", "video")})
    with pytest.raises(RecipeError, match="frames = 1 have no direction"):
        task(frames=1)
    with pytest.raises(RecipeError, match="reads video, and the encoder 'image' reads image"):
        task(encoder="image")
    with pytest.raises(RecipeError, match="frames = 16, and a row has 12"):
        task(frames=16).transform(tiny_batch(2, frames=FRAMES), Draws(0, 0, 2))
