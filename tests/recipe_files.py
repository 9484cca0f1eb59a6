"""The recipes that come along, as parameters of tests: in the fast tier one toy recipe a task, in the long one all."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mmssl.catalog import recipe_files

FILES = recipe_files()
TOYS = [path for path in FILES if path.stem.endswith("_toy")]


def each(paths: Iterable[Path]) -> list[Any]:
    """A parameter a recipe, named after it; `long` unless it is the first toy one of its task."""
    return [pytest.param(p, id=p.stem, marks=() if p in _first().values() else pytest.mark.long) for p in paths]


@cache
def _first() -> dict[str, Path]:
    """Task -> the toy recipe that is named after nothing else: the one with the shortest name."""
    # Not parsed: every worker of every run collects tests.
    return {
        re.search(r"^objective:\s*\{?\s*name: (\w+)", path.read_text("utf-8"), re.MULTILINE)[1]: path
        for path in sorted(TOYS, key=lambda path: (-len(path.stem), path.stem))
    }
