"""From a recipe to its encoders, its objective and its loader."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmssl import encoders as encoder_room
from mmssl import objectives as objective_room
from mmssl.data.loader import Loader
from mmssl.data.tokenizers import trained_tokenizers
from mmssl.dry_run import check, check_batch_size
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import tokenizers_of
from mmssl.errors import RecipeError, nearest
from mmssl.media.text import Tokenizer
from mmssl.objectives.base import Objective
from mmssl.ops.gather import process_share
from mmssl.recipe import Recipe
from mmssl.registry import find


def build(recipe: Recipe, directory: Path | None = None, *, where: str = "recipe") -> tuple[Objective, Loader]:
    """The objective and the loader of a recipe, checked against each other before any training.

    Args:
        recipe: resolved.
        directory: where a tokenizer that is trained on the data is kept, and errors are named.
        where: file, for errors.

    Raises:
        RecipeError: for anything in the recipe that cannot work, in one sentence.
        DataError: when the data cannot be read.
    """
    share, shares = process_share()
    training = recipe.training
    check_batch_size(recipe, shares, where)
    find("objective", recipe.objective["name"], f"{where}: objective")
    torch.manual_seed(training.seed)
    objective = build_objective(recipe, trained_tokenizers(recipe, directory, where), where=where)
    check(recipe, objective, where)
    loader = Loader(
        recipe.sources(),
        objective.needs,
        batch_size=training.batch_size,
        seed=training.seed,
        tokenizers=tokenizers_of(objective.exported),
        workers=training.workers,
        share=share,
        shares=shares,
        errors=directory / "errors.jsonl" if directory else None,
    )
    return objective, loader


def build_objective(
    recipe: Recipe, tokenizers: Mapping[str, Tokenizer], *, where: str, pretrained: bool = True
) -> Objective:
    """Encoders and objective of a recipe.

    Args:
        recipe: resolved.
        tokenizers: name of encoder -> tokenizer, in place of what the recipe says of it.
        where: file, for errors.
        pretrained: whether encoders start from the weights that the recipe names; off when weights follow anyway.
    """
    built: dict[str, Encoder] = {}
    # A fusion is built after the encoders whose widths it is told, and is the last one of a run.
    fusions = [name for name, given in recipe.encoders.items() if given.get("modality", name) == "fusion"]
    for name in [*(name for name in recipe.encoders if name not in fusions), *fusions]:
        arguments = {"modality": name, **recipe.encoders[name]}
        if name in fusions:
            arguments["reads"] = _widths(built, arguments.get("reads"), f"{where}: encoders.{name}")
        if name in tokenizers:
            arguments["tokenizer"] = tokenizers[name]
        if not pretrained:
            arguments.pop("pretrained", None)
        built[name] = _located(f"{where}: encoders.{name}", partial(encoder_room.create, **arguments))
    hyper = {key: value for key, value in recipe.objective.items() if key != "name"}
    create = partial(objective_room.create, recipe.objective["name"], built, **hyper)
    objective: Objective = _located(f"{where}: objective", create)
    for encoder in (*built.values(), *objective.exported.values()):
        if encoder.modality != "fusion":
            encoder.decoding = recipe.decoding(objective.needs, encoder.modality)
    return objective


def _widths(built: Mapping[str, Encoder], reads: Any, where: str) -> dict[str, int]:
    """Name -> width of the two encoders that a fusion reads, a and b."""
    readable = [name for name, encoder in built.items() if encoder.modality != "fusion"]
    names = list(reads) if isinstance(reads, list | tuple | Mapping) else []
    if len(names) != 2 or names[0] == names[1] or not all(isinstance(name, str) for name in names):
        example = ", ".join(readable) if len(readable) == 2 else "image, text"
        raise RecipeError(f"{where}: reads = {reads!r} should name two encoders, a and b, as in reads: [{example}]")
    for name in names:
        if name not in readable:
            raise RecipeError(f"{where}: reads '{name}', which is no encoder of the recipe{nearest(name, readable)}")
    return {name: built[name].dim for name in names}


def _located(where: str, make: Any) -> Any:
    try:
        return make()
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    except (ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError) as error:
        first = str(error).strip().partition("\n")[0]
        raise RecipeError(f"{where}: {first}") from error
