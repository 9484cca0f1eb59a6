"""Options that several verbs of the command line share, and how `KEY=VALUE` is read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mmssl.errors import RecipeError

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or a name on the Hub.")]
Trust = Annotated[bool, typer.Option("--trust", help="Import the objective or encoder of your own that RUN names.")]


def overrides(pairs: list[str] | None) -> dict[str, Any]:
    """Dotted key -> text; raises RecipeError for what is no `KEY=VALUE`."""
    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {pair}: expected KEY=VALUE, such as --set training.steps=200")
        found[key] = value
    return found
