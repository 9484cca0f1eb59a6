"""A comparison of tasks on sounds: how long a window probes and tasks hear."""

from __future__ import annotations

import pytest

import mmssl
from mmssl.catalog import find_recipe
from mmssl.comparison import tasks
from mmssl.comparison.plan import make_plan
from mmssl.errors import RecipeError
from mmssl.recipe import Data

SOUNDS = Data(source="toy", limit=16)
FEW = {"modality": "audio", "encoder": {"model": "timm/test_resnet", "mels": 32}, "budget": "steps=1", "batch": 4}


@pytest.mark.long
def test_probes_hear_the_window_of_tasks_that_are_left(monkeypatch):
    names = ("simclr_audio_folder", "hubert_folder", "wav2vec2_folder")
    monkeypatch.setattr(tasks, "recipe_files", lambda: [find_recipe(name) for name in names])
    plan = make_plan(SOUNDS, **FEW)
    assert list(plan.tasks) == ["simclr_audio"]
    assert plan.rows.audio.seconds == 2  # the two of waveforms hear 5 s, and are left out
    assert [note.partition(":")[0] for note in plan.notes[:3]] == [
        "hubert is left out",
        "wav2vec2 is left out",
        "probes read 2 s of each row for every line; tasks keep the windows of their recipes",
    ]


@pytest.mark.long
def test_all_hear_what_is_asked_for():
    asked = {"start": "first", "cache_gb": 1.0, "windows": 2, "audio": {"channel": "left"}}
    given = Data.model_validate({**SOUNDS.model_dump(exclude_unset=True), **asked})
    plan = make_plan(given, seconds=1.0, tasks=["simclr", "cpc", "byol"], **FEW)
    for tree in plan.tasks.values():
        assert (tree["data"]["start"], tree["data"]["cache_gb"], tree["data"]["windows"]) == ("first", 1.0, 2)
    assert (plan.rows.windows, plan.rows.audio.channel) == (2, "left")
    assert list(plan.tasks) == ["simclr_audio", "cpc", "byol_audio"]
    assert {tree["data"]["audio"]["seconds"] for tree in plan.tasks.values()} == {plan.rows.audio.seconds} == {1.0}
    assert "probes read 2 windows of 1 s of each row for every line" in plan.notes


def test_no_sound_lasts_less_than_nothing(tmp_path):
    with pytest.raises(RecipeError, match=r"seconds = 0\.0: expected more than 0"):
        mmssl.compare("toy", seconds=0.0, out=tmp_path / "out")


def test_seconds_of_what_nobody_hears_are_refused(tmp_path):
    asked = {"seconds": 2.0, "tasks": ["rotation"], "modality": "image", "out": tmp_path / "out"}
    with pytest.raises(RecipeError, match=r"seconds = 2: no task here hears, they read image; leave it out"):
        mmssl.compare("toy", **asked)
    with pytest.raises(RecipeError, match="runs are compared as they are; leave seconds out"):
        mmssl.compare(runs=["one"], seconds=2.0, out=tmp_path / "out")
