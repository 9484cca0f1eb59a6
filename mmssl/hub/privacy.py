"""What is published of a recipe and of tables: local paths become their last part, URLs lose passwords and queries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from mmssl import recipe as recipes
from mmssl.recipe import Recipe

LOCAL = re.compile(r"""(?<![^\s('"])(?:file://|[A-Za-z]:\\|(?:~|\.{1,2})?[/\\])[^\s,;'"]+""")
SPOKEN = ("test", "validation", "notes", "warnings")  # of a table; the others are names that the user gave


def publishable(recipe: Recipe) -> Recipe:
    """The recipe without what is private: local paths become their last part, URLs lose passwords and queries."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    return recipes.validate(replace_all(tree, private(recipe)), "recipe")


def private(recipe: Recipe) -> dict[str, str]:
    """Strings of the recipe that are not published -> what is put in their place."""
    found = {text: _reduce(text) for text in _strings(recipe.model_dump(mode="json"))}
    places = [source.source for source in recipe.sources().values()]
    places += [probe.data for probe in recipe.every_probe() if probe.data]
    found |= {text: _last_part(text) for text in places if "://" not in text and (Path(text).exists() or "*" in text)}
    return {text: public for text, public in found.items() if text != public}


def replace_all(tree: Any, replacements: Mapping[str, str]) -> Any:
    """The same JSON tree; in every string the keys of `replacements`, longest first, are replaced by their values."""
    if isinstance(tree, Mapping):
        return {key: replace_all(value, replacements) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [replace_all(value, replacements) for value in tree]
    if isinstance(tree, str):
        for text in sorted(replacements, key=len, reverse=True):
            tree = tree.replace(text, replacements[text])
    return tree


def place_of(test: str) -> str:
    """The source that the rows of a table are from, out of the words that name them (`Table.test`)."""
    return re.split(r", (?:split |held out)", test.removeprefix("a fifth of "))[0]


def public_table(tree: Mapping[str, Any]) -> Any:
    """A table of probes without the places on this machine that its rows are from.

    Args:
        tree: see `Table.to_json`; `test` names a source, of which the notes may speak as well.
    """
    place = place_of(str(tree.get("test", "")))
    local = "://" not in place and Path(place).exists()
    known = {place: _last_part(place) if local else _reduce(place)} if place else {}
    spoken = {key: tree[key] for key in SPOKEN if key in tree}
    found = {part: _last_part(part) for text in _strings(spoken) for part in LOCAL.findall(text)}
    public = {text: public for text, public in (found | known).items() if text != public}
    return dict(tree) | replace_all(spoken, public)


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _strings(value)


def _reduce(text: str) -> str:
    if "://" in text:
        parts = urlsplit(text)
        if parts.scheme == "file":
            return _last_part(parts.path)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    local = text.startswith(("/", "~", "./", "../", "\\\\")) or PureWindowsPath(text).drive != ""
    return _last_part(text) if local else text


def _last_part(text: str) -> str:
    kind = PureWindowsPath if "\\" in text else PurePosixPath
    return kind(text).name or text
