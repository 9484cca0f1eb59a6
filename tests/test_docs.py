"""The documents are true: code they quote stands in the files they name, commands they give exist."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from mmssl import catalog, cli
from mmssl.registry import ROOT

PROJECT = ROOT.parent
DOCUMENTS = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md")]
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
    calls = re.findall(r"^(?:torchrun .* -m )?mmssl (.*?)(?:\s*#.*)?$", blocks, re.MULTILINE)
    assert calls
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
    named += re.findall(r"\]\(([\w./]+)\)", text)
    assert named
    assert not [name for name in named if not (PROJECT / name).exists()]
