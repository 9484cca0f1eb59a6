"""A component's name is the name of its module: `rotation` -> `mmssl/objectives/transformation/rotation.py`.

There is no table to keep: a new file is a new name. Names and first docstring lines are read from the source, so that
listing costs no import; keywords are checked against the constructor's signature, which is the only schema.
`my_package.my_module` reaches a component outside the library.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from mmssl.errors import RecipeError, in_words, nearest
from mmssl.ranges import describe, takes_truth_for_number

ROOT = Path(__file__).parent
ROOMS = {
    "objective": "objectives",
    "encoder": "encoders",
    "backbone": "encoders/backbones",
    "probe": "adaptation/probes",
    "target": "adaptation/targets",
}
NOT_COMPONENTS = {"__init__", "base"}


@dataclass(frozen=True)
class Component:
    """A named part of the library: where it is and what its docstring's first line says."""

    name: str
    family: str
    module: str
    summary: str


@cache
def components(kind: str) -> dict[str, Component]:
    """All components of a kind (`objective`, `encoder`, `backbone`, `probe`, `target`) by name; none is imported."""
    room = ROOT / ROOMS[kind]
    others = {ROOT / other for other in ROOMS.values()} - {room}
    found = {}
    for path in sorted(room.rglob("*.py")):
        if path.stem in NOT_COMPONENTS or path.stem.startswith("_") or path.parent in others:
            continue
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        family = path.parent.name if path.parent != room else ""
        found[path.stem] = Component(path.stem, family, ".".join(parts), doc.partition("\n")[0])
    return found


def find(kind: str, name: str, where: str = "") -> type:
    """The one class that the module of that name defines.

    Args:
        kind: `objective`, `encoder`, `backbone`, `probe` or `target`.
        name: of a module of that kind's room, or dotted for one outside the library.
        where: file and key, for the error.

    Raises:
        RecipeError: naming the nearest known name.
    """
    prefix = f"{where}: " if where else ""
    known = components(kind)
    if name in known:
        module = importlib.import_module(known[name].module)
    elif "." in name:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise RecipeError(f"{prefix}cannot import the {kind} '{name}': {error}") from error
    else:
        raise RecipeError(f"{prefix}there is no {kind} named '{name}'{nearest(name, known)}")
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not value.__name__.startswith("_")
    ]
    wanted = name.rpartition(".")[2].replace("_", "").lower()
    exact = [value for value in own if value.__name__.lower() in (wanted, wanted + kind)]
    if len(exact or own) != 1:
        raise RecipeError(
            f"{prefix}module {module.__name__} should define one class for '{name}', it defines {len(own)}"
        )
    return (exact or own)[0]


def keywords(component: type) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of the constructor: a component's hyper-parameters."""
    parameters = inspect.signature(component).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_keywords(component: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`given`, each value turned into the type that the constructor states.

    Args:
        component: a class whose hyper-parameters are keyword-only and annotated.
        given: from a recipe; `3e-4`, which YAML reads as a string, becomes a number.
        where: file and key, for the error.

    Raises:
        RecipeError: for an unknown name, a missing one, a value of another type or out of its range; no number is
            infinite or NaN.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # listing components does without

    parameters = keywords(component)
    hints = get_type_hints(component.__init__, include_extras=True)  # type: ignore[misc]
    plain = get_type_hints(component.__init__)  # type: ignore[misc]
    strict = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(component).parameters.values())
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key not in parameters:
            if open_ended:
                checked[key] = value
                continue
            raise RecipeError(f"{where}: unknown key '{key}'{nearest(key, parameters)}")
        hint = hints.get(key, Any)
        kind = plain.get(key, Any)
        if get_origin(kind) is Union:
            kind = reduce(or_, get_args(kind))  # which is written as it is in the source: int | None
        wanted = f"{inspect.formatannotation(kind).replace('typing.', '')} {describe(hint)}".rstrip()
        one = get_args(kind)[1:] == (...,) and isinstance(value, int | float | str)
        read = [value] if one else value  # a list of one is written without brackets, too
        if takes_truth_for_number(kind, read):
            raise RecipeError(f"{where}: {key} = {value!r} should be {wanted}")
        try:
            checked[key] = TypeAdapter(hint, config=strict).validate_python(read)
        except ValidationError as error:
            message = in_words(error.errors()[0]["msg"])
            raise RecipeError(f"{where}: {key} = {value!r} should be {wanted}: {message}") from error
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in given]
    if missing:
        raise RecipeError(f"{where}: missing key '{missing[0]}', which has no default")
    return checked
