"""Correspondence: whose sound a row is shown with, from which moment, and that nothing else tells the answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders, tiny_world

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws

FRAMES, SAMPLES = 20, 10  # frames a clip, samples a frame: of 100 samples a second, so 10 frames a second
FORMS = ("fusion", "distance")


def _task(**hyper):
    torch.manual_seed(0)
    return create("correspondence", tiny_encoders(), **{"width": 8} | hyper)


def _clips(rows: int) -> dict[str, torch.Tensor]:
    """Every frame holds its own number, and every sample that of its frame and 100 times that of its row."""
    number = torch.arange(rows, dtype=torch.float32)[:, None] * 100
    audio = number + (torch.arange(FRAMES * SAMPLES) // SAMPLES).float()
    video = torch.arange(FRAMES, dtype=torch.uint8)[None, :, None, None, None].repeat(rows, 1, 3, 12, 12)
    video[:, :, 0] = torch.arange(rows, dtype=torch.uint8)[:, None, None, None]
    return {"video": video, "audio": audio}


@pytest.mark.parametrize("frame", [False, True])
def test_what_is_seen_and_both_sounds_are_of_one_moment(frame):
    task = _task(visual="image" if frame else "video", frame=frame, window=0.4, views={"flip": 0.0})
    rows = 200
    inputs = task.transform(_clips(rows), Draws(0, 0, rows))
    assert inputs["audio"].shape == (rows, 2, 4 * SAMPLES)
    whose, moment = (inputs["audio"] // 100).long(), inputs["audio"] % 100
    assert (whose[:, 0] == torch.arange(rows)[:, None]).all()
    assert (whose[:, 1] == whose[:, 1, :1]).all()
    assert (whose[:, 1, 0] != torch.arange(rows)).all()
    assert torch.equal(moment[:, 0], moment[:, 1])
    seen = inputs["visual"] if frame else inputs["visual"][:, 2]
    assert torch.equal(seen[:, 1, 0, 0].float(), moment[:, 0, 2 * SAMPLES])  # in the middle of what is heard
    if not frame:
        assert torch.equal(inputs["visual"][:, :, 1, 0, 0].float(), moment[:, 0, ::SAMPLES])
    start = np.bincount(moment[:, 0, 0].long().numpy(), minlength=FRAMES - 3)
    assert len(start) == FRAMES - 3
    assert stats.chisquare(start).pvalue > 1e-3


def test_a_flash_and_an_impulse_stay_together():
    rows = 300
    batch = {"video": torch.zeros(rows, FRAMES, 3, 12, 12, dtype=torch.uint8), "audio": torch.zeros(rows, 200)}
    batch["video"][:, 9] = 255
    batch["audio"][:, 9 * SAMPLES + 3] = torch.arange(1, rows + 1) / rows
    inputs = _task(visual="video", window=0.5).transform(batch, Draws(0, 0, rows))
    flash, own, other = inputs["visual"][:, :, 0, 0, 0] > 0, inputs["audio"][:, 0] > 0, inputs["audio"][:, 1] > 0
    seen = flash.any(1)
    assert 30 < int(seen.sum()) < 270
    for sound in (own, other):
        assert torch.equal(sound.any(1), seen)
        assert torch.equal(sound[seen].int().argmax(1), flash[seen].int().argmax(1) * SAMPLES + 3)


def test_all_others_with_another_sound_and_picture_are_as_likely():
    batch = {key: tiny_batch(7)[key] for key in ("image", "audio")}
    batch["audio"][5] = batch["audio"][0]
    batch["image"][6] = batch["image"][0]
    task, counts, steps = _task(), torch.zeros(7, 7), 400
    whose = torch.tensor([0, 1, 2, 3, 4, 0, 6])
    for step in range(steps):
        inputs = task.transform(batch, Draws(0, step, 7))
        assert inputs["valid"].all()
        same = (inputs["audio"][:, 1, None] == batch["audio"][None]).all(2)
        counts[torch.arange(7), whose[same.int().argmax(1)]] += 1
    assert not counts[0, [0, 6]].any()
    assert not counts[5, 0].any()
    assert not counts[6, [0, 6]][1].any()
    likely = np.array([2, 0, 1, 1, 1, 0, 1]) / 6 * steps  # of row 1, whose sound 0 is that of two rows
    found = counts[1].numpy()
    assert (found[likely == 0] == 0).all()
    assert stats.chisquare(found[likely > 0], likely[likely > 0]).pvalue > 1e-3


def test_lengths_do_not_tell_the_answer():
    batch = tiny_batch(40)
    inputs = _task().transform(batch, Draws(0, 0, 40))
    own, other = inputs["audio_mask"].unbind(1)
    assert torch.equal(own, other)
    assert not (inputs["audio"] * ~inputs["audio_mask"]).any()
    assert (own <= batch["audio_mask"]).all()
    shorter = own.sum(1) < batch["audio_mask"].sum(1)
    assert 5 < int(shorter.sum()) < 35


def test_no_label_is_read_and_a_row_alone_counts_for_nothing():
    batch = tiny_batch(4)
    batch["audio"][:] = batch["audio"][0]
    inputs = _task().transform(batch, Draws(0, 0, 4))
    assert not inputs["valid"].any()
    losses = _task()(inputs)
    assert losses["loss"] == losses["valid"] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("double")
def test_loss_is_the_cross_entropy_of_both_answers(form):
    task = _task(form=form)
    inputs = task.transform(tiny_batch(6), Draws(0, 0, 6))
    inputs["valid"][2] = False
    inputs["valid_pairs"] = inputs["valid"].sum()
    outputs = task.predict(inputs)
    logits = outputs["logits"]
    assert logits.shape == (6, 2, 2)
    losses = task.loss(outputs, inputs)
    kept = logits[inputs["valid"]].flatten(0, 1)
    answer = torch.tensor([1, 0]).repeat(5)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(kept, answer))
    torch.testing.assert_close(losses["accuracy"], (kept.argmax(1) == answer).double().mean())
    yes = kept.unflatten(0, (-1, 2)).softmax(2)[..., 1]
    torch.testing.assert_close(losses["ranking"], (yes[:, 0] > yes[:, 1]).double().mean())
    flat = task.loss({"logits": torch.zeros_like(logits)}, inputs)
    assert float(flat["loss"]) == pytest.approx(math.log(2))
    assert flat["accuracy"] == flat["ranking"] == 0.5


@pytest.mark.usefixtures("double")
def test_distance_is_all_that_the_answer_sees():
    task = _task(form="distance")
    inputs = task.transform(tiny_batch(6), Draws(0, 0, 6))
    seen = task.encoder("image")(inputs["visual"]).pooled
    heard = task.encoder("audio")(inputs["audio"][:, 1], inputs["audio_mask"][:, 1]).pooled
    a, b = (F.normalize(net(x)) for net, x in ((task.project_visual, seen), (task.project_audio, heard)))
    distance = torch.cdist(a[:, None], b[:, None])[:, 0]
    torch.testing.assert_close(task.predict(inputs)["logits"][:, 1], task.head(distance))
    assert task.head.weight[1] < task.head.weight[0]


@pytest.mark.parametrize("form", FORMS)
def test_each_sound_is_judged_alone(form):
    task = _task(form=form, visual="video")
    inputs = task.transform(tiny_batch(4), Draws(0, 0, 4))
    logits = task.predict(inputs)["logits"]
    swapped = inputs | {key: inputs[key].flip(1) for key in ("audio", "audio_mask")}
    torch.testing.assert_close(task.predict(swapped)["logits"].flip(1), logits)
    assert len(task.preview(inputs, {"logits": logits})) == 4


@pytest.mark.quick(1)
@pytest.mark.parametrize("form", FORMS)
def test_sounds_of_no_picture_are_told_at_chance_before_and_after_training(form):
    """On noise, whose sounds say nothing of the pictures, what is learned of some rows is worth nothing on others."""
    task = _task(form=form)
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    for step in range(40):
        optimizer.zero_grad()
        task(task.transform(tiny_batch(32, seed=step % 4), Draws(0, step, 32)))["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        unseen = [task(task.transform(tiny_batch(200, seed=9 + k), Draws(1, k, 200))) for k in range(4)]
    wins = round(sum(float(losses["ranking"]) for losses in unseen) * 200)
    assert stats.binomtest(wins, 800).pvalue > 1e-3
    assert sum(float(losses["loss"]) for losses in unseen) / 4 == pytest.approx(math.log(2), abs=0.05)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_sounds_that_say_what_is_seen_are_told_from_others(form):
    task = _task(form=form, width=16)
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    for step in range(300):
        optimizer.zero_grad()
        task(task.transform(tiny_world(32, seed=step), Draws(0, step, 32)))["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        losses = task(task.transform(tiny_world(300, seed=1000), Draws(1, 0, 300)))
    assert losses["ranking"] > 0.75  # another row is of the same topic in one of six
    assert losses["loss"] < 0.6


def test_refuses_what_cannot_work():
    with pytest.raises(RecipeError, match="frame is for an encoder of images"):
        _task(visual="video", frame=True)
    with pytest.raises(RecipeError, match="an image has no time; set frame=true"):
        _task(window=1.0)
    with pytest.raises(RecipeError, match="reads image or video, and the encoder 'text' reads text"):
        _task(visual="text")
    with pytest.raises(RecipeError, match=r"window 3 s is 30 frames, the clips have 20 \(2 s\)"):
        _task(visual="video", window=3.0).transform(_clips(2), Draws(0, 0, 2))
    with pytest.raises(RecipeError, match="whole number of samples for each frame, here are 201 for 20"):
        _task(visual="video").transform(_clips(2) | {"audio": torch.zeros(2, 201)}, Draws(0, 0, 2))
