"""Strict settings: sections that know their keys, YAML that fills them, and one sentence for what does not fit."""

from __future__ import annotations

import datetime
import io
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator

from mmssl.errors import RecipeError, in_words, nearest
from mmssl.ranges import takes_truth_for_number

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Pixels = Annotated[int, Field(gt=0, le=2**13)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[int, Field(gt=0, le=10**9)]


# Libraries build what they are told to, however long that takes: most of each kind of number by the end of its name.
SIZES = {
    re.compile(r"(\w+_)?(layers|depths?|heads|experts)"): 10_000,
    re.compile(r"(\w+_)?(image_size|img_size|frames)"): 2**13,
    re.compile(r"\w+"): 2**24,
}


def check_plain(value: Any, key: str = "") -> None:
    """Raise ValueError, naming the key, where a tree holds what YAML can say and no component reads."""
    if isinstance(value, Mapping):
        for inner, below in value.items():
            if not isinstance(inner, str):
                raise ValueError(f"{key + ': ' if key else ''}the key {inner!r} should be a name, in quotes if need be")
            check_plain(inner, key)
            check_plain(below, f"{key}.{inner}" if key else inner)
    elif isinstance(value, list | tuple):
        for below in value:
            check_plain(below, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} = {value}: should be a finite number")
    elif isinstance(value, bytes | datetime.date | set):
        raise ValueError(f"{key} = {value!r}: should be a text, a number, true, false or null")
    elif isinstance(value, str) and re.search(r"[\x00\ud800-\udfff]", value):
        raise ValueError(f"{key} = {value!r}: holds characters that no text has")


def check_sizes(value: Any, place: str, key: str = "") -> None:
    """Raise ValueError, naming the key, for a whole number that no network has; `key` is the last part of `place`."""
    if isinstance(value, Mapping):
        for inner, below in value.items():
            check_sizes(below, f"{place}.{inner}", inner)
    elif isinstance(value, list | tuple):
        for below in value:
            check_sizes(below, place, key)
    elif isinstance(value, int):
        most = next((most for pattern, most in SIZES.items() if pattern.fullmatch(key)), 2**24)
        if abs(value) > most:
            raise ValueError(f"{place} = {value} is more than any network has; at most {most:,}")


class Section(BaseModel):
    """Its keys are all there are, its numbers are finite, its values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is no number, though Python takes it for 1."""
        field = cls.model_fields[info.field_name or ""]
        if takes_truth_for_number(field.annotation, value):
            raise ValueError("should be a number, not true or false")
        return value


Filled = TypeVar("Filled", bound=Section)
T = TypeVar("T")


def fill(section: type[Filled], tree: Mapping[str, Any], where: str) -> Filled:
    """The section with the values of a mapping.

    Raises:
        RecipeError: one sentence with `where`, the key, what was expected and the nearest valid name.
    """
    try:
        check_plain(tree)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_sentence(error, where, section)) from None


def parse_json(kind: type[T], text: str | bytes) -> T:
    """JSON as what it should hold.

    Raises:
        ValueError: one sentence with the place in it and what was expected there.
    """
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(first_of(error)) from None


def first_of(error: ValidationError) -> str:
    """The first thing that is wrong, with its place."""
    first = error.errors()[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), in_words(first["msg"])]))


def read_yaml(
    path: Path, shape: str = "a recipe is a mapping with the keys encoders, objective, data and training"
) -> dict[str, Any]:
    """The mapping that a file holds.

    Args:
        path: of the file.
        shape: what such a mapping is, for the error.

    Raises:
        RecipeError: where it cannot be read, is no YAML or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    try:
        tree = yaml.safe_load(io.StringIO(text))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: {shape}")
    return tree


def override(tree: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of a tree with dotted keys set; strings are read as YAML.

    Raises:
        RecipeError: where a key leads through something that is no section, or a value is no YAML.
    """
    changed: dict[str, Any] = _copy(tree)
    for dotted, value in values.items():
        *parents, last = dotted.split(".")
        node = changed
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise RecipeError(f"{where}: cannot set {dotted}: '{parent}' is not a section")
        try:
            node[last] = yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            raise RecipeError(f"{where}: cannot read the value of {dotted}: {value!r}") from error
    return changed


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _sentence(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    first = error.errors()[0]
    # Pydantic names the branch of a union on the way; ours have their names in brackets.
    place = [str(part) for part in first["loc"] if not str(part).startswith("(")]
    key = ".".join(place)
    kind = first["type"]
    if kind == "extra_forbidden":
        return f"{where}: unknown key '{key}'{nearest(place[-1], _known(place[:-1], root))}"
    if kind == "missing":
        return f"{where}: missing key '{key}'"
    given = first.get("input")
    shown = f" = {given!r}" if not isinstance(given, Mapping) else ""
    message = in_words(first["msg"])
    return f"{where}: {key}{shown}: {message[0].lower() + message[1:]}" if key else f"{where}: {message}"


def _known(place: list[str], section: type[BaseModel]) -> list[str]:
    """Field names of the section at `place`; names of the user's own (of sources) are passed over."""
    for part in place:
        field = section.model_fields.get(part)
        section = next(_sections(field.annotation), section) if field else section
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
