"""Temporal alignment, form match: which windows are paired, and that sound and picture keep one clock."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws

FRAMES, RATE, SAMPLES = 20, 100, 10  # frames a clip, samples a second, samples a frame: 10 frames a second


def _task(**hyper):
    torch.manual_seed(0)
    return create("temporal_alignment", tiny_encoders(), **{"window": 0.5, "min_shift": 0.6, "width": 8} | hyper)


def _clips(rows: int) -> dict[str, torch.Tensor]:
    """Every frame and every sample holds the number of its frame."""
    video = torch.arange(FRAMES, dtype=torch.uint8)[None, :, None, None, None].expand(rows, -1, 3, 12, 12)
    audio = (torch.arange(FRAMES * SAMPLES) // SAMPLES).float().expand(rows, -1)
    return {"video": video, "audio": audio}


def test_right_sound_is_of_the_same_moment_and_the_wrong_one_far_enough():
    inputs = _task().transform(_clips(500), Draws(0, 0, 500))
    moments = inputs["video"][:, :, 0, 0, 0].float()
    assert moments.shape == (500, 5)
    assert inputs["audio"].shape == (500, 2, 50)
    sounds = inputs["audio"].unflatten(2, (5, SAMPLES))
    assert torch.equal(sounds[:, 0], moments[..., None].expand(-1, -1, SAMPLES))
    shift = (sounds[:, 1] - sounds[:, 0]).unique(dim=0)
    assert (sounds[:, 1, 0, 0] - sounds[:, 0, 0, 0]).abs().min() == 6
    assert all((s == s.flatten()[0]).all() for s in shift)  # unbroken: one shift throughout the window


def test_flash_and_impulse_stay_together():
    batch = {
        "video": torch.zeros(300, FRAMES, 3, 12, 12, dtype=torch.uint8),
        "audio": torch.zeros(300, FRAMES * SAMPLES),
    }
    batch["video"][:, 9] = 255
    batch["audio"][:, 9 * SAMPLES + 3] = 1
    inputs = _task().transform(batch, Draws(0, 0, 300))
    flash, sound = inputs["video"][:, :, 0, 0, 0] > 0, inputs["audio"][:, 0] > 0
    assert torch.equal(flash.any(1), sound.any(1))
    seen = flash.any(1)
    assert 30 < int(seen.sum()) < 270
    assert torch.equal(sound[seen].int().argmax(1), flash[seen].int().argmax(1) * SAMPLES + 3)


def test_pairs_are_uniform_over_a_symmetric_list():
    n = 30_000
    start = _task().transform(
        {"video": torch.zeros(n, FRAMES, 1, 1, 1), "audio": torch.zeros(n, FRAMES * SAMPLES)}, Draws(0, 0, n)
    )["start"]
    places = FRAMES - 5 + 1
    code = start[:, 0] * places + start[:, 1]
    allowed = [i * places + j for i in range(places) for j in range(places) if abs(i - j) >= 6]
    counts = torch.bincount(code, minlength=places**2)
    assert counts.sum() == counts[allowed].sum()
    assert stats.chisquare(counts[allowed].numpy()).pvalue > 1e-4
    # So where a sound starts says nothing of whether it is the right one.
    both = torch.stack([torch.bincount(start[:, k], minlength=places) for k in (0, 1)])
    both = both[:, both.sum(0) > 0]
    assert stats.chi2_contingency(both.numpy()).pvalue > 1e-4


def test_owens_and_efros_pairs():
    # 302 frames at 29.97 / s, windows of 125 frames: shifts of 65 to 177 frames between 178 starts.
    task = _task(window=4.2, min_shift=2.17)
    task.rate = 29.97
    samples, window, shift = task._frames(302, 302)
    assert (samples, window) == (1, 126)  # 4.2 s are 125.9 frames; the published code cuts to 125
    assert shift == math.ceil(2.17 * 29.97) == 66


def test_masks_and_mirrors_follow():
    batch = tiny_batch(200, frames=20)
    inputs = _task().transform(batch, Draws(0, 0, 200))
    row = 7
    for k in (0, 1):
        begin = int(inputs["start"][row, k]) * SAMPLES
        assert torch.equal(inputs["audio"][row, k], batch["audio"][row, begin : begin + 50])
        assert torch.equal(inputs["audio_mask"][row, k], batch["audio_mask"][row, begin : begin + 50])
    begin = inputs["start"][:, 0]
    windows = torch.stack([video[i : i + 5] for video, i in zip(batch["video"], begin, strict=True)])
    same = (inputs["video"] == windows).flatten(1).all(1)
    mirrored = (inputs["video"] == windows.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 60 < int(mirrored.sum()) < 140
    assert _task(views={"size": 8}).transform(batch, Draws(0, 0, 200))["video"].shape == (200, 5, 3, 8, 8)


def test_loss_accuracy_and_ranking():
    task = _task()
    logits = torch.tensor([[2.0, 1.0], [-1.0, -2.0], [0.5, 0.5], [-1.0, 1.0]])
    losses = task.loss({"logits": logits}, {"valid": torch.ones(4, dtype=torch.bool), "valid_rows": torch.tensor(4)})
    assert losses["ranking"] == 2.5 / 4
    assert losses["accuracy"] == 3 / 8
    some = {"valid": torch.tensor([True, False, True]), "valid_rows": torch.tensor(2)}
    flat = task.loss({"logits": torch.zeros(3, 2)}, some)
    chance = task.chance(3)
    assert math.isclose(flat["loss"], chance.loss, rel_tol=1e-6)
    assert flat["ranking"] == chance.metrics["ranking"]
    assert flat["accuracy"] == chance.metrics["accuracy"]


def test_each_sound_is_judged_alone():
    task = _task()
    inputs = task.transform(tiny_batch(4, frames=20), Draws(0, 0, 4))
    logits = task.predict(inputs)["logits"]
    swapped = inputs | {key: inputs[key].flip(1) for key in ("audio", "audio_mask")}
    torch.testing.assert_close(task.predict(swapped)["logits"].flip(1), logits)
    assert len(task.preview(inputs, {"logits": logits})) == 4


def test_refuses_clips_that_do_not_fit():
    with pytest.raises(RecipeError, match="whole number of samples for each frame, here are 201 for 20"):
        _task().transform(_clips(2) | {"audio": torch.zeros(2, 201)}, Draws(0, 0, 2))
    with pytest.raises(RecipeError, match=r"are 21 frames, the clips have 20 \(2 s\)"):
        _task(window=1.5).transform(_clips(2), Draws(0, 0, 2))
    with pytest.raises(RecipeError, match="video = 'image' is an encoder that reads image"):
        _task(video="image")
    with pytest.raises(RecipeError, match=r"should be float \| None above 0"):
        _task(window=0)
