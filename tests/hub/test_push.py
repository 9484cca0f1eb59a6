"""What is published is complete, loads back bit for bit, and holds nothing private; to a folder and over HTTP."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from safetensors.torch import load_file
from small_runs import CLIP, PAIRS, ROTATION, make_classifier, make_run, outputs

import mmssl
from mmssl.errors import RunError
from mmssl.hub import push
from mmssl.run_directory import Audited, Machine, keep_audit, keep_machine


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("push") / "run", PAIRS)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


PUBLISHED = {
    "README.md",
    "recipe.yaml",
    "model.safetensors",
    "metrics.jsonl",
    "probes.json",
    "figures/history.png",
    "tokenizers/text/tokenizer.json",
    "tokenizers/text/tokenizer_config.json",
    "native/README.md",
    "native/projections.safetensors",
    "native/image/config.json",
    "native/image/model.safetensors",
    "native/image/preprocessing.json",
    "native/text/config.json",
    "native/text/model.safetensors",
    "native/text/preprocessing.json",
    "native/text/tokenizer.json",
    "native/text/tokenizer_config.json",
}


def test_dry_run_holds_everything_and_nothing_else(run, tmp_path) -> None:
    push(run, "me/pairs", dry_run=tmp_path / "out")
    assert files(tmp_path / "out") == PUBLISHED
    assert not list(tmp_path.glob(".*"))


def test_dry_run_loads_back_bit_for_bit(run, tmp_path) -> None:
    again = mmssl.load(push(run, "me/pairs", dry_run=tmp_path / "out"))
    before, after = outputs(run), outputs(again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    mine, theirs = run.objective.state_dict(), again.objective.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert (again.step, again.history, again.recipe) == (run.step, run.history, run.recipe)
    ids = [loaded.encoders["text"].tokenizer("a red triangle", 16)[0] for loaded in (run, again)]
    assert torch.equal(*ids)


def test_nothing_private_is_published(tmp_path) -> None:
    secret = tmp_path / "somebody" / "photos"
    secret.mkdir(parents=True)
    tree = {
        **ROTATION,
        "data": {"source": str(secret)},
        "probe": {"data": f"{secret}/labels.csv"},
        "training": {"trackers": ["wandb"], "steps": 20},
    }
    elsewhere = tmp_path / "somebody" / "other labels"  # of `mmssl adapt --data`, which no recipe names
    elsewhere.mkdir()
    run = make_run(tmp_path / "run", tree, make_probes(elsewhere))
    keep_machine(run.directory, Machine("CPU", 2))
    keep_audit(run.directory, Audited("at chance", "audit of rotation"))
    # Weights from a place on this machine are told by the last part of its name.
    first = make_run(secret / "first", ROTATION)
    image = {**run.recipe.encoders["image"], "pretrained": str(first.directory)}
    save_recipe = run.recipe.model_copy(update={"encoders": {"image": image}})
    (run.directory / "recipe.yaml").write_text(save_recipe.dump())
    run = mmssl.load(run.directory)
    (run.directory / "tensorboard").mkdir()
    (run.directory / "tensorboard" / "events").write_text("x")
    (run.directory / "wandb").mkdir()
    (run.directory / "wandb" / "settings").write_text("WANDB_API_KEY=secret")
    push(run, "me/turns", dry_run=tmp_path / "out")
    assert files(tmp_path / "out") >= {"machines.json", "audit.json"}
    assert files(tmp_path / "out").isdisjoint({"tensorboard/events", "wandb/settings", "errors.jsonl"})
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert b"somebody" not in path.read_bytes(), path
            assert b"secret" not in path.read_bytes(), path
    again = mmssl.load(tmp_path / "out")
    assert again.recipe.data.source == "photos"
    assert (again.audit, again.machines) == (run.audit, run.machines)


def make_probes(place: Path) -> dict:
    from small_runs import PROBES

    return {**PROBES, "test": f"a fifth of {place}", "warnings": [f"few rows in {place}"]}


def test_dry_run_replaces_its_own_folder_only(run, tmp_path) -> None:
    out = tmp_path / "out"
    push(run, "me/pairs", dry_run=out)
    (out / "model.safetensors").write_bytes(b"")
    push(run, "me/pairs", dry_run=out)
    assert load_file(out / "model.safetensors")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not written by this command"):
        push(run, "me/pairs", dry_run=out)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(RunError, match="not written by this command"):
        push(run, "me/pairs", dry_run=run.directory)
    with pytest.raises(RunError, match="is a file"):
        push(run, "me/pairs", dry_run=out / "notes.txt")


def test_a_failure_leaves_the_old_folder_and_no_other(run, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    push(run, "me/pairs", dry_run=out)
    before = {name: (out / name).read_bytes() for name in files(out)}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.encoders["text"], "export", full)
    with pytest.raises(RunError, match="No space left on device"):
        push(run, "me/pairs", dry_run=out)
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["", "a/b/c", "me/..", "me/a b", "me/x\n", "-me/x"])
def test_names_of_repositories(run, tmp_path, name) -> None:
    with pytest.raises(RunError, match="not a name for a repository"):
        push(run, name, dry_run=tmp_path / "out")


def test_a_run_without_weights(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "directory", tmp_path)
    with pytest.raises(RunError, match=r"model\.safetensors is missing"):
        push(run, "me/pairs", dry_run=tmp_path / "out")


@pytest.mark.long
def test_open_clip_tokenizers_travel_by_name(tmp_path) -> None:
    tree = {**PAIRS, "encoders": {"image": CLIP, "text": CLIP}}
    run = make_run(tmp_path / "run", tree)
    again = mmssl.load(push(run, "me/clip", dry_run=tmp_path / "out"))
    assert files(tmp_path / "out" / "tokenizers") == {"text/open_clip_tokenizer.json"}
    before, after = outputs(run), outputs(again)
    assert all(torch.equal(before[name], after[name]) for name in before)


SCRIPT = """
import json, sys, torch
import mmssl
from mmssl.errors import RunError
from mmssl.hub import load_classifier, push, push_classifier

def fails(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except RunError as error:
        return str(error)

run = mmssl.load(sys.argv[1])
said = {
    "anonymous": fails(push, run, "me/pairs"),
    "stranger": fails(push, run, "me/pairs", token="hf_wrong"),
    "absent": fails(mmssl.load, "me/nothing"),
    "other": fails(mmssl.load, "me/other"),
    "bare": fails(push, run, "pairs", token="hf_right"),
    "names": fails(mmssl.load, "me/names"),
    "objective": fails(mmssl.load, "me/objective"),
    "revision": fails(mmssl.load, "me/other@v9"),
    "classifier": fails(load_classifier, "me/other"),
}
push_classifier(sys.argv[2], "me/shapes", token="hf_right")
names = load_classifier("me/shapes").target.names
first = push(run, "me/pairs", token="hf_right")
again = mmssl.load("me/pairs")
equal = all(torch.equal(v, again.objective.state_dict()[k]) for k, v in run.objective.state_dict().items())
second = push(again, "me/fresh", token="hf_right", private=True)
pinned = f"me/pairs@{again.directory.name}"
records = run.directory / "metrics.jsonl"
kept = records.read_text()
print('{"step": 1}', file=records.open("w"), flush=True)
push(mmssl.load(sys.argv[1]), "me/pairs", token="hf_right")
records.write_text(kept)
steps = [again.step, mmssl.load("me/pairs").step, mmssl.load(pinned).step]
print(json.dumps({"said": said, "equal": equal, "names": names, "addresses": [first, second], "steps": steps}))
"""


@pytest.fixture(scope="module")
def talk(run, tmp_path_factory):
    """A process that pushes to a Hub on loopback and loads from it, well-behaved repositories and hostile ones."""
    place = tmp_path_factory.mktemp("talk")
    push(run, "me/pairs", dry_run=place / "out")
    sound = {name: (place / "out" / name).read_bytes() for name in files(place / "out")}
    outside = sound["recipe.yaml"].replace(b"name: contrastive", b"name: os.path")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
    with FakeHub() as hub:
        hub.repos |= {
            "me/pairs": {"native/old/model.safetensors": b"stale", "notes.md": b"mine", "model.pkl": b"x"},
            "me/other": {"config.json": b"{}"},
            "me/names": {**sound, "tokenizers/../../../../escaped/tokenizer.json": b"{}"},
            "me/objective": {**sound, "recipe.yaml": outside},
        }
        environment = {
            **kept,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(place / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        shapes = make_classifier(place / "shapes", names=("dark", "light"))
        command = [sys.executable, "-c", SCRIPT, str(run.directory), str(shapes)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return hub, json.loads(result.stdout.splitlines()[-1]), place


@pytest.mark.long
def test_pushed_over_http(run, talk) -> None:
    hub, told, _ = talk
    assert told["addresses"] == [f"{hub.url}/me/pairs", f"{hub.url}/me/fresh"]
    # What is ours and no longer published goes; what others put there stays.
    assert set(hub.repos["me/pairs"]) == PUBLISHED | {"notes.md", "model.pkl"}
    # A run that came from the Hub is published whole.
    assert set(hub.repos["me/fresh"]) == PUBLISHED
    assert hub.repos["me/pairs"]["model.safetensors"] == (run.directory / "model.safetensors").read_bytes()
    assert "model.safetensors" in hub.large
    assert hub.private == {"me/fresh"}
    assert {"classifier.json", "native/names.json"} <= set(hub.repos["me/shapes"])


@pytest.mark.long
def test_loaded_over_http(run, talk) -> None:
    hub, told, _ = talk
    assert told["equal"]
    assert told["steps"] == [run.step, 1, run.step]  # as it was first, as it is now, and as it was by its commit
    assert told["names"] == ["dark", "light"]
    got = {
        path.partition("/resolve/")[2].partition("/")[2] for _, path in hub.log if path.startswith("/me/pairs/resolve")
    }
    assert got == {name for name in PUBLISHED if not name.startswith(("native/", "README"))}


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("anonymous", "run `hf auth login`"),
        ("stranger", "your token may not do this"),
        ("absent", "no such repository"),
        ("other", "is not an mmssl run: it has no recipe.yaml"),
        ("revision", "has no such revision"),
        ("bare", "expected user/name"),
        ("classifier", "is not an mmssl classifier: it has no classifier.json"),
        ("objective", "objective 'os.path' is not part of mmssl"),
        ("names", ""),
    ],
)
def test_refusals_over_http_are_one_sentence(talk, case, sentence) -> None:
    _, told, place = talk
    assert sentence in told["said"][case]
    assert "\n" not in told["said"][case]
    assert not list(place.rglob("escaped"))


def test_no_network_is_one_sentence(run, monkeypatch, tmp_path) -> None:
    with FakeHub() as hub:
        closed = hub.url
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
    for call in (lambda: push(run, "me/pairs", token="x"), lambda: mmssl.load("me/never-downloaded")):
        with pytest.raises(RunError, match=f"cannot reach {closed}") as raised:
            call()
        assert "\n" not in str(raised.value)
