"""`mmssl doctor RUN`: what is whole is not complained of, and each damage is one sentence with a way out that works."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import mmssl
from mmssl import cli
from mmssl.errors import RunError
from mmssl.run_doctor import examine_run
from mmssl.training import checkpoint
from mmssl.training.lock import locked

RECIPE: dict[str, Any] = {
    "encoders": {"image": {"model": "timm/test_resnet"}},
    "objective": {"name": "rotation"},
    "data": {"source": "toy", "limit": 8, "image": {"size": 16}},
    "training": {"steps": 2, "batch_size": 4, "log_every": 1, "accumulate": 2},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("doctor") / "run"
    mmssl.run(RECIPE, out=folder, quiet=True)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def state(run: Path) -> Path:
    last = checkpoint.newest(run)
    assert last is not None
    return last


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def overwrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:60] + bytes(20) + content[80:])


def test_a_finished_run_is_whole(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    report, whole = examine_run(run)
    assert whole
    assert report.endswith("everything is whole")
    assert re.search(rf"^resume +finished; mmssl run {run}/recipe.yaml --out {run} --resume", report, re.MULTILINE)
    assert re.search(rf"^trained +1 process\(es\) on \w+, mmssl {mmssl.__version__}$", report, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


Damage = Callable[[Path], Any]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a bit of the weights": (lambda run: turn_a_bit(state(run) / "model.safetensors"), "its bits are others .* copy"),
    "a bit of the optimizer": (lambda run: turn_a_bit(state(run) / "optimizer.safetensors"), "its bits are others"),
    "cut weights": (lambda run: cut(run / "model.safetensors"), "--resume puts that of the checkpoint in its place"),
    "no weights": (lambda run: (run / "model.safetensors").unlink(), "--resume puts that of step_00000002 in"),
    "no weights in the checkpoint": (
        lambda run: (state(run) / "model.safetensors").unlink(),
        "cannot be read: No such file or directory; bring it back",
    ),
    "no optimizer": (lambda run: (state(run) / "optimizer.safetensors").unlink(), "cannot be read: No such file"),
    "no state": (lambda run: (state(run) / "state.json").unlink(), "state.json is damaged: .* start anew"),
    "other data": (
        lambda run: (run / "data.json").write_text('{"": "9 rows, abc"}'),
        "it has 8 rows and had 9 rows; bring it back",
    ),
    "no data": (lambda run: (run / "data.json").unlink(), "data.json is missing .* --resume writes it anew"),
    "no log": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing; bring it back"),
    "an empty log": (
        lambda run: (run / "metrics.jsonl").write_text(""),
        "metrics.jsonl holds no record; bring it back",
    ),
    "a damaged log": (lambda run: (run / "metrics.jsonl").write_text('{"step": {}}'), "metrics.jsonl is damaged"),
    "damaged probes": (lambda run: (run / "probes.json").write_text("{"), "probes.json is damaged"),
    "data that are none": (
        lambda run: (run / "data.json").write_text('{"": 1}'),
        r"data.json .* \(Input should be a",
    ),
    "data of nothing": (lambda run: (run / "data.json").write_text("{}"), "data.json does not say what all"),
    "an empty audit": (
        lambda run: (run / "audit.json").write_text(""),
        "audit.json is damaged: Invalid JSON: EOF while",
    ),
    "another audit": (
        lambda run: (run / "audit.json").write_text("{}"),
        "audit.json is damaged: verdict: Field required",
    ),
    "damaged machines": (
        lambda run: (run / "machines.json").write_text("{}"),
        "machines.json is damaged: Input should",
    ),
    "damaged rows": (lambda run: (run / "errors.jsonl").write_bytes(b"\xff"), "errors.jsonl is damaged: .* drops such"),
    "an empty report": (lambda run: (run / "report.html").write_text(""), "report.html is damaged: it has no end"),
    "a cut figure": (lambda run: cut(run / "figures" / "history.png"), r"history.png is damaged \(.*; remove report"),
    "a figure with other bytes": (
        lambda run: overwrite(run / "figures" / "preview.png"),
        r"preview.png is damaged \(.*; remove report",
    ),
    "no report": (lambda run: (run / "report.html").unlink(), "report.html is missing; --resume writes it anew"),
    "no figure": (lambda run: (run / "figures" / "history.png").unlink(), "remove report.html, and --resume draws"),
    "another recipe": (
        lambda run: (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("_resnet", "_vit")),
        "does not fit the recipe",
    ),
    "a recipe that is none": (
        lambda run: (run / "recipe.yaml").write_text("a: 1"),
        "recipe.yaml: missing key 'encoders'",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_one_sentence_with_the_way_out(run: Path, name: str) -> None:
    damage, sentence = DAMAGES[name]
    damage(run)
    report, whole = examine_run(run)
    problems = [line for line in report.splitlines() if line.startswith("- ")]
    assert not whole
    assert any(re.search(sentence, problem) for problem in problems), report
    assert "pydantic" not in report
    assert len(problems) <= 2  # the cause, and what cannot be asked for that


@pytest.mark.long
def test_several_damages_are_all_named(run: Path) -> None:
    (run / "report.html").unlink()
    (run / "probes.json").write_text("{")
    (run / "audit.json").write_text("")
    turn_a_bit(state(run) / "optimizer.safetensors")
    report, _ = examine_run(run)
    assert sum(line.startswith("- ") for line in report.splitlines()) == 4
    assert re.search(r"^resume +not as it is, see below$", report, re.MULTILINE)


@pytest.mark.long
def test_a_checkpoint_whose_bits_have_changed_is_not_resumed(run: Path) -> None:
    turn_a_bit(state(run) / "optimizer.safetensors")
    with pytest.raises(RunError, match=r"optimizer.safetensors is damaged: its bits are others"):
        mmssl.run(RECIPE, {"training.steps": 3}, out=run, resume=True, quiet=True)


@pytest.mark.long
def test_the_ways_out_work(run: Path) -> None:
    cut(run / "model.safetensors")
    for path in (run / "report.html", run / "data.json"):
        path.unlink()
    assert not examine_run(run)[1]
    mmssl.run(run / "recipe.yaml", out=run, resume=True, quiet=True)
    assert examine_run(run)[1]


@pytest.mark.long
def test_a_run_without_a_checkpoint_and_one_in_use_are_no_damage(run: Path) -> None:
    shutil.rmtree(run / "state")
    with locked(run):
        report, whole = examine_run(run)
    assert re.search(r"^trained .*at this moment process \d+ on \S+ has been writing there", report, re.MULTILINE)
    assert f"encoders.NAME.pretrained={run} starts another run" in report
    assert "--resume would start at the first step and overwrite the weights" in report
    assert whole  # as published runs are


@pytest.mark.long
def test_a_run_that_was_killed_before_its_first_checkpoint_is_no_damage(run: Path) -> None:
    shutil.rmtree(run / "state")
    (run / "model.safetensors").unlink()
    report, whole = examine_run(run)
    assert whole, report
    assert re.search(r"^checkpoint +none yet$", report, re.MULTILINE)
    assert re.search(rf"^resume +mmssl run {run}/recipe.yaml --out {run} --resume .*first step$", report, re.MULTILINE)
    with pytest.raises(RunError, match=r"model.safetensors is missing; .*mmssl doctor FOLDER"):
        mmssl.load(run)


@pytest.mark.long
def test_the_command_line_says_it_with_its_exit_code(run: Path) -> None:
    runner = CliRunner()
    (run / "report.html").unlink()
    found = runner.invoke(cli.app, ["doctor", str(run)])
    assert found.exit_code == 1
    assert "something is missing or damaged" in found.output
    with pytest.raises(RunError, match=r"no run: recipe\.yaml is missing"):
        examine_run(run / "figures")
