"""The command line: quick where it is light, one sentence where it fails, and every verb on one small run."""

import errno
import io
import json
import re
import resource
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmssl import catalog, cli, doctor
from mmssl.errors import Interrupted
from mmssl.registry import ROOT

RECIPES = ROOT.parent / "recipes"
ROTATION = str(RECIPES / "transformation" / "rotation_toy.yaml")
HEAVY = (
    "torch",
    "torchvision",
    "torchaudio",
    "transformers",
    "timm",
    "datasets",
    "accelerate",
    "sklearn",
    "matplotlib",
)


def call(monkeypatch, *arguments: str) -> int:
    """Exit code of `mmssl ARGUMENTS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mmssl", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("list",),
        ("list", "--json"),
        ("run", ROTATION, "--set", "training.stepz=3"),
        ("run", "rotatoin_toy"),
    ],
    ids=" ".join,
)
def test_light_calls_import_nothing_heavy_and_are_quick(arguments):
    program = (
        "import sys; from mmssl.cli import main; sys.argv = ['mmssl', *sys.argv[1:]]\n"
        "try:\n    main()\nfinally:\n"
        f"    loaded = sorted(set(sys.modules) & {set(HEAVY)!r})\n"
        "    print('LOADED', *loaded, file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT.parent, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.splitlines()[-1] == "LOADED"
    # 0.3 s on a quiet machine; processor time, because a busy one keeps a process waiting.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.5


def test_module_and_console_script_are_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "mmssl", "--version"], capture_output=True, text=True, cwd=ROOT.parent, timeout=60
    )
    assert re.fullmatch(r"mmssl \d+\.\d+\.\d+\n", done.stdout)
    assert 'mmssl = "mmssl.cli:main"' in (ROOT.parent / "pyproject.toml").read_text()


def test_list_names_everything_there_is(monkeypatch, capsys):
    assert call(monkeypatch, "list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    objectives = {p.stem: p.parent.name for p in (ROOT / "objectives").glob("*/*.py") if not p.stem.startswith("_")}
    assert {name: entry["family"] for name, entry in found["objectives"].items() if "family" in entry} == objectives
    assert set(found["recipes"]) == {p.stem for p in RECIPES.rglob("*.yaml")}
    assert {"image", "text", "audio", "video", "fusion"} == set(found["encoders"])
    assert {"knn", "ridge", "logistic", "finetune"} <= set(found["probes"])
    assert all(entry["summary"] for kind in found.values() for entry in kind.values())

    assert call(monkeypatch, "list") == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for kind in found.values() for name in kind)


def test_list_of_one_shows_needs_chance_defaults_and_source(monkeypatch, capsys):
    assert call(monkeypatch, "list", "rotation") == 0
    text = capsys.readouterr().out
    for piece in (
        "1803.07728",
        "reads: what its encoders read",
        "chance: Four turns",
        "views: ",
        "'area': (0.08, 1.0), 'flip': 0.5",
    ):
        assert piece in text
    assert call(monkeypatch, "list", "rotation", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["hyper_parameters"]["views"]["default"]["flip"] == 0.5
    assert all(h["meaning"] for h in facts["hyper_parameters"].values())
    assert call(monkeypatch, "list", "rotation_toy") == 0
    assert Path(ROTATION).read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("list", "rotatoin"), r"'rotatoin' \(did you mean 'rotation"),
        (("run", "rotation_toi.yaml"), r"rotation_toi.yaml: .* \(did you mean 'rotation_toy'\?\)"),
        (("run", ROTATION, "--set", "training.stepz=3"), r"rotation_toy.yaml: unknown key 'training.stepz' .*'steps'"),
        (("run", ROTATION, "--set", "training.steps"), r"--set training.steps: expected KEY=VALUE"),
        (("show", ROTATION, "--set", "objective.viewss=1"), r"unknown key 'viewss' \(did you mean 'views'\?\)"),
        (("run", ROTATION, "--out", ""), r"--out: an argument is empty"),
        (("run", ROTATION, "--out="), r"--out=: an argument is empty"),
        (("run", ROTATION, "--set", "seed=1", "training.steps=1"), r"training.steps=1: .*: --set training.steps=1\n"),
        (("adapt", "no/such/run", "--data", "toy"), r"no/such/run"),
        (("adapt", "run", "--set", "seeds=1"), r"--set seeds is no hyper-parameter"),
        (("export", "no/such/run", "--to", "x"), r"no/such/run"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert call(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(sentence, err)
    assert not list(tmp_path.iterdir())


def test_what_the_disk_refuses_is_one_line(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a")

    monkeypatch.setattr("mmssl.cli.app", full)
    assert call(monkeypatch, "list") == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'runs/a'\n"


def test_debug_shows_where_an_error_comes_from(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mmssl", "--debug", "list", "rotatoin"])
    with pytest.raises(catalog.RecipeError):
        cli.main()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stopped at step 3")])
def test_an_interrupted_call_ends_with_130(monkeypatch, error):
    def interrupted() -> str:
        raise error

    monkeypatch.setattr(catalog, "table", interrupted)
    assert call(monkeypatch, "list") == 130


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, made by the command line, and what it printed."""
    directory, printed = tmp_path_factory.mktemp("cli") / "run", io.StringIO()
    small = ["training.steps=2", "training.log_every=1", "training.batch_size=8", "data.limit=32"]
    arguments = ["run", "rotation_toy", "--out", str(directory), *(w for pair in small for w in ("--set", pair))]
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(printed):
        assert call(monkeypatch, *arguments) == 0
    return directory, printed.getvalue()


def test_run_says_where_everything_is_and_what_comes_next(finished):
    directory, printed = finished
    for name in ("report.html", "figures"):
        assert str(directory / name) in printed
        assert (directory / name).exists()
    commands = [line.strip() for line in printed.splitlines() if line.startswith("  mmssl ")]
    assert any(c.startswith("mmssl run rotation_toy --set data.source=") for c in commands)
    assert any(c.startswith(f"mmssl adapt {directory} ") for c in commands)
    assert "=null" not in printed  # the recipe asks for no probe


@pytest.mark.long
def test_a_run_on_own_files_is_not_told_to_run_on_own_files(monkeypatch, capsys, tmp_path):
    for n in range(8):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / f"{n}.png")
    small = ["training.steps=1", "training.batch_size=8", "data.limit=8", f"data.source={tmp_path}"]
    arguments = [word for pair in small for word in ("--set", pair)]
    assert call(monkeypatch, "run", ROTATION, "--out", str(tmp_path / "run"), *arguments) == 0
    commands = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  mmssl ")]
    assert [command.split()[1] for command in commands] == ["adapt", "show"]


def test_a_run_on_pairs_is_asked_for_retrieval(pairs):
    from mmssl.runs import next_calls

    for own_data in (False, True):
        lines = next_calls(pairs, "contrastive_toy", own_data)
        assert f"  mmssl adapt {pairs.directory} --data path/to/pairs --probe retrieval" in lines
        assert not any("logistic" in line for line in lines)


@pytest.mark.long
def test_check_prints_no_bars(tmp_path):
    (tmp_path / "rows.csv").write_text("text\none\ntwo\n")
    done = subprocess.run(
        [sys.executable, "-m", "mmssl", "check", str(tmp_path)], capture_output=True, text=True, cwd=ROOT.parent
    )
    assert "rows      train 2" in done.stdout
    assert done.stderr == ""


def test_run_refuses_a_directory_that_holds_a_run(monkeypatch, capsys, finished):
    assert call(monkeypatch, "run", ROTATION, "--out", str(finished[0])) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.quick(1)
@pytest.mark.parametrize("what", ["recipe", "run"])
def test_show_draws_the_task_untrained_or_trained(monkeypatch, tmp_path, finished, what):
    target = tmp_path / "picture.png"
    thing = ROTATION if what == "recipe" else str(finished[0])
    assert call(monkeypatch, "show", thing, "--out", str(target), "--rows", "2") == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_adapt_prints_a_table_with_its_baselines(monkeypatch, capsys, finished):
    options = ("--data", "toy", "--label", "shape", "--limit", "64", "--json")
    assert call(monkeypatch, "adapt", str(finished[0]), *options) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["encoder"] for row in rows] == ["pretrained", "random", "constant"]
    assert call(monkeypatch, "adapt", str(finished[0]), *options[:-1], "--no-baseline", "--probe", "ridge") == 0
    text = capsys.readouterr().out
    assert "pretrained" in text
    assert "random" not in text


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A run of one step on pairs."""
    import mmssl

    small = {"training.steps": 1, "training.batch_size": 8, "data.limit": 32}
    return mmssl.run("contrastive_toy", small, tmp_path_factory.mktemp("cli") / "pairs", quiet=True)


@pytest.mark.long
def test_adapt_compares_pairs_and_reads_names_of_classes(monkeypatch, capsys, pairs):
    common = ("adapt", str(pairs.directory), "--data", "toy", "--limit", "48", "--seeds", "1")
    assert call(monkeypatch, *common, "--probe", "retrieval", "--set", "ks=[2, 3]", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["rows"][0]["metrics"]) == ["recall_at_2", "recall_at_3", "median_rank"]
    assert {row["encoder"] for row in found["rows"]} == {"pretrained", "random", "raw", "chance"}
    assert found["test"] == "toy, split test"
    named = ("--probe", "zero_shot", "--label", "shape", "--set", "templates=['a {}', '{} there']")
    assert call(monkeypatch, *common, *named) == 0
    assert "zero_shot probe of 'shape': nothing learned, 48 test rows, 8 classes" in capsys.readouterr().out
    for more, sentence in (
        (("--probe", "retrieval", "--encoder", "image"), "name them as a and b"),
        (("--probe", "knn", "--encoder", "imag"), "no encoder 'imag' (did you mean 'image'?)"),
        (("--probe", "knn", "--set", "kk=3"), "unknown key 'kk'"),
    ):
        assert call(monkeypatch, *common, *more) == 2
        assert sentence in capsys.readouterr().err


def test_embed_writes_the_features_of_any_encoder_of_a_run(monkeypatch, capsys, tmp_path, pairs):
    import pyarrow.parquet

    file = tmp_path / "texts.parquet"
    call_ = ("embed", str(pairs.directory), "toy", "--to", str(file), "--encoder", "text", "--limit", "5")
    assert call(monkeypatch, *call_, "--split", "test") == 0
    assert capsys.readouterr().out.strip() == str(file)
    table = pyarrow.parquet.read_table(file).to_pydict()
    assert not {"image", "audio", "video"} & table.keys()
    encoder = pairs.encoders["text"]
    assert encoder.reading() == pairs.decoding("text")
    pooled = encoder(encoder.read(table["text"])).pooled.detach()
    assert np.allclose(table["features"], pooled, atol=1e-5)
    assert call(monkeypatch, *call_) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.long
def test_what_finetune_trained_is_kept_and_answers(monkeypatch, capsys, tmp_path, pairs):
    folder, file = tmp_path / "classifier", tmp_path / "answers.csv"
    adapt = ("adapt", str(pairs.directory), "--data", "toy", "--label", "shape", "--limit", "48", "--seeds", "1")
    few = ("--no-baseline", "--set", "steps=2", "--set", "lr=[0.001]", "--set", "decay=[1.0]")
    assert call(monkeypatch, *adapt, *few, "--probe", "finetune", "--save", str(folder)) == 0
    assert f"mmssl predict {folder} path/to/files --to answers.csv" in capsys.readouterr().out
    predict = ("predict", str(folder), "toy", "--split", "test", "--limit", "5", "--scores", "--to", str(file))
    assert call(monkeypatch, *predict) == 0
    assert capsys.readouterr().out.strip() == str(file)
    head, *lines = file.read_text().splitlines()
    assert ",answer,probability,probability_" in head
    assert len(lines) == 5
    assert call(monkeypatch, "export", str(folder), "--to", str(tmp_path / "native")) == 0
    assert (tmp_path / "native" / "names.json").is_file()
    assert call(monkeypatch, "predict", str(tmp_path), "toy", "--to", str(tmp_path / "x.csv")) == 2
    assert "holds no classifier" in capsys.readouterr().err


def test_rows_are_decoded_as_those_that_the_encoder_was_trained_on():
    from mmssl import recipe
    from mmssl.build import build_objective
    from mmssl.media.text import Tokenizer
    from mmssl.run_directory import Run

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tree = {
        "encoders": {"image": {"model": "timm/test_resnet"}, "text": {"model": "transformers/bert", **small}},
        "objective": {
            "name": "combine",
            "tasks": {
                "turn": {"name": "rotation", "data": "pictures"},
                "pair": {"name": "contrastive", "width": 8, "data": "pairs"},
                "words": {"name": "masked_language", "data": "texts"},
            },
        },
        "data": {
            "pictures": {"source": "toy", "image": {"size": 48}},
            "texts": {"source": "toy", "text": {"length": 24}},
            "pairs": {"source": "toy", "image": {"size": 32}, "text": {"length": 16}},
        },
    }
    resolved = recipe.load(tree)
    objective = build_objective(resolved, {"text": Tokenizer.train(["a red square"] * 4, 60)}, where="here")
    run = Run(Path(), resolved, objective, objective.exported)
    assert run.decoding("image").image.size == 48
    assert run.decoding("text").text.length == 24
    pair = run.decoding("image", "text")
    assert (pair.image.size, pair.text.length) == (32, 16)


def test_export_and_dry_push_write_their_folders(monkeypatch, tmp_path, finished):
    assert call(monkeypatch, "export", str(finished[0]), "--to", str(tmp_path / "native")) == 0
    assert list((tmp_path / "native").rglob("*.safetensors"))
    assert call(monkeypatch, "push", str(finished[0]), "someone/something", "--dry-run", str(tmp_path / "hub")) == 0
    assert {"README.md", "model.safetensors", "recipe.yaml"} <= {p.name for p in (tmp_path / "hub").iterdir()}


@pytest.mark.parametrize(
    ("versions", "names"),
    [
        ({"torch": "2.14.1", "torchvision": "0.29.2", "torchaudio": "2.11.0"}, []),
        ({"torch": "2.15.0", "torchaudio": "2.11.0"}, ["torchaudio 2.11.0 does not import with it"]),
        ({"torch": "2.9.1"}, ["2.11 to 2.14"]),
        (
            {"torch": "2.11.0+cpu", "torchvision": "0.26.0", "torchaudio": "2.11.0"},
            ["torchvision 0.26.0 was built against them", "torchaudio 2.11.0 was built against them"],
        ),
        ({"torch": "2.11.0+cpu", "torchvision": "0.26.0+cpu", "torchaudio": "2.11.0+cpu"}, []),
        ({"torch": None}, []),
    ],
)
def test_doctor_knows_which_versions_do_not_go_together(versions, names):
    found = doctor.conflicts(versions)
    assert len(found) == len(names)
    for text, name in zip(found, names, strict=True):
        assert name in text
        assert "pip install" in text


def test_doctor_survives_imports_that_raise_and_that_kill(monkeypatch, tmp_path):
    (tmp_path / "sound_module.py").write_text("")
    (tmp_path / "raising_module.py").write_text("raise OSError('libcudart.so.13: cannot open\\nshared object')")
    (tmp_path / "killing_module.py").write_text("import os; os._exit(9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["sound_module", "raising_module", "killing_module", "no_such_module"]
    failing = doctor.failing_imports(names)
    assert failing == {
        "raising_module": "OSError: libcudart.so.13: cannot open shared object",
        "killing_module": "the process ended with 9",
        "no_such_module": "ModuleNotFoundError: No module named 'no_such_module'",
    }


def test_doctor_never_prints_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setattr(doctor, "failing_imports", lambda modules: {})
    monkeypatch.setattr(doctor, "formats", list)
    report, usable = doctor.examine()
    assert usable
    assert re.search(r"hub token +found", report)
    assert "hf_secret" not in report
    monkeypatch.setattr(doctor, "failing_imports", lambda modules: {"timm": "ImportError: broken"})
    report, usable = doctor.examine()
    assert not usable
    assert "import timm fails: ImportError: broken" in report
