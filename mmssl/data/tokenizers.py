"""Tokenizers that are trained on the texts of a recipe's own data."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from mmssl.data.columns import as_text, find_column
from mmssl.data.sources import open_source
from mmssl.errors import DataError, RecipeError
from mmssl.media.text import Tokenizer
from mmssl.ops.gather import process_share
from mmssl.recipe import Recipe

TOKENIZER_TEXTS = 100_000
LARGEST = 1_000_000


def trained_tokenizers(recipe: Recipe, directory: Path | None, where: str) -> dict[str, Tokenizer]:
    """Name of encoder -> tokenizer, of those that the recipe has trained on its data: `tokenizer: train:8000`.

    Args:
        recipe: resolved.
        directory: of the run, where they are kept and found again; None keeps none.
        where: file, for errors.

    Raises:
        RecipeError: for a size that is none, or where no source has texts.
        DataError: when the data cannot be read.
    """
    made: dict[str, Tokenizer] = {}
    for name, arguments in recipe.encoders.items():
        wish = arguments.get("tokenizer")
        if not isinstance(wish, str) or not wish.startswith("train"):
            continue
        size = wish.partition(":")[2] or "8000"
        if not size.isdigit() or not 0 < int(size) <= LARGEST:
            raise RecipeError(
                f"{where}: encoders.{name}.tokenizer = {wish!r}: expected train:SIZE of at most {LARGEST}, "
                "such as train:8000"
            )
        folder = directory / "tokenizers" / name if directory else None
        # One process trains or reads it, so that all have the same one.
        shared: list[Any] = [None]
        if process_share()[0] == 0:
            if folder and folder.exists():
                shared[0] = Tokenizer.load(folder)
            else:
                shared[0] = Tokenizer.train(_texts(recipe, arguments.get("modality", name), where), int(size))
                if folder:
                    shared[0].save(folder)
        if process_share()[1] > 1:
            broadcast_object_list(shared)
        made[name] = shared[0]
    return made


def _texts(recipe: Recipe, key: str, where: str) -> Iterable[str]:
    for data in recipe.sources().values():
        source = open_source(data)
        try:
            column = find_column(data, key, source.columns)
        except DataError:
            continue
        others: set[str] = set()
        texts = 0
        for cell in map(as_text, islice(source.values(column), TOKENIZER_TEXTS)):
            if isinstance(cell, str):
                texts += 1
                yield cell
            elif cell is not None:
                others.add(type(cell).__name__)
        if not texts:
            what = f"holds {', '.join(sorted(others))} and no text" if others else "is empty"
            raise DataError(f"{source.name}: column '{column}' {what}, so that no tokenizer can be trained on it")
        return
    raise RecipeError(
        f"{where}: no source has a column '{key}' to train a tokenizer on; map it with data.columns.{key}"
    )
