"""The plan of a comparison is kept, and a call that is repeated goes on with it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import threading
import time
from dataclasses import asdict, replace

import datasets
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmssl.cli import app
from mmssl.comparison.plan import Plan, make_plan
from mmssl.errors import RecipeError, RunError
from mmssl.recipe import Data


def plan(budget: str, steps: int, lr: float = 1e-3) -> Plan:
    training = {"steps": steps, "log_every": 1, "save_every": steps // 4, "schedule": {"warmup": steps // 20}}
    tasks = {"rotation": {"training": {**training, "optimizer": {"lr": lr}}}}
    return Plan({"source": "toy"}, "shape", "image", tasks=tasks, samples={"rotation": 4.0}, budget=budget)


def test_what_was_written_is_read(tmp_path):
    plan("steps=100", 100).write(tmp_path)
    assert Plan.read(tmp_path) == plan("steps=100", 100)


def test_minutes_that_give_another_number_of_steps_are_gone_on_with(tmp_path):
    first = plan("minutes=3", 100)
    first.write(tmp_path)
    plan("minutes=3", 117).write(tmp_path)
    assert Plan.read(tmp_path) == first
    with pytest.raises(RunError, match="with other recipes or encoders of its tasks; choose another --out"):
        plan("minutes=3", 117, lr=1e-2).write(tmp_path)


def test_processes_that_begin_together_have_one_plan(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as the other one does while it writes
    writing = threading.Thread(target=plan("minutes=3", 117).write, args=(tmp_path,))
    writing.start()
    time.sleep(0.2)
    (tmp_path / "comparison.json").write_text(json.dumps(asdict(plan("minutes=3", 100))))
    os.close(descriptor)
    writing.join()
    assert Plan.read(tmp_path) == plan("minutes=3", 100)


def test_another_comparison_is_refused(tmp_path):
    first = plan("steps=100", 100)
    first.write(tmp_path)
    with pytest.raises(RunError, match="with other recipes"):
        plan("steps=100", 117).write(tmp_path)
    with pytest.raises(RunError, match="with other budget"):
        plan("steps=117", 117).write(tmp_path)
    with pytest.raises(RunError, match="with other budget"):
        plan("minutes=3", 100).write(tmp_path)
    with pytest.raises(RunError, match="with other seeds"):
        replace(first, seeds=(0,)).write(tmp_path)


def test_tasks_are_added_to_a_comparison_and_none_is_taken_away(tmp_path):
    first = plan("steps=100", 100)
    first.write(tmp_path)
    more = {"jigsaw": {"training": {"steps": 100}}, **first.tasks}
    replace(first, tasks=more, samples={"jigsaw": 3.6, "rotation": 4.0}).write(tmp_path)
    assert list(Plan.read(tmp_path).tasks) == ["rotation", "jigsaw"]
    with pytest.raises(RunError, match="with other tasks; name jigsaw as well, or choose another --out"):
        first.write(tmp_path)
    with pytest.raises(RunError, match="with other tasks"):
        replace(plan("steps=100", 117), tasks={**more, **plan("steps=100", 117).tasks, "moco": {}}).write(tmp_path)


def test_a_damaged_plan_is_one_sentence(tmp_path):
    (tmp_path / "comparison.json").write_text("{")
    for act in (lambda: Plan.read(tmp_path), lambda: plan("steps=100", 100).write(tmp_path)):
        with pytest.raises(RunError, match="cannot be read"):
            act()


@pytest.mark.long
def test_a_step_of_more_rows_than_there_are_names_the_way_out():
    few = Data(source="toy", limit=40)
    given = {"label": "shape", "tasks": ["simclr"], "encoder": "timm/test_resnet", "size": 32, "budget": "steps=4"}
    with pytest.raises(
        RecipeError, match=r"has 40 usable rows, and a step of simclr takes 128; lower batch \(--batch\) to 80"
    ):
        make_plan(few, **given)
    with pytest.raises(RecipeError, match=r"has 3 usable rows, .* simclr takes 128; lower batch \(--batch\) to 6"):
        make_plan(Data(source="toy", limit=3), **given)
    assert make_plan(few, **given, batch=80).tasks["simclr"]["training"]["batch_size"] == 40


@pytest.mark.long
def test_rows_without_a_picture_do_not_count_among_those_of_a_step(tmp_path):
    kept = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(kept, "png")
    cells = [kept.getvalue() if i < 12 else None for i in range(40)]
    datasets.Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(40)]}).to_parquet(tmp_path / "a.parquet")
    given = {"label": "label", "tasks": ["rotation"], "encoder": "timm/test_resnet", "size": 32, "budget": "steps=4"}
    says = r"has 12 usable rows, and a step of rotation takes 16; lower batch \(--batch\) to 48 or less$"
    with pytest.raises(RecipeError, match=says):
        make_plan(Data(source=str(tmp_path)), **given, batch=64)


@pytest.mark.long
def test_a_task_that_has_nothing_to_predict_on_these_rows_is_left_out(tmp_path):
    for i in range(32):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    given = {"budget": "steps=4", "batch": 16, "encoder": "timm/test_resnet", "size": 32}
    found = make_plan(Data(source=str(tmp_path)), **given)
    assert {"rotation", "simclr"} <= set(found.tasks)
    assert any(note.startswith("colorization is left out: its loss on these rows is 0 before") for note in found.notes)
    with pytest.raises(RecipeError, match="nothing to predict"):
        make_plan(Data(source=str(tmp_path)), tasks=["colorization"], **given)


@pytest.mark.parametrize(("option", "example"), [("shots", "as 10, or .*, as 1%"), ("rates", "as 0.3,1,3")])
def test_a_list_that_is_none_is_named_with_its_option(tmp_path, option, example):
    call = ["compare", "--data", "toy", f"--{option}", "ten", "--out", str(tmp_path / "out")]
    error = CliRunner().invoke(app, call).exception
    assert isinstance(error, RecipeError)
    assert re.search(rf"^{option} = 'ten'.*, {example}$", str(error))
