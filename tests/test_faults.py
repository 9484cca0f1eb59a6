"""Runs that diverge, that are started twice, whose data or folder changes: nothing good is lost, and one sentence."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mmssl
from mmssl.adaptation.rows import Reads
from mmssl.alive import began, is_alive
from mmssl.data.decoding import Failures
from mmssl.errors import MmsslError, RecipeError, RunError
from mmssl.objectives.base import Panel
from mmssl.recipe import Data
from mmssl.report.figures import draw_panels
from mmssl.training import checkpoint
from mmssl.training.lock import LOCK, locked
from mmssl.training.progress import truncate_after


def recipe(source: Path | str = "toy", **training: Any) -> dict[str, Any]:
    return {
        "encoders": {"image": {"model": "timm/test_resnet"}},
        "objective": {"name": "rotation"},
        "data": {"source": str(source), "image": {"size": 16}} | ({"limit": 16} if source == "toy" else {}),
        "training": {"steps": 6, "batch_size": 4, "log_every": 2, "save_every": 2} | training,
    }


def pictures(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for n in range(first, first + count):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{n:03d}.png")
    return folder


def whole(directory: Path) -> bool:
    last = checkpoint.newest(directory)
    files = [directory / "model.safetensors", last / "model.safetensors"]
    return all(value.isfinite().all() for file in files for value in load_file(file).values())


@pytest.mark.long
def test_a_run_that_diverges_keeps_its_last_good_checkpoint_and_its_advice_can_be_followed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    mmssl.run(recipe(), out=out, quiet=True)
    with pytest.raises(RunError) as error:
        mmssl.run(recipe(steps=20, optimizer={"lr": 1e30}), out=out, resume=True, quiet=True)
    assert "not finite" in str(error.value)
    assert "step_00000006 is whole" in str(error.value)
    assert whole(out)
    kept = load_file(out / "model.safetensors")
    again = mmssl.run(recipe(steps=8, clip=1.0, optimizer={"lr": 1e-4}), out=out, resume=True, quiet=True)
    assert again.step == 8
    assert checkpoint.read_state(checkpoint.newest(out))["step"] == 8
    assert any(not torch.equal(value, kept[name]) for name, value in load_file(out / "model.safetensors").items())


def test_the_rows_and_the_step_of_a_loss_that_is_not_finite_are_named(tmp_path: Path) -> None:
    wild = recipe(steps=50, log_every=7, save_every=40, optimizer={"lr": 1e30, "name": "sgd"})
    with pytest.raises(RunError, match=r"the loss is not finite at step [2-5], of rows \[\d+, \d+, \d+, \d+\]"):
        mmssl.run(wild, out=tmp_path / "run", quiet=True)


@pytest.mark.long
def test_a_finished_run_goes_on_with_more_steps_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    mmssl.run(recipe(), out=out, quiet=True)
    assert mmssl.run(recipe(steps=10), out=out, resume=True).history[-1]["step"] == 10
    assert "from step 6 on: training.steps = 10 (was 6)" in capsys.readouterr().err
    with pytest.raises(RunError, match="in steps, of which 10 are done"):
        mmssl.run(recipe(steps=8), out=out, resume=True, quiet=True)


@pytest.mark.long
def test_data_that_changed_is_not_resumed_on_unless_asked_to(tmp_path: Path) -> None:
    source = pictures(tmp_path / "pictures", 12)
    out = tmp_path / "run"
    mmssl.run(recipe(source), out=out, quiet=True)
    pictures(source, 8, first=12)
    with pytest.raises(RunError, match=r"data has changed since the run began: it has 20 rows and had 12 rows"):
        mmssl.run(recipe(source, steps=8), out=out, resume=True, quiet=True)
    assert mmssl.run(recipe(source, steps=8), out=out, resume=True, changed_data=True, quiet=True).step == 8
    (source / "000.png").rename(source / "019b.png")
    with pytest.raises(RunError, match="its 20 rows are others, in another order, or of files that have changed"):
        mmssl.run(recipe(source, steps=10), out=out, resume=True, quiet=True)
    (source / "019b.png").rename(source / "000.png")
    source.rename(tmp_path / "elsewhere")
    (tmp_path / "pictures").symlink_to(tmp_path / "elsewhere")
    assert mmssl.run(recipe(source, steps=10), out=out, resume=True, quiet=True).step == 10


@pytest.mark.long
def test_what_was_found_is_said_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = pictures(tmp_path / "pictures", 8)
    (source / "notes.md").write_text("no picture")
    mmssl.run(recipe(source, steps=1), out=tmp_path / "run")
    said = capsys.readouterr().err
    assert f"data: 8 rows of {source}, split train: image" in said
    assert "files of other kinds are left out: 1 .md" in said


@pytest.mark.long
def test_a_broken_file_is_one_line_and_shows_in_the_records(tmp_path: Path) -> None:
    source = pictures(tmp_path / "pictures", 11)
    (source / "001.png").write_bytes(b"no picture")
    tree = recipe(source, steps=12)
    tree["data"]["max_bad"] = 0.5
    history = mmssl.run(tree, out=tmp_path / "run", quiet=True).history
    errors = [json.loads(line) for line in (tmp_path / "run" / "errors.jsonl").read_text().splitlines()]
    assert [error["id"] for error in errors] == [1]
    assert history[-1]["undecodable"] == 1
    mmssl.run(tree | {"training": tree["training"] | {"steps": 24}}, out=tmp_path / "run", resume=True, quiet=True)
    assert len((tmp_path / "run" / "errors.jsonl").read_text().splitlines()) == 1


def test_a_checkpoint_without_its_recipe_is_not_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "state" / "step_00000004").mkdir(parents=True)
    for resume in (True, False):
        with pytest.raises(RunError, match=r"recipe.yaml is missing, and without it step_00000004 .*bring it back"):
            mmssl.run(recipe(), out=tmp_path, resume=resume, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "tokenizers"]


def test_a_lock_names_its_holder_and_is_taken_over_from_the_dead(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(RunError, match=rf"process {os.getpid()} on {socket.gethostname()} has been writing"):
            mmssl.run(recipe(), out=tmp_path, quiet=True)
        with pytest.raises(RunError, match="has been writing there since"), locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for content in (
        json.dumps({"host": socket.gethostname(), "process": dead.pid, "began": "1"}),
        json.dumps({"host": socket.gethostname(), "process": os.getpid(), "began": "1"}),  # another with my number
        "half a lo",
        "[]",
        "",
    ):
        (tmp_path / LOCK).write_text(content)
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        assert not (tmp_path / LOCK).exists()
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "process": 1, "began": "1"}))
    with pytest.raises(RunError, match="on elsewhere"), locked(tmp_path):
        pass


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with locked(tmp_path):
        assert (tmp_path / ".lock").is_file()


def test_of_many_that_take_over_one_wins(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from mmssl.errors import RunError\n"
        "from mmssl.training.lock import LOCK, locked\n"
        "for round in range(30):\n"
        "    directory = Path(sys.argv[1]) / str(round)\n"
        "    directory.mkdir()\n"
        "    (directory / LOCK).write_text('{')\n"
        "    (go, start), (ended, end), (told, tell) = os.pipe(), os.pipe(), os.pipe()\n"
        "    children = []\n"
        "    for _ in range(8):\n"
        "        children.append(os.fork())\n"
        "        if not children[-1]:\n"
        "            os.close(start), os.close(end)\n"
        "            os.read(go, 1)\n"
        "            try:\n"
        "                with locked(directory):\n"
        "                    os.write(tell, b'held ')\n"
        "                    os.read(ended, 1)\n"
        "            except RunError:\n"
        "                os.write(tell, b'no ')\n"
        "            os._exit(0)\n"
        "    os.close(start)\n"
        "    answers = b''\n"
        "    while len(answers.split()) < 8 or not answers.endswith(b' '):\n"
        "        answers += os.read(told, 100)\n"
        "    os.close(end)\n"
        "    for child in children:\n"
        "        os.waitpid(child, 0)\n"
        "    print(answers.split().count(b'held'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1"] * 30, done.stderr


@pytest.mark.parametrize("workers", [-1, 100_000])
def test_workers_that_cannot_be_are_refused(workers: int) -> None:
    with pytest.raises(RecipeError, match=f"workers = {workers}: expected 0 to 256"):
        Reads(("image",), {}, workers)


@pytest.mark.parametrize("name", ["a.foo", "a"])
def test_a_kind_of_picture_that_nobody_writes_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=r"pictures are written as .*\.png"):
        draw_panels([Panel("a", [torch.rand(3, 8, 8)])], tmp_path / name)


@pytest.mark.long
@pytest.mark.parametrize("content", ["{", "[]", '{"step": "many"}', "", '{"step": -3}', "[" * 100_000])
def test_a_damaged_state_is_one_sentence(tmp_path: Path, content: str) -> None:
    mmssl.run(recipe(steps=2), out=tmp_path / "run", quiet=True)
    (checkpoint.newest(tmp_path / "run") / "state.json").write_text(content)
    with pytest.raises(RunError, match=r"state.json is damaged"):
        mmssl.run(recipe(steps=2), out=tmp_path / "run", resume=True, quiet=True)


@pytest.mark.long
def test_damaged_records_are_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    mmssl.run(recipe(), out=out, quiet=True)
    records = (out / "metrics.jsonl").read_text()
    odd = ["[1]", '"x"', '{"step": null}', "[" * 100_000, '{"step": 2, "loss": "many"}', '{"step": 2, "loss": {}}']
    (out / "metrics.jsonl").write_text("\n".join(odd) + "\n" + records + '{"step": 6, "lo')
    errors = ["[" * 100_000, "{}", '{"step": 1, "source": [], "id": "x", "reason": 3}']
    (out / "errors.jsonl").write_text("\n".join(errors))
    (out / "data.json").write_text("[" * 100_000)
    assert [r["step"] for r in mmssl.run(recipe(steps=8), out=out, resume=True, quiet=True).history] == [0, 2, 4, 6, 8]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written: Not a directory; choose another --out"):
        mmssl.run(recipe(), out=tmp_path / "file" / "run", quiet=True)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(RunError, match="cannot be written: Permission denied"):
            mmssl.run(recipe(), out=tmp_path / "closed" / "run", quiet=True)


def test_a_start_that_comes_to_nothing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = recipe() | {"data": {"source": "toy", "limit": 2}}
    with pytest.raises(MmsslError):
        mmssl.run(refused, out=tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")

    def interrupt(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmssl.runs.build", interrupt)
    for name in ("new", "mine"):
        with pytest.raises(KeyboardInterrupt):
            mmssl.run(recipe(), out=tmp_path / name, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_folder_that_vanishes_midway_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    save = checkpoint.save

    def vanish(*arguments: Any) -> None:
        save(*arguments)
        shutil.rmtree(out)

    monkeypatch.setattr("mmssl.training.loop.checkpoint.save", vanish)
    with pytest.raises(RunError, match=str(out)):
        mmssl.run(recipe(), out=out, quiet=True)


def test_a_process_that_was_killed_and_not_yet_buried_holds_no_lock(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    since = began(child.pid)
    holder = {"host": socket.gethostname(), "process": child.pid, "began": since, "since": "noon"}
    (tmp_path / LOCK).write_text(json.dumps(holder))
    with pytest.raises(RunError, match="has been writing there since noon"), locked(tmp_path):
        pass
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not asked yet
    assert not is_alive(child.pid, since)
    with locked(tmp_path):
        pass
    child.communicate()
    assert is_alive(os.getpid(), began(os.getpid()))
    assert not is_alive(os.getpid(), "1")
    assert not is_alive(2**70, "1")


def test_a_run_whose_last_step_ruins_it_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmssl.training.loop.losses_of", lambda *_: {"same_rows/loss": float("nan")})
    with pytest.raises(RunError, match=r"on the rows of step 1; the checkpoint step_00000004 is whole"):
        mmssl.run(recipe(), out=tmp_path / "run", quiet=True)
    assert checkpoint.newest(tmp_path / "run").name == "step_00000004"


def test_records_that_are_no_file_are_one_sentence(tmp_path: Path) -> None:
    kinds = {"step": int, "": object}
    for name, make in {"pipe": os.mkfifo, "folder": os.mkdir}.items():
        make(tmp_path / name)
        with pytest.raises(RunError, match=f"{name}: is no file; remove it"):
            truncate_after(tmp_path / name, 3, kinds)
    truncate_after(tmp_path / "missing", 3, kinds)


@pytest.mark.long
def test_a_run_that_was_killed_before_its_last_weights_had_their_name_ends_with_them(tmp_path: Path) -> None:
    out = tmp_path / "run"
    mmssl.run(recipe(), out=out, quiet=True)
    right = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").write_bytes(b"of an earlier step")
    mmssl.run(recipe(), out=out, resume=True, quiet=True)
    assert (out / "model.safetensors").read_bytes() == right


def test_what_those_left_who_were_killed_while_they_took_the_lock_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    for owner in (dead.pid, os.getppid()):
        (tmp_path / f"{LOCK}.{host}.{owner}").write_text("{}")
    with locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {LOCK, f"{LOCK}.{host}.{os.getppid()}"}


def test_a_row_that_several_processes_meet_is_written_and_counted_once(tmp_path: Path) -> None:
    path, spec = tmp_path / "errors.jsonl", Data(source="toy", max_bad=1)
    one, two = (Failures(spec, path=path) for _ in range(2))
    one.add(1, [5, 6], [(0, "bad")])
    two.add(1, [7, 8], [])
    one.add(2, [1, 2], [])
    two.add(2, [17, 5], [(0, "worse")])
    two.add(3, [5, 17], [(0, "bad"), (1, "worse")])
    one.add(3, [17, 0], [(0, "worse")])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [5, 17]
    assert one.different == two.different == 2
    again = Failures(spec, path=path)
    again.add(1, [5, 6], [(0, "bad")])
    assert again.different == 1  # as it was at that step
