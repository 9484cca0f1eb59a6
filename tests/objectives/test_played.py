"""Which rows count of tasks that play a sound in several ways: those long enough, and not silent."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import tiny_encoders

from mmssl.objectives import create
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws

SAMPLES = 16_000


@pytest.fixture(params=["pitch_shift", "sound_speed"])
def task(request: pytest.FixtureRequest) -> Objective:
    torch.manual_seed(0)
    audio = tiny_encoders()["audio"]
    audio.rate = SAMPLES // 2
    return create(request.param, {"audio": audio})


def test_rows_that_are_too_short_are_left_out(task: Objective) -> None:
    mask = torch.arange(SAMPLES) < torch.tensor([SAMPLES, SAMPLES * 3 // 4, SAMPLES // 4])[:, None]
    inputs = task.transform({"audio": torch.randn(3, SAMPLES) * mask, "audio_mask": mask}, Draws(0, 0, 3))
    assert inputs["scored"].tolist() == [True, True, False]
    losses = task(inputs)
    inputs["audio"][2] = 9.0
    assert torch.equal(task(inputs)["loss"], losses["loss"])
    assert losses["valid"].item() == pytest.approx(2 / 3)


def test_silent_rows_are_left_out(task: Objective) -> None:
    audio = torch.randn(3, SAMPLES) * torch.tensor([1.0, 1e-3, 1e-6])[:, None]
    inputs = task.transform({"audio": audio}, Draws(0, 0, 3))
    assert inputs["scored"].tolist() == [True, True, False]
    assert int(inputs["scored_rows"]) == 2
    nothing = task.transform({"audio": 0 * audio}, Draws(0, 0, 3))
    assert float(task(nothing)["valid"]) == 0
    assert task.preview(nothing, task.predict(nothing))[-1].cells == ["does not count"] * 3
