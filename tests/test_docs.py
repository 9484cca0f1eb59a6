"""The documents are true: code they quote is in the files they name, commands they give exist."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from mmssl import catalog, cli
from mmssl.registry import ROOT

PROJECT = ROOT.parent
DOCUMENTS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").rglob("*.md"))]
QUOTES = re.findall(r"<!-- (\S+) -->\n```\w*\n(.*?)```", (PROJECT / "CONTRIBUTING.md").read_text(), re.DOTALL)

each = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@pytest.mark.parametrize(("path", "code"), QUOTES, ids=[f"{i} {path}" for i, (path, _) in enumerate(QUOTES)])
def test_quoted_code_is_that_of_the_file(path, code):
    assert code in (PROJECT / path).read_text()


def test_the_walk_through_quotes_all_three_files():
    assert {Path(path).parts[0] for path, _ in QUOTES} == {"mmssl", "recipes", "tests"}


@each
def test_commands_are_those_of_the_command_line(document):
    program = get_command(cli.app)
    recipes = {path.stem for path in catalog.recipe_files()}
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL))
    calls = re.findall(r"^\s*(?:exec |torchrun .* -m )?mmssl (.*?)(?:\s*#.*)?$", blocks, re.MULTILINE)
    assert len(calls) == len(re.findall(r"^.*\bmmssl ", blocks, re.MULTILINE))
    for call in calls:
        verb, *words = call.split()
        assert verb in program.commands, call
        options = {option for parameter in program.commands[verb].params for option in parameter.opts}
        options |= {option for parameter in program.commands[verb].params for option in parameter.secondary_opts}
        assert {word for word in words if word.startswith("--")} <= options, call
        if verb == "run":
            assert words[0] in recipes or (PROJECT / words[0]).is_file(), call


@each
def test_files_it_names_exist(document):
    text = document.read_text()
    named = re.findall(r"(?:bash |python |[`\"])((?:scripts|tests|recipes|mmssl|\.ci)/[\w./]+\w)", text)
    linked = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    assert not [name for name in named if not (PROJECT / name).exists()]
    assert not [name for name in linked if not (document.parent / name).exists()]


def test_the_readme_is_a_page():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.long
def test_python_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    import torch

    (program,) = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
    program = program.replace('{"training.steps": 200}', '{"training.steps": 31, "probe.limit": 40}')
    monkeypatch.chdir(tmp_path)
    for i in range(24):
        folder = Path("path/to/labeled", ("dark", "light")[i % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 160 * (i % 2) + i, np.uint8)).save(folder / f"{i}.png")
    for name in ("a.jpg", "b.png", "photos/a.jpg", "photos/b.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.effect_noise((40, 30), 60).convert("RGB").save(name)
    names = {"images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}
    exec(program, names)
    assert {depth.pooled.shape[0] for depth in [names["features"], *names["depths"].values()]} == {2}
    said = capsys.readouterr().out
    assert "margin over the best baseline" in said
    assert "40 x 30 pixels" in said
    assert np.load("photos.npz")["image"].tolist() == ["photos/a.jpg", "photos/b.png"]
