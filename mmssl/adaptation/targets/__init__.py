"""What a column says about each row: one kind of target a module, found by its name or recognized by its cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmssl import registry
from mmssl.adaptation.targets.base import Target
from mmssl.errors import DataError


def find_target(cells: Sequence[Any], name: str | None, where: str) -> type[Target]:
    """The target of that name, or else the one that recognizes the cells.

    Args:
        cells: those of training and test rows that are not missing.
        name: as `mmssl list` gives it.
        where: source and column, for the error.

    Raises:
        RecipeError: for an unknown name.
        DataError: where no target recognizes the cells.
    """
    if name is not None:
        kind: type[Target] = registry.find("target", name)
        return kind
    if not cells:
        raise DataError(f"{where}: no row has a label")
    for known in registry.components("target"):
        kind = registry.find("target", known)
        if kind.recognizes(cells):
            return kind
    if {type(cell) for cell in cells} == {int, str}:
        raise DataError(
            f"{where} holds names in some rows and whole numbers in others, and which are the same classes "
            "cannot be told; write names in both training and test rows, as strings or as a ClassLabel of `datasets`"
        )
    found = ", ".join(sorted({_kind(cell) for cell in cells}))
    raise DataError(
        f"{where} holds {found}; known targets are names or whole numbers (classes), lists of these (labels), and real "
        "numbers or lists of them (values)"
    )


def _kind(cell: Any) -> str:
    """Its type, and of a list those of what is in it."""
    if not isinstance(cell, list):
        return type(cell).__name__
    inside = sorted({"nothing" if one is None else type(one).__name__ for one in cell})
    return f"lists of {' and '.join(inside)}" if inside else "empty lists"
