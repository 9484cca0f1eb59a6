"""Whole runs through the public call and the command line: a kill or another layout changes nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mmssl
from mmssl.encoders import reinitialized
from mmssl.errors import RecipeError, RunError
from mmssl.hub import model_card
from mmssl.training import checkpoint

ROOT = Path(__file__).parent.parent
VIT = {
    "model": "timm/vit_tiny_patch16_224",
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
}
BERT = {
    "model": "transformers/bert",
    "tokenizer": "train:120",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SENTENCES = [f"the {a} {b} {c}" for a in ("red", "blue", "old") for b in ("cat", "dog", "owl") for c in ("sat", "ran")]


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))  # order of tasks is order of initialization
    return path


def together(**training: Any) -> dict[str, Any]:
    """Two tasks of which one is coupled and one divides by a count, over shared encoders, in double precision."""
    return {
        "encoders": {"image": VIT, "text": BERT},
        "objective": {
            "name": "combine",
            "tasks": {
                "turn": {"name": "rotation"},
                "pairs": {"name": "contrastive", "width": 8},
                "words": {"name": "masked_language"},
            },
            "conflicts": 1,
        },
        "data": {"source": "toy", "limit": 32, "image": {"size": 16}, "text": {"length": 24}},
        "training": {"steps": 4, "batch_size": 8, "precision": "fp64", "log_every": 1, "save_every": 2} | training,
    }


def words(source: Path, **data: Any) -> dict[str, Any]:
    return {
        "encoders": {"text": BERT},
        "objective": {"name": "masked_language"},
        "data": {"source": str(source), "text": {"length": 8}} | data,
        "training": {"steps": 60, "batch_size": 4, "log_every": 1, "save_every": 3},
    }


def losses(directory: Path) -> list[list[float]]:
    skipped = ("samples_per_second", "data_wait", "peak_memory_gib", "eta")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [[v for k, v in sorted(json.loads(line).items()) if k not in skipped] for line in lines]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `together`, on one process."""
    directory = tmp_path_factory.mktemp("runs") / "one"
    mmssl.run(together(), out=directory, quiet=True)
    return directory


def test_what_a_run_leaves(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"recipe.yaml", "model.safetensors", "state", "metrics.jsonl", "report.html", "figures"} <= names
    assert {"preview.png", "history.png"} <= {path.name for path in (finished / "figures").iterdir()}
    assert "conflicts.png" in {path.name for path in (finished / "figures").iterdir()}
    report = (finished / "report.html").read_text()
    assert "Verdict: turn: too few answers to tell: accuracy" in report
    assert re.search(r"Conflict: \w+ and \w+ [a-z ,]+: mean cosine of their gradients -?0\.\d+ \(95% int", report)
    assert [path.name for path in (finished / "state").iterdir()] == ["step_00000004"]


def test_load_gives_the_trained_weights(finished: Path) -> None:
    run = mmssl.load(finished)
    assert set(run.encoders) == {"image", "text"}
    assert run.step == 4
    stored = load_file(finished / "model.safetensors")
    for name, value in checkpoint.tensors(run.objective).items():
        assert torch.equal(value, stored[name].to(value.dtype)), name
    fresh = reinitialized(run.encoders["image"], 0)
    assert not torch.equal(next(fresh.parameters()), next(run.encoders["image"].parameters()))


def test_a_run_is_not_overwritten_and_not_resumed_as_another(finished: Path) -> None:
    with pytest.raises(RunError, match=r"already holds a run; add --resume"):
        mmssl.run(together(), out=finished, quiet=True)
    with pytest.raises(RunError, match=r"differs from the one it was started with in seed"):
        mmssl.run(together(seed=5), out=finished, resume=True, quiet=True)
    again = mmssl.run(together(log_every=2), out=finished, resume=True, quiet=True)
    assert again.history[-1]["step"] == 4


@pytest.mark.long
def test_a_finished_run_goes_on_and_says_how(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tree = together(schedule={"warmup": 0})
    tree["objective"] = {"name": "rotation"}
    mmssl.run(tree, out=tmp_path / "run", quiet=True)
    mmssl.adapt(tmp_path / "run", label="shape", limit=32, seeds=1)
    tree["training"]["steps"] = 6
    done = mmssl.run(tree, out=tmp_path / "run", resume=True)
    rates = {record["step"]: record.get("lr") for record in done.history}
    said = f"learning rate {rates[5]:.3g} (was {rates[4]:.3g}), as cosine has it over 6"
    assert f"from step 4 on: {said}" in capfd.readouterr().err
    assert sorted(rates) == list(range(7))
    # What was measured of the weights before is not told of those that are there now.
    earlier = "of the weights at step 4; the run has gone on to step 6 since"
    assert done.probes[0]["warnings"][-1] == earlier
    assert earlier in (tmp_path / "run" / "report.html").read_text()
    assert earlier in model_card(done)
    mmssl.adapt(tmp_path / "run", label="shape", limit=32, seeds=1)
    (again,) = mmssl.load(tmp_path / "run").probes
    assert earlier not in again["warnings"]
    assert earlier not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.long
def test_a_run_in_epochs_is_the_run_of_their_steps_and_can_be_resumed(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES))
    tree = words(rows)
    tree["training"] = {"epochs": 1.5, "batch_size": 4, "log_every": 1, "schedule": {"warmup": 0.5}}
    one = mmssl.run(tree, out=tmp_path / "epochs", quiet=True)
    assert one.step == one.recipe.training.steps == 6  # 18 rows are 4 batches an epoch
    tree["training"] = {"steps": 6, "batch_size": 4, "log_every": 1, "schedule": {"warmup": 2}}
    mmssl.run(tree, out=tmp_path / "steps", quiet=True)
    assert losses(tmp_path / "epochs") == losses(tmp_path / "steps")
    tree["training"] = {"epochs": 1.5, "batch_size": 4, "log_every": 2, "schedule": {"warmup": 0.5}}
    assert mmssl.run(tree, out=tmp_path / "epochs", resume=True, quiet=True).step == 6
    tree["data"]["streaming"] = True
    assert mmssl.run(tree, out=tmp_path / "jsonl", quiet=True).step == 6
    (tmp_path / "rows.csv").write_text("\n".join(["text", *SENTENCES]))
    tree["data"]["source"] = str(tmp_path / "rows.csv")
    with pytest.raises(RecipeError, match="needs data of known size"):
        mmssl.run(tree, out=tmp_path / "stream", quiet=True)
    assert not (tmp_path / "stream").exists()


@pytest.mark.long
def test_torchrun_on_two_processes_is_the_same_run(finished: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    recipe = write(tmp_path / "together.yaml", together(accumulate=2))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # One process trains this probe at the end while the other one waits.
    probe = "probe={label: shape, probe: finetune, limit: 16, steps: 2, lr: [0.001], decay: [1.0]}"
    result = subprocess.run(
        [*launch, "-m", "mmssl", "run", str(recipe), "--out", str(tmp_path / "two"), "--set", probe],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for one, two in zip(losses(finished), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, abs=1e-9, rel=0)
    assert [table["probe"] for table in json.loads((tmp_path / "two" / "probes.json").read_text())] == ["finetune"]


@pytest.mark.long
def test_processes_of_slurm_end_with_a_checkpoint_on_their_signal_and_go_on(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (line,) = re.findall(r"srun bash -c '(.*?)'", (ROOT / "docs/guides/scaling.md").read_text("utf-8"), re.DOTALL)
    tree = {**together(steps=150, save_every=1000), "objective": {"name": "rotation"}, "encoders": {"image": VIT}}
    recipe = write(tmp_path / "turns.yaml", tree)
    call = line.replace("mmssl run", f"{sys.executable} -m mmssl run").replace("simclr_imagenet", str(recipe))
    call = call.replace("runs/x", str(tmp_path / "run"))

    def start() -> list[subprocess.Popen[bytes]]:
        """Two tasks, as srun starts them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "SLURM_NTASKS": "2"}
        ranks = ({"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01")
        return [
            subprocess.Popen(["bash", "-c", call], env=environment | shared | rank, stdout=subprocess.DEVNULL)
            for rank in ranks
        ]

    tasks = start()
    deadline = time.monotonic() + 200
    metrics = tmp_path / "run" / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.01)
    tasks[1].send_signal(signal.SIGUSR1)
    assert [task.wait(timeout=100) for task in tasks] == [130, 130]
    state = checkpoint.newest(tmp_path / "run")
    assert state is not None
    assert 0 < checkpoint.read_state(state)["step"] < 150
    assert [task.wait(timeout=300) for task in start()] == [0, 0]
    assert mmssl.load(tmp_path / "run").step == 150


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes live")
def test_a_launcher_that_is_killed_takes_its_processes_along(tmp_path: Path, environment: dict[str, str]) -> None:
    tree = together(steps=100_000, workers=1) | {"objective": {"name": "rotation"}, "encoders": {"image": VIT}}
    recipe, out = write(tmp_path / "turns.yaml", tree), tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    mark = f"MMSSL_TEST={tmp_path}"
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*launch, "-m", "mmssl", "run", str(recipe), "--out", str(out)],
            env=environment | dict([mark.split("=")]),
            stdout=log,
            stderr=log,
        )

    def alive() -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append(process.name)
        return found

    try:
        deadline = time.monotonic() + 200
        while checkpoint.newest(out) is None and time.monotonic() < deadline and launcher.poll() is None:
            time.sleep(0.01)
        assert len(alive()) >= 5, (tmp_path / "log").read_text()[-2000:]
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 30
        while alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive()
    finally:
        launcher.kill()
        for process in alive():
            os.kill(int(process), signal.SIGKILL)
    assert checkpoint.newest(out) is not None


def _go_on(tree: dict[str, Any], directory: Path) -> None:
    mmssl.run(tree, out=directory, resume=True, quiet=True)


@pytest.mark.long
@pytest.mark.parametrize("streaming", [pytest.param(False, id="map"), pytest.param(True, id="stream")])
def test_killed_and_resumed_has_the_same_bits(streaming: bool, tmp_path: Path, forkserver: BaseContext) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES))
    tree = words(rows, streaming=streaming, shuffle_buffer=8)
    mmssl.run(tree, out=tmp_path / "whole", quiet=True)

    killed = tmp_path / "killed"
    process = forkserver.Process(target=_go_on, args=(tree, killed))
    process.start()
    deadline = time.monotonic() + 200
    while checkpoint.newest(killed) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    reached = checkpoint.read_state(checkpoint.newest(killed))["step"]
    assert 0 < reached < 60, "the kill came too late to prove anything"
    _go_on(tree, killed)
    assert losses(killed) == losses(tmp_path / "whole")
    ours, theirs = load_file(killed / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


IMPOSSIBLE = {
    "batch of one": ({"training": {"batch_size": 1}}, r"batch_size = 1: combine compares the rows of a batch"),
    "processes and micro-batches": (
        {"training": {"batch_size": 8, "accumulate": 8}, "data": {"limit": 4}},
        r"4 rows|8 rows|batch",
    ),
    "patch that does not divide": ({"encoders": {"image": {"patch_size": 7}}}, r"recipe: encoders.image|cannot run on"),
    "unknown encoder keyword": ({"encoders": {"image": {"dpeth": 2}}}, r"encoders.image: .*dpeth"),
    "unknown hyper-parameter": (
        {"objective": {"tasks": {"turn": {"name": "rotation", "views": {"flop": 1}}}}},
        r"objective: tasks.turn: .*did you mean 'flip'",
    ),
    "missing column": ({"data": {"columns": {"image": "picture"}}}, r"no column 'picture'"),
    "unknown source": ({"data": {"source": "no/such/folder"}}, r"no/such/folder"),
    "probe of no column": ({"probe": {"label": "shap"}}, r"no column 'shap' \(did you mean 'shape'\?\)"),
    "probe of other labels": ({"probe": {"label": "shape", "target": "values"}}, r"column 'shape': values should be"),
    "probe of pairs of none": ({"probe": {"probe": "retrieval", "a": "audio"}}, r"compares .*not audio and anything"),
    "two probes alike": (
        {"probes": [{"label": "shape", "k": [1]}, {"label": "shape", "k": [5]}]},
        r"probes.1 asks what probes.0 does, knn of 'shape'",
    ),
    "logistic of values": ({"probe": {"label": "position", "probe": "logistic"}}, r"logistic learns classes or labels"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_work_is_said_before_training(case: str, tmp_path: Path) -> None:
    changes, message = IMPOSSIBLE[case]
    tree = together()
    for section, values in changes.items():
        if isinstance(values, dict):
            merge(tree.setdefault(section, {}), values)
        else:
            tree[section] = values
    with pytest.raises(mmssl.MmsslError, match=message) as caught:
        mmssl.run(tree, out=tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            tree[key] = dict(tree[key])
            merge(tree[key], value)
        else:
            tree[key] = value


def test_sound_and_picture_last_equally_long() -> None:
    tree = yaml.safe_load((ROOT / "recipes/correspondence/temporal_alignment_toy.yaml").read_text())
    tree["data"]["audio"]["seconds"] = 4
    with pytest.raises(RecipeError, match=r"audio.seconds = 4: .*video.frames / video.fps is 2"):
        mmssl.run(tree, out="never", quiet=True)
    tree["data"]["audio"] = {"rate": 8000, "seconds": 2}
    with pytest.raises(RecipeError, match=r"audio.rate = 8000: the encoder 'audio' hears 16000"):
        mmssl.run(tree, out="never", quiet=True)
