"""From a recipe to its objective and its loader, checked against each other before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from mmssl import encoders as encoder_room
from mmssl import objectives as objective_room
from mmssl.batch import TEXT_PARTS, Batch
from mmssl.data.columns import find_column
from mmssl.data.loader import Loader
from mmssl.data.sources import open_source
from mmssl.encoders.base import Encoder
from mmssl.errors import DataError, MmsslError, RecipeError, nearest
from mmssl.media.text import Tokenizer
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws
from mmssl.ops.gather import process_share
from mmssl.recipe import Data, Recipe
from mmssl.registry import find

TOKENIZER_TEXTS = 100_000


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
    if training.batch_size % (shares * training.accumulate):
        raise RecipeError(
            f"{where}: training.batch_size {training.batch_size} cannot be cut into {shares} processes x "
            f"{training.accumulate} micro-batches of equal size"
        )
    find("objective", recipe.objective["name"], f"{where}: objective")
    torch.manual_seed(training.seed)
    objective = build_objective(recipe, _tokenizers(recipe, directory, where), where=where)
    if objective.meets != "nowhere" and training.batch_size < 2:
        raise RecipeError(
            f"{where}: training.batch_size = 1: {recipe.objective['name']} compares the rows of a batch and needs 2"
        )
    _check_sources(recipe, objective, where)
    _try_shapes(recipe, objective, where)
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
    # A fusion is built behind the encoders whose widths it is told, and is the last one of a run.
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
    return _located(f"{where}: objective", create)


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


def tokenizers_of(encoders: Mapping[str, Encoder]) -> dict[str, Tokenizer]:
    """Modality -> tokenizer, for those encoders that have one."""
    found = {e.modality: getattr(e, "tokenizer", None) for e in encoders.values()}
    return {modality: value for modality, value in found.items() if isinstance(value, Tokenizer)}


def _tokenizers(recipe: Recipe, directory: Path | None, where: str) -> dict[str, Tokenizer]:
    """Tokenizers that are trained on the data at hand: `tokenizer: train:8000`; kept in the run directory."""
    made: dict[str, Tokenizer] = {}
    for name, arguments in recipe.encoders.items():
        wish = arguments.get("tokenizer")
        if not isinstance(wish, str) or not wish.startswith("train"):
            continue
        size = wish.partition(":")[2] or "8000"
        if not size.isdigit():
            raise RecipeError(f"{where}: encoders.{name}.tokenizer = {wish!r}: expected train:SIZE, such as train:8000")
        folder = directory / "tokenizers" / name if directory else None
        if folder and folder.exists():
            made[name] = Tokenizer.load(folder)
            continue
        # One process trains, so that all have the same one.
        shared: list[Any] = [None]
        if process_share()[0] == 0:
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
        yield from (text for text in islice(source.values(column), TOKENIZER_TEXTS) if isinstance(text, str))
        return
    raise RecipeError(
        f"{where}: no source has a column '{key}' to train a tokenizer on; map it with data.columns.{key}"
    )


def _check_sources(recipe: Recipe, objective: Objective, where: str) -> None:
    sources = recipe.sources()
    for need in objective.needs:
        prefix, _, key = need.rpartition("/")
        if key == "fusion":
            raise RecipeError(f"{where}: objective: a fusion reads two encoders and no data; name an encoder that does")
        if prefix not in sources:
            have = ", ".join(sources) if any(sources) else "one source without a name"
            raise RecipeError(f"{where}: the objective reads the source '{prefix}', and data has {have}")
    for prefix, data in sources.items():
        key = f"{where}: data.{prefix}" if prefix else f"{where}: data"
        needs = {need.rpartition("/")[2] for need in objective.needs if need.rpartition("/")[0] == prefix}
        seconds = data.video.frames / data.video.fps
        if {"audio", "video"} <= needs and abs(data.audio.seconds - seconds) > 1e-6:
            raise RecipeError(
                f"{key}.audio.seconds = {data.audio.seconds:g}: sound and picture are cut from one clip and must last "
                f"equally long; video.frames / video.fps is {seconds:g}"
            )
        for name, encoder in objective.exported.items() if "audio" in needs else ():
            rate = getattr(encoder, "rate", data.audio.rate)
            if rate != data.audio.rate:
                raise RecipeError(
                    f"{key}.audio.rate = {data.audio.rate}: the encoder '{name}' hears {rate} samples a second; "
                    f"set one of them, for instance encoders.{name}.rate"
                )


def _try_shapes(recipe: Recipe, objective: Objective, where: str) -> None:
    """Run the task once on noise of the decoded shapes, so that what cannot work fails here and not at step 1."""
    batch: Batch = {}
    rows = 2
    tokenizers = tokenizers_of(objective.exported)
    for need in objective.needs:
        prefix, _, key = need.rpartition("/")
        batch |= {
            f"{prefix}/{name}" if prefix else name: value
            for name, value in _noise(recipe.sources()[prefix], key, rows, tokenizers).items()
        }
        batch[f"{prefix}/id" if prefix else "id"] = torch.arange(rows)
    objective.eval()
    try:
        with torch.no_grad():
            inputs = objective.transform(batch, Draws(0, 0, rows))
            objective.loss(objective.predict(inputs), inputs)
    except MmsslError as error:
        raise RecipeError(f"{where}: {error}") from error
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, KeyError) as error:
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items())
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RecipeError(f"{where}: {recipe.objective['name']} cannot run on {shapes}: {first}") from error
    finally:
        objective.train()


def _noise(data: Data, key: str, rows: int, tokenizers: Mapping[str, Tokenizer]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if key == "image":
        shape: tuple[int, ...] = (rows, 3, data.image.size, data.image.size)
        return {key: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)}
    if key == "video":
        shape = (rows, data.video.frames, 3, data.video.size, data.video.size)
        return {key: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)}
    if key == "audio":
        samples = round(data.audio.seconds * data.audio.rate)
        audio = torch.rand(rows, samples, generator=generator) * 0.2 - 0.1
        return {key: audio.float(), "audio_mask": torch.ones(rows, samples, dtype=torch.bool)}
    if key == "text":
        size = tokenizers[key].vocab_size if key in tokenizers else 2
        ids = torch.randint(0, size, (rows, data.text.length), generator=generator)
        return {key: ids, "text_mask": torch.ones_like(ids, dtype=torch.bool)}
    if key in TEXT_PARTS:
        tokens = 2 if key == "text_word" else 8
        return {key: (torch.arange(data.text.length) // tokens).repeat(rows, 1)}
    return {}


def _located(where: str, make: Any) -> Any:
    try:
        return make()
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    except (ValueError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise RecipeError(f"{where}: {first}") from error
