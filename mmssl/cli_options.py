"""Options that several verbs of the command line share, and how `KEY=VALUE` is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from mmssl.errors import RecipeError

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or a name on the Hub.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Which column holds what is read: columns.image=img."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Import the objective or encoder of your own that RUN names.")]


def overrides(pairs: list[str] | None, under: str = "") -> dict[str, str]:
    """Dotted key -> text; raises RecipeError for what is no `KEY=VALUE`.

    Args:
        pairs: as they were written.
        under: what a key may begin with or not, for instance `data.` of the keys of a data section.
    """
    found: dict[str, str] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {pair}: expected KEY=VALUE, such as --set training.steps=200")
        found[key.removeprefix(under)] = value
    return found


def columns_in(found: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Of dotted keys those of `columns`, by the batch key, and the others."""
    named = {key: value for key, value in found.items() if key.startswith("columns.")}
    others = {key: value for key, value in found.items() if key not in named}
    return {key.removeprefix("columns."): value for key, value in named.items()}, others


def only_columns(pairs: list[str] | None) -> dict[str, str]:
    """Batch key -> column; raises RecipeError for any other key."""
    columns, others = columns_in(overrides(pairs, "data."))
    if others:
        raise RecipeError(f"--set {next(iter(others))}: expected columns.KEY=COLUMN, such as --set columns.image=img")
    return columns
