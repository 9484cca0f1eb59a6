"""A comparison in a file: its keys, its tasks with changes, and what a call says besides."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mmssl
from mmssl.catalog import find_recipe
from mmssl.cli import app
from mmssl.comparison.settings import read_settings
from mmssl.comparison.tasks import Task, found_tasks
from mmssl.errors import RecipeError
from mmssl.recipe import Data

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "choosing.md"
COLD = {"recipe": "simclr", "name": "cold", "set": {"objective.temperature": 0.05}}


def written(folder: Path, text: str) -> Path:
    path = folder / "comparison.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def asked(monkeypatch) -> dict[str, object]:
    """What a plan is made of, by a call that ends there."""
    found: dict[str, object] = {}

    def stop(data: Data, **others: object) -> None:
        found.update(others, data=data)
        raise RecipeError("enough")

    monkeypatch.setattr("mmssl.comparing.make_plan", stop)
    return found


def test_a_file_holds_the_arguments_of_the_call_and_the_call_wins(tmp_path, asked):
    (tmp_path / "mine.yaml").write_text("")
    text = "data: {source: toy, columns: {image: img}}\nlabel: shape\ntasks: [rotation, mine.yaml]\nshots: [4, 1%]\n"
    path = written(tmp_path, text + "budget: samples=1e3\nseeds: 2\nrates: [1e-1]\naudit: false\n")
    with pytest.raises(RecipeError, match="enough"):
        mmssl.compare(str(path))
    assert asked["data"] == Data(source="toy", columns={"image": "img"})
    assert asked["tasks"] == [Task(recipe="rotation"), Task(recipe=str(tmp_path / "mine.yaml"))]
    assert (asked["shots"], asked["seeds"], asked["rates"], asked["audit"]) == ((4, "1%"), (0, 1), (0.1,), False)
    with pytest.raises(RecipeError, match="enough"):
        mmssl.compare(str(path), seeds=3, data="emoji")  # 3 is the default, and given
    assert (asked["seeds"], asked["data"], asked["budget"]) == ((0, 1, 2), Data(source="emoji"), "samples=1e3")
    call = ["compare", str(path), "--seeds", "3", "--shots", "7", "--audit", "--set", "limit=9"]
    assert str(CliRunner().invoke(app, call).exception) == "enough"
    assert (asked["seeds"], asked["shots"], asked["audit"], asked["rates"]) == ((0, 1, 2), (7,), True, (0.1,))
    assert asked["data"] == Data(source="toy", columns={"image": "img"}, limit=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1", r"comparison.yaml: unknown key 'seed' \(did you mean 'seeds'\?\)"),
        ("seeds: three", "comparison.yaml: seeds = 'three': input should be a valid integer"),
        ("data: {source: toy, colums: {}}", r"yaml: data: unknown key 'colums' \(did you mean 'columns'\?\)"),
        ("tasks: [{recipe: simclr, sets: {}}]", r"tasks.0: unknown key 'sets' \(did you mean 'set'\?\)"),
        ("tasks: [{name: a b, recipe: simclr}]", "tasks.0: name = 'a b': names folders; use letters, digits, _ and -"),
        ("tasks: [3]", "comparison.yaml: tasks.0"),
        ("[rotation]", "a comparison is a mapping with keys such as data, label, tasks and budget"),
    ],
)
def test_what_does_not_fit_is_named_with_its_key(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        read_settings(written(tmp_path, text), mmssl.compare)
    with pytest.raises(RecipeError, match=message):
        mmssl.compare(str(tmp_path / "comparison.yaml"))


def test_a_file_that_is_not_there_and_two_files_are_said(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere.yaml: cannot be read"):
        mmssl.compare("nowhere.yaml")
    error = CliRunner().invoke(app, ["compare", "a.yaml", "b.yaml"]).exception
    assert str(error) == "a.yaml and b.yaml: one file says what is compared"


def test_a_task_with_changes_is_a_line_of_its_own():
    found = found_tasks(["simclr", Task(**COLD)], ["image"], None, None, "photos")
    assert list(found.recipes) == ["simclr", "cold"]
    assert found.recipes["cold"].objective == {**found.recipes["simclr"].objective, "temperature": 0.05}
    assert found.notes == ("cold: recipe simclr_folder with objective.temperature = 0.05",)
    with pytest.raises(RecipeError, match=r"two of the tasks are called simclr; .*\{recipe: simclr, name: another\}"):
        found_tasks(["simclr", "simclr"], ["image"], None, None, "photos")


@pytest.mark.parametrize(
    ("key", "way"),
    [
        ("training.steps", "budget"),
        ("training.batch_size", "budget"),
        ("data.source", "the same rows"),
        ("probe.k", "asked alike"),
        ("encoders.image.model", "one encoder"),
    ],
)
def test_what_is_the_same_for_all_tasks_cannot_be_set_for_one(key, way):
    task = Task(recipe="simclr", set={key: 7})
    with pytest.raises(RecipeError, match=rf"simclr: {key} cannot be set for one task of a comparison; .*{way}"):
        found_tasks([task], ["image"], None, None, "photos")
    kept = Task(recipe="simclr", set={"training.optimizer.lr": 0.1, "data.image.size": 32})
    assert found_tasks([kept], ["image"], None, None, "photos").recipes["simclr"].training.optimizer.lr == 0.1


@pytest.mark.parametrize("name", ["untrained", "raw_input", "supervised"])
def test_no_task_is_called_as_a_baseline(name):
    with pytest.raises(RecipeError, match="which is a baseline"):
        mmssl.compare("toy", label="shape", tasks=[Task(recipe="simclr", name=name)])


@pytest.mark.long
def test_the_file_of_the_guide_can_be_compared(tmp_path):
    (text,) = re.findall(r"<!-- comparison.yaml -->\n```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    path = written(tmp_path, text)
    shutil.copy(find_recipe("rotation_folder"), tmp_path / "mine.yaml")
    few = [
        "--budget",
        "steps=2",
        "--seeds",
        "1",
        "--rates",
        "1",
        "--limit",
        "60",
        "--shots",
        "4,50%",
        "--batch",
        "8",
        "--probe",
        "ridge",
    ]
    few += ["--encoder", "timm/test_resnet", "--no-audit", "--no-supervised", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["compare", str(path), *few])
    assert done.exception is None
    found = mmssl.Comparison.read(tmp_path / "out")
    assert list(found.plan.tasks) == ["rotation", "simclr", "simclr_cold", "turns"]
    assert "simclr cold: recipe simclr_folder with objective.temperature = 0.05" in done.output
    assert "turns: recipe mine" in done.output
    curves = [found.cells[line][0]["curve"][0]["loss"] for line in ("simclr", "simclr_cold", "rotation", "turns")]
    assert curves[0] != curves[1]
    assert curves[2] == curves[3]
