"""From a recipe to its encoders, its objective and its loader."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmssl import encoders as encoder_room
from mmssl import objectives as objective_room
from mmssl import recipe as recipes
from mmssl.data.base import MapSource
from mmssl.data.decoding import cores_to_spare
from mmssl.data.loader import Loader
from mmssl.data.sources import open_source
from mmssl.data.tokenizers import trained_tokenizers
from mmssl.dry_run import check, check_batch_size
from mmssl.encoders import start_in_words, started
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import tokenizers_of
from mmssl.errors import RecipeError, nearest
from mmssl.media.text import Tokenizer
from mmssl.objectives.base import Objective
from mmssl.ops.gather import process_share
from mmssl.recipe import Recipe
from mmssl.registry import find, keywords
from mmssl.training import checkpoint


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
    recipe = counted(recipe, where)
    torch.manual_seed(training.seed)
    starts = _starts(recipe, where)
    tokenizers = trained_tokenizers(recipe, directory, where)
    for name, tokenizer in _tokenizers_of_starts(starts, recipe, tokenizers, where).items():
        tokenizers[name] = tokenizer
        if directory and share == 0:
            tokenizer.save(directory / "tokenizers" / name)
    objective = build_objective(recipe, tokenizers, where=where, starts=starts)
    check(recipe, objective, where)
    loader = Loader(
        recipe.sources(),
        objective.needs,
        batch_size=training.batch_size,
        seed=training.seed,
        tokenizers=tokenizers_of(objective.exported),
        workers=cores_to_spare() if training.workers == "auto" else training.workers,
        share=share,
        shares=shares,
        directory=directory,
    )
    return objective, loader


def counted(recipe: Recipe, where: str = "recipe") -> Recipe:
    """The recipe with the number of rows of its data, where a task keeps something of each row and leaves it out.

    Such a task has a hyper-parameter `rows`; the numbers of its rows are below it.

    Raises:
        RecipeError: for an unknown task, a stream, whose rows have no lasting number, or fewer rows than there are.
        DataError: when the data cannot be read.
    """

    def settled(task: dict[str, Any], key: str) -> dict[str, Any]:
        if isinstance(tasks := task.get("tasks"), dict):
            named = {n: t for n, t in tasks.items() if isinstance(t, dict) and isinstance(t.get("name"), str)}
            return task | {"tasks": tasks | {name: settled(one, f"{key}.tasks.{name}") for name, one in named.items()}}
        name = task["name"]
        data = recipe.sources().get(task.get("data", ""))
        if "rows" not in keywords(find("objective", name, f"{where}: {key}")) or data is None:
            return task
        source = open_source(data)
        if not isinstance(source, MapSource):
            raise RecipeError(
                f"{where}: {key}: {name} keeps a vector of each row, and {data.source} is a stream, whose rows have no "
                "number that lasts; set data.streaming=false"
            )
        rows = task.get("rows") or len(source)
        if isinstance(rows, int) and rows < len(source):
            raise RecipeError(f"{where}: {key}.rows = {rows}: {data.source} has {len(source)} rows; leave it out")
        return task | {"rows": rows}

    return recipe.model_copy(update={"objective": settled(recipe.objective, "objective")})


def build_stored(directory: Path) -> tuple[Recipe, Objective]:
    """Recipe and objective of a run directory, with its weights and tokenizers, in evaluation mode.

    The folder is not checked: see `mmssl.load`, for one that somebody else may have written.
    """
    where = directory / "recipe.yaml"
    recipe = recipes.load(where)
    stored = directory / "tokenizers"
    tokenizers = {p.name: Tokenizer.load(p) for p in sorted(stored.iterdir())} if stored.is_dir() else {}
    objective = build_objective(recipe, tokenizers, where=str(where), pretrained=False)
    checkpoint.load_weights(objective, directory / checkpoint.WEIGHTS)
    return recipe, objective.eval()


def build_objective(
    recipe: Recipe,
    tokenizers: Mapping[str, Tokenizer],
    *,
    where: str,
    pretrained: bool = True,
    starts: Mapping[str, Encoder] | None = None,
) -> Objective:
    """Encoders and objective of a recipe.

    Args:
        recipe: resolved.
        tokenizers: name of encoder -> tokenizer, in place of what the recipe says of it.
        where: file, for errors.
        pretrained: whether encoders start from the weights that the recipe names; off when weights follow anyway.
        starts: name -> encoder of the run directory that the recipe names as `pretrained`.
    """
    starts = starts or {}
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
        create_one = partial(started, starts[name]) if name in starts else encoder_room.create
        built[name] = _located(f"{where}: encoders.{name}", partial(create_one, **arguments))
    hyper = {key: value for key, value in recipe.objective.items() if key != "name"}
    create = partial(objective_room.create, recipe.objective["name"], built, **hyper)
    objective: Objective = _located(f"{where}: objective", create)
    for encoder in (*built.values(), *objective.exported.values()):
        if encoder.modality != "fusion":
            encoder.decoding = encoder.fitting(recipe.decoding(objective.needs, encoder.modality))
    for name, encoder in (*built.items(), *objective.exported.items()):
        start = start_in_words(recipe.encoders[name].get("pretrained"))
        about = {"task": recipe.objective["name"], "started_from": start, "license": recipe.license}
        encoder.origin = {key: value for key, value in about.items() if value is not None}
    return objective


def _starts(recipe: Recipe, where: str) -> dict[str, Encoder]:
    """Name of encoder -> that of the run directory from which it starts, `pretrained: runs/x`."""
    found = {}
    for name, arguments in recipe.encoders.items():
        given = arguments.get("pretrained")
        if not isinstance(given, str) or not os.path.isfile(Path(given) / "recipe.yaml"):
            continue
        _, objective = build_stored(Path(given))
        encoders, modality = objective.exported, arguments.get("modality", name)
        fitting = [name] if name in encoders else [key for key, e in encoders.items() if e.modality == modality]
        if len(fitting) != 1:
            raise RecipeError(
                f"{where}: encoders.{name}.pretrained: {given} has no encoder '{name}'{nearest(name, encoders)}"
            )
        found[name] = encoders[fitting[0]]
    return found


def _tokenizers_of_starts(
    starts: Mapping[str, Encoder], recipe: Recipe, others: Mapping[str, Tokenizer], where: str
) -> dict[str, Tokenizer]:
    """Name of encoder -> tokenizer of the run that it starts from.

    Raises:
        RecipeError: where the recipe asks for another one, whose ids would mean other words.
    """
    found = {}
    for name, start in starts.items():
        tokenizer = getattr(start, "tokenizer", None)
        if tokenizer is None:
            continue
        wish = recipe.encoders[name].get("tokenizer")
        if wish is not None and (others[name] if name in others else Tokenizer.load(wish)) != tokenizer:
            raise RecipeError(
                f"{where}: encoders.{name}: tokenizer = {wish} is not that of the run which it starts from; leave it "
                "out, and the run's is taken"
            )
        found[name] = tokenizer
    return found


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
