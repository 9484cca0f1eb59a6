"""Temporal alignment, forms shift and contrast, and moments that cannot be told apart."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws

FRAMES, RATE, SAMPLES, WINDOW = 30, 100, 10, 5  # frames a clip, samples a second and a frame, frames a window
SHIFT = {"form": "shift", "window": 0.5, "offsets": 3, "step": 0.25, "jitter": 0.1}
CONTRAST = {"form": "contrast", "window": 0.5, "min_shift": 0.4, "moments": 4}


def _task(**hyper):
    torch.manual_seed(0)
    return create("temporal_alignment", tiny_encoders(), **{"width": 8, "views": {"flip": 0.0}} | hyper)


def _clips(rows: int) -> dict[str, torch.Tensor]:
    """Every frame holds its number, every sample its own."""
    video = torch.arange(FRAMES, dtype=torch.uint8)[None, :, None, None, None].expand(rows, -1, 3, 12, 12)
    return {"video": video, "audio": torch.arange(FRAMES * SAMPLES).float().expand(rows, -1)}


def _audible(audio: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"video": torch.zeros(len(audio), FRAMES, 3, 2, 2, dtype=torch.uint8), "audio": audio}


def test_offsets_are_those_of_the_class_and_a_sound_that_is_early_is_of_later():
    inputs = _task(**SHIFT).transform(_clips(2000), Draws(0, 0, 2000))
    early = inputs["audio"][:, 0] - SAMPLES * inputs["video"][:, 0, 0, 0, 0].float()
    middle = 25 * (inputs["offset"] - 3)
    assert (early - middle).abs().max() == 10  # the jitter
    assert torch.equal((early / 25).round().long() + 3, inputs["offset"])  # the class is that of what was cut
    assert stats.chisquare(torch.bincount(inputs["offset"]).numpy()).pvalue > 1e-4
    assert stats.chisquare(torch.bincount((early - middle).long() + 10).numpy()).pvalue > 1e-4
    assert (inputs["audio"].diff(dim=1) == 1).all()


def test_starts_are_even_over_all_that_an_offset_leaves_and_tell_no_more_than_they_must():
    n = 40_000
    inputs = _task(**SHIFT | {"step": 0.2, "jitter": 0.0}).transform(_clips(n), Draws(0, 0, n))
    seen, offset, places = inputs["start"][:, 0], inputs["offset"], FRAMES - WINDOW + 1
    heard = seen + 2 * (offset - 3)
    for k in range(7):
        early = 2 * (k - 3)
        possible = [i for i in range(places) if 0 <= i + early < places]
        counts = torch.bincount(seen[offset == k], minlength=places)
        assert counts.sum() == counts[possible].sum()
        assert stats.chisquare(counts[possible].numpy()).pvalue > 1e-4
        # The sound bears as much of the offset as the picture: its places are those of the picture at the other sign.
        mirrored = torch.bincount(heard[offset == 6 - k], minlength=places)
        assert mirrored[possible].sum() == mirrored.sum()
    # Who knows one place alone.
    for place in (seen, heard):
        best = torch.bincount(place * 7 + offset, minlength=7 * places).view(places, 7).amax(1).sum() / n
        assert best < 1.05 * places / (places - 6) / 7


@pytest.mark.parametrize(
    "hyper", [{"window": 0.5, "min_shift": 0.6}, SHIFT, CONTRAST], ids=["match", "shift", "contrast"]
)
def test_frozen_frames_and_steady_sounds_leave_no_trace(hyper):
    task = _task(**hyper).eval()
    batch = tiny_batch(64, frames=FRAMES)
    frozen = batch | {"video": batch["video"][:1, :1].expand(64, FRAMES, -1, -1, -1)}
    one, other = (task.transform(frozen, Draws(seed, 0, 64))["video"] for seed in (0, 1))
    assert torch.equal(one, other)
    silent = frozen | {"audio": torch.zeros(64, FRAMES * SAMPLES), "audio_mask": torch.ones(64, FRAMES * SAMPLES) > 0}
    inputs = task.transform(silent, Draws(0, 0, 64))
    with torch.no_grad():
        outputs = task.predict(inputs)
        scores = task.loss(outputs, inputs)
    assert all(torch.allclose(row, value[0], atol=1e-5) for value in outputs.values() for row in value)
    level = task.chance(64)
    if hyper is SHIFT:  # one answer for all rows
        answer = int(outputs["logits"][0].argmax())
        assert scores["accuracy"] == (inputs["offset"] == answer).float().mean()
    else:  # all answers are alike
        assert abs(scores["accuracy"] - level.metrics["accuracy"]) < 1e-6
        assert scores["loss"] >= level.loss - 1e-6


@pytest.mark.usefixtures("double")
def test_shift_is_a_cross_entropy_and_its_distances_are_in_steps():
    task = _task(**SHIFT | {"ambiguity": 0.5})
    logits, offset = torch.randn(6, 7), torch.tensor([0, 6, 3, 2, 1, 5])
    valid = torch.tensor([True, True, False, True, True, True])
    losses = task.loss({"logits": logits}, {"offset": offset, "valid": valid, "valid_rows": valid.sum()})
    error = (logits.argmax(1) - offset).abs()[valid]
    torch.testing.assert_close(losses["loss"], F.cross_entropy(logits[valid], offset[valid]))
    assert losses["accuracy"] == (error == 0).double().mean()
    assert losses["accuracy_within_one"] == (error <= 1).double().mean()
    assert losses["error_in_steps"] == error.double().mean()
    assert losses["valid"] == 5 / 6
    # The middle class, which is the best that one who sees nothing can say.
    every = {"offset": torch.arange(7), "valid": torch.ones(7, dtype=torch.bool), "valid_rows": torch.tensor(7)}
    middle = task.loss({"logits": F.one_hot(torch.full((7,), 3), 7) * 1e-9}, every)
    for key, level in task.chance(7).levels.items():
        assert math.isclose(middle[key], level, rel_tol=1e-8)


def test_contrast_compares_moments_of_one_clip_at_one_time():
    inputs = _task(**CONTRAST).transform(_clips(3000), Draws(0, 0, 3000))
    frames, samples = inputs["video"][..., 0, 0, 0].float(), inputs["audio"].unflatten(2, (WINDOW, SAMPLES))
    assert torch.equal((samples / SAMPLES).floor(), frames[..., None].expand_as(samples))
    assert inputs["start"].diff(dim=1).min() == 4
    assert {0, FRAMES - WINDOW} <= set(inputs["start"].flatten().tolist())


@pytest.mark.usefixtures("double")
def test_contrast_is_info_nce_over_the_moments_of_each_row_alone():
    task = _task(**CONTRAST)
    sides = {key: F.normalize(torch.randn(3, 4, 8), dim=2) for key in ("video", "audio")}
    valid = torch.tensor([True, False, True])
    losses = task.loss(sides, {"valid": valid, "valid_rows": valid.sum()})
    expected, right = [], torch.arange(4)
    for row in (0, 2):
        logits = sides["video"][row] @ sides["audio"][row].T / 0.07
        expected.append((F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2)
    torch.testing.assert_close(losses["loss"], torch.stack(expected).mean())
    embedded = task.predict(task.transform(tiny_batch(2, frames=FRAMES), Draws(0, 0, 2)))
    assert embedded["video"].shape == embedded["audio"].shape == (2, 4, 8)
    torch.testing.assert_close(embedded["video"].norm(dim=2), torch.ones(2, 4))


def test_of_shift_a_match_is_the_odds_of_no_offset():
    task = _task(**SHIFT)
    inputs = task.transform(tiny_batch(4, frames=FRAMES), Draws(0, 0, 4))
    sides = task.encoder("video")(inputs["video"]), task.encoder("audio")(inputs["audio"], inputs["audio_mask"])
    odds = task.pairs[0].match(*sides).sigmoid()
    torch.testing.assert_close(odds, task.predict(inputs)["logits"].softmax(1)[:, 3])


def _clicks(period: int, rows: int) -> torch.Tensor:
    audio = torch.zeros(rows, FRAMES, SAMPLES)
    audio[:, ::period, 3] = 1
    return audio.flatten(1)


def test_a_metronomes_next_beat_is_no_wrong_answer():
    batch = _audible(_clicks(3, 2000))
    start = _task(window=0.9, min_shift=0.2, ambiguity=0.9).transform(batch, Draws(0, 0, 2000))["start"]
    apart = (start[:, 1] - start[:, 0]).abs()
    assert (apart % 3 != 0).all()
    assert set(apart.tolist()) == {k for k in range(2, 22) if k % 3}
    plain = _task(window=0.9, min_shift=0.2).transform(batch, Draws(0, 0, 2000))["start"]
    assert (((plain[:, 1] - plain[:, 0]) % 3) == 0).any()
    # Where every wrong moment is a beat away nothing is left, and of silence neither.
    frames = _audible(_clicks(1, 4))
    for audio in (frames, _audible(torch.zeros(4, FRAMES * SAMPLES))):
        assert not _task(window=0.9, min_shift=0.2, ambiguity=0.9).transform(audio, Draws(0, 0, 4))["valid"].any()


def test_clicks_at_random_restrict_nothing():
    loud = torch.rand(1, FRAMES, 1, generator=torch.Generator().manual_seed(2)) ** 4
    batch = _audible((loud.expand(2000, -1, SAMPLES) * torch.tensor([1.0, -1.0]).repeat(5)).flatten(1))
    hyper = {"window": 0.9, "min_shift": 0.3}
    some, every = (_task(**hyper, ambiguity=a).transform(batch, Draws(0, 0, 2000)) for a in (0.95, None))
    assert torch.equal(some["start"], every["start"])
    assert some["valid"].all()
    for form in (SHIFT | {"window": 0.9}, CONTRAST | {"window": 0.9}):
        assert _task(**form, ambiguity=0.95).transform(batch, Draws(0, 0, 2000))["valid"].all()


def test_rows_count_for_nothing_where_an_answer_sounds_like_the_right_one():
    draws = Draws(0, 0, 500)
    third = SHIFT | {"window": 0.9, "step": 0.3, "jitter": 0.0, "ambiguity": 0.9}  # a step is a beat
    assert not _task(**third).transform(_audible(_clicks(3, 500)), draws)["valid"].any()
    assert _task(**third | {"step": 0.1}).transform(_audible(_clicks(7, 500)), draws)["valid"].all()
    inputs = _task(**CONTRAST | {"window": 0.9, "moments": 2}, ambiguity=0.9).transform(
        _audible(_clicks(3, 500)), draws
    )
    assert torch.equal(inputs["valid"], inputs["start"].diff(dim=1)[:, 0] % 3 != 0)
    assert inputs["valid_rows"] == inputs["valid"].sum()


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        (SHIFT | {"jitter": 0.2}, "jitter = 0.2 s leads out of a class; take at most half of step = 0.25"),
        (SHIFT | {"width": 12}, "width = 12 of form shift should be a multiple of 8"),
        (SHIFT | {"min_shift": 1.0}, "min_shift is of match and contrast"),
        (CONTRAST | {"moments": 1}, "moments = 1 leaves nothing to compare"),
        (SHIFT | {"window": 2.5}, r"the largest offset 0.85 s are 34 frames, the clips have 30 \(3 s\)"),
        (CONTRAST | {"moments": 8}, "7 times min_shift 0.4 s are 33 frames"),
    ],
)
def test_refuses_what_cannot_be(hyper, message):
    with pytest.raises(RecipeError, match=message):
        _task(**hyper).transform(_clips(2), Draws(0, 0, 2))
