"""The shape of the house: who may import whom, where modalities may be named, how long a file may be."""

import ast
import itertools
import re
from functools import cache
from pathlib import Path

import pytest

from mmssl.batch import MODALITIES
from mmssl.registry import ROOT

PROJECT = ROOT.parent
SOURCES = sorted(ROOT.rglob("*.py"))
FILES = sorted(itertools.chain(SOURCES, *((PROJECT / room).rglob("*.py") for room in ("tests", "scripts"))))
LONGEST = 400

# Rooms from the ground up: a module imports from its own room and from lines above its own. Imports inside functions
# and those for type checkers count. `mmssl/__init__.py` names what is public and may look everywhere.
FLOORS = """
errors version ranges shots alive way_on
atomic
batch registry embedding_files
catalog schema
decode_settings
recipe
ops media
data encoders
modules
objectives
dry_run training
build adaptation
audit
run_directory parts
report hub
runs
transfer embedding predicting comparison suites
comparing
doctor run_doctor cli_options
cli_rows cli_asking
cli
__main__
"""


def module_of(path: Path) -> str:
    """Its name below `mmssl`, and "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS.split("\n")) for room in rooms.split()}


def imports(source: str) -> set[str]:
    """Modules of the library that a source imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole module"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    inside = [name.removeprefix("mmssl").removeprefix(".") for name in names if name.partition(".")[0] == "mmssl"]
    return {name if name in MODULES else name.rpartition(".")[0] for name in inside} - {""}


@cache
def arrows() -> set[tuple[str, str]]:
    return {(name, other) for name, path in MODULES.items() if name for other in imports(path.read_text("utf-8"))}


def upward(edges: set[tuple[str, str]]) -> list[tuple[str, str]]:
    def floors(edge):
        return [FLOOR_OF[name.partition(".")[0]] for name in edge]

    def same_room(edge):
        return edge[0].partition(".")[0] == edge[1].partition(".")[0]

    return sorted(edge for edge in edges if not same_room(edge) and floors(edge)[0] <= floors(edge)[1])


def circles(edges: set[tuple[str, str]]) -> set[str]:
    """Modules on a circle: what is left after those that import nothing left, or are imported by nothing left, go."""
    left = set(edges)
    while True:
        importers, imported = {a for a, _ in left}, {b for _, b in left}
        kept = {(a, b) for a, b in left if b in importers and a in imported}
        if kept == left:
            return importers
        left = kept


def test_rooms_import_only_what_lies_below_them():
    assert {name.partition(".")[0] for name in MODULES if name} == set(FLOOR_OF)
    wrong = upward(arrows())
    assert not wrong


def test_no_module_imports_itself_by_a_detour():
    wrong = circles(arrows())
    assert not wrong


def test_the_checks_see_what_they_are_for():
    assert imports("def f():\n    from mmssl import runs\n    import mmssl.ops.draws\n") == {"runs", "ops.draws"}
    assert imports("from mmssl.objectives.base import Objective") == {"objectives.base"}
    assert upward({("ops.draws", "runs"), ("data.loader", "encoders.base"), ("runs", "ops.draws")}) == [
        ("data.loader", "encoders.base"),
        ("ops.draws", "runs"),
    ]
    chain = {("a", "b"), ("b", "c"), ("c", "d")}
    assert not circles(chain)
    assert circles(chain | {("d", "b")}) == {"b", "c", "d"}


def test_tasks_know_nothing_of_where_data_comes_from():
    assert not {edge for edge in arrows() if edge[0].startswith("objectives") and edge[1].startswith("data")}


@pytest.mark.parametrize(
    "name", [*(n for n in MODULES if n.startswith("training.")), "ops.losses", "adaptation.features"]
)
def test_no_modality_is_named_where_all_are_alike(name):
    """As a string, or in an identifier; `text` alone is an everyday word there (`read_text`)."""
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value.partition("/")[0] not in MODALITIES, f"line {node.lineno}"
        for field in ("id", "attr", "arg", "name"):
            words = re.split(r"[_\W]", str(getattr(node, field, "")).lower())
            assert not {"image", "images", "audio", "video", "videos", "pixels", "spectrogram"} & set(words), words


def test_files_can_be_read_in_one_sitting():
    longer = {str(path.relative_to(PROJECT)) for path in FILES if len(path.read_text("utf-8").splitlines()) > LONGEST}
    assert not longer


def test_every_file_has_a_subject():
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")]


@pytest.mark.quick(1)
@pytest.mark.parametrize("number", [0, 1])
def test_of_a_quick_test_the_first_case_alone_is_for_every_day(request, number):
    assert bool(request.node.get_closest_marker("long")) == bool(number)


def test_no_two_tests_have_one_name():
    names = [path.name for path in (PROJECT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))  # pytest would read one of the two
