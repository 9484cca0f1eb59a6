"""The audit of a recipe on files of a user's kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmssl import recipe as recipes
from mmssl.audit.arms import DROPOUT
from mmssl.audit.own_files import audit_recipe, kinds_of
from mmssl.cli import app
from mmssl.recipe import Data


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    for i in range(12):
        picture = Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8))
        if i < 6:
            picture.save(tmp_path / f"{i}.jpg", subsampling="4:2:2")
        elif i < 9:
            picture.save(tmp_path / f"{i}.png")
        elif i < 11:
            picture.convert("RGBA").save(tmp_path / f"{i}.png")
        else:
            picture.convert("P").save(tmp_path / f"{i}.png")
    return tmp_path


def test_kinds_of_files_are_counted(photos):
    kinds = kinds_of(Data(source=str(photos)))
    assert kinds == {"jpeg 4:2:2": 6, "png": 3, "alpha": 2, "palette": 1}
    assert next(iter(kinds)) == "jpeg 4:2:2"


@pytest.mark.long
def test_with_next_to_no_training_it_says_that_it_could_not_see(photos):
    result = CliRunner().invoke(app, ["audit", "rotation_toy", "--data", str(photos), "--steps", "1", "--rows", "64"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[1].split(maxsplit=1) == ["files", "jpeg 4:2:2 6, png 3, alpha 2, palette 1"]
    assert sum("no power" in line for line in lines) == 7
    assert lines[-1].startswith("rotation: nothing was found, and the control was not either")


@pytest.mark.slow
@pytest.mark.long
def test_the_command_finds_what_a_task_does_not_resist_and_says_what_mends_it(photos):
    for path in [*photos.glob("*.png")]:
        path.unlink()
    arguments = ["audit", "rotation_toy", "--data", str(photos), "--rows", "512", "--planted"]
    result = CliRunner().invoke(app, [*arguments, "--set", "data.image.size=24", "--set", "objective.views={}"])
    assert result.exit_code == 1, result.output
    lines = result.output.splitlines()
    leaks = [line for line in lines if line.strip().startswith("leaks")]
    assert any("watermark planted" in leak and "-> views.margin=0.2" in leak for leak in leaks)
    assert any(line.strip().startswith("clean") and "white noise, jpeg 4:2:2 " in line for line in lines)
    assert any("control found" in line for line in lines)
    assert "no answer depends on other rows, in evaluation" in result.output
    assert lines[-1].startswith("rotation leaks: can be answered without seeing anything: ")


def test_what_is_asked_about_no_data_has_its_gradients_alone_and_says_why():
    torch.manual_seed(0)
    found = audit_recipe("simcse_toy", steps=2, rows=64)
    assert found.findings == []
    assert found.notes == [f"there are no data without structure to ask about: {DROPOUT}"]
    assert found.leaks[0].largest == 0
    assert found.verdict == "clean by gradients"
    assert found.sentence.endswith("there are no data without structure to ask it about, as the note says")


def test_what_could_not_be_asked_is_not_clean():
    torch.manual_seed(0)
    few = recipes.load("contrastive_toy", {"data.limit": 5, "training.workers": 0})
    found = audit_recipe(few, steps=2, rows=64)
    assert found.findings == []
    assert found.verdict == "no power"
    assert found.sentence.endswith("data without structure could not be asked about, see the note")
    assert "pairs of strangers take 8 rows" in str(found)


def test_kinds_that_are_not_written_are_named(tmp_path, monkeypatch):
    for i in range(4):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"{i}.webp")
    monkeypatch.setattr("mmssl.audit.own_files.audit", lambda *_, **__: [])
    found = audit_recipe("rotation_toy", Data(source=str(tmp_path)), steps=1, rows=64)
    assert found.files == {"webp": 4}
    assert found.notes == ["no arm has files of the kind webp, which are not written here"]


@pytest.mark.long
def test_of_clips_there_are_fewer_and_they_are_trained_on_for_longer(monkeypatch):
    asked = {}

    def arms(recipe, kinds, **settings):
        asked.update(settings)
        return [], []

    monkeypatch.setattr("mmssl.audit.own_files.audit_clips", arms)
    audit_recipe("playback_speed_toy", steps=40, rows=64)
    assert (asked["steps"], asked["rows"]) == (80, 8)
