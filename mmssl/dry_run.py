"""A recipe's parts against each other and against the data, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmssl.batch import TEXT_PARTS, Batch
from mmssl.encoders.text import tokenizers_of
from mmssl.errors import MmsslError, RecipeError
from mmssl.media.text import Tokenizer
from mmssl.modules.blocks import counts_batches, learning_blocks
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws
from mmssl.ops.gather import process_share
from mmssl.recipe import Data, Recipe


def check_batch_size(recipe: Recipe, processes: int, where: str) -> None:
    """Raise RecipeError where the global batch cannot be cut into processes and micro-batches of equal size."""
    training = recipe.training
    if training.batch_size % (processes * training.accumulate):
        raise RecipeError(
            f"{where}: training.batch_size {training.batch_size} cannot be cut into {processes} processes x "
            f"{training.accumulate} micro-batches of equal size"
        )


def check(recipe: Recipe, objective: Objective, where: str) -> None:
    """Raise RecipeError for what cannot work: too few rows, a source that is missing, clocks or shapes that differ.

    Args:
        recipe: resolved.
        objective: built from it; runs once, on noise, on all processes together.
        where: file, for errors.
    """
    if objective.meets != "nowhere" and recipe.training.batch_size < 2:
        raise RecipeError(
            f"{where}: training.batch_size = 1: {recipe.objective['name']} compares the rows of a batch and needs 2"
        )
    if recipe.training.checkpointing:
        _check_blocks(objective, recipe.training.compile, where)
    _check_sources(recipe, objective, where)
    _try_shapes(recipe, objective, where)


def _check_blocks(objective: Objective, compiled: bool, where: str) -> None:
    for name in objective.encoders:
        encoder = objective.encoder(name)
        if not encoder.frozen and not learning_blocks(encoder):
            raise RecipeError(
                f"{where}: training.checkpointing: encoders.{name}: {encoder.spec['model']} has no blocks whose "
                "activations could be computed anew; leave it out, and raise training.accumulate instead"
            )
    if compiled and any(counts_batches(block) for block in learning_blocks(objective)):
        raise RecipeError(
            f"{where}: training.checkpointing: torch.compile cannot keep BatchNorm from counting a batch twice; drop "
            "this or training.compile"
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
    rows, (share, shares) = 2, process_share()
    batch = noise(recipe, objective, rows, share)
    objective.eval()
    try:
        with torch.no_grad():
            inputs = objective.transform(batch, Draws(0, 0, rows, share=share, shares=shares))
            objective.loss(objective.predict(inputs), inputs)
    except MmsslError as error:
        raise RecipeError(f"{where}: {error}") from error
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, KeyError) as error:
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items())
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RecipeError(f"{where}: {recipe.objective['name']} cannot run on {shapes}: {first}") from error
    finally:
        objective.train()


def noise(recipe: Recipe, objective: Objective, rows: int, share: int = 0) -> Batch:
    """A batch of noise, of the shapes in which the recipe decodes what the objective needs.

    Args:
        recipe: resolved.
        objective: built from it.
        rows: of this process.
        share: its number.
    """
    batch: Batch = {}
    tokenizers = tokenizers_of(objective.exported)
    for need in objective.needs:
        prefix, _, key = need.rpartition("/")
        batch |= {
            f"{prefix}/{name}" if prefix else name: value
            for name, value in _noise(recipe.sources()[prefix], key, rows, tokenizers).items()
        }
        batch[f"{prefix}/id" if prefix else "id"] = torch.arange(rows) + share * rows
    return batch


def _noise(data: Data, key: str, rows: int, tokenizers: Mapping[str, Tokenizer]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if key == "image":
        shape: tuple[int, ...] = (rows, 3, data.image.size, data.image.size)
        pictures = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        squeezed = {"image_aspect": torch.linspace(0.75, 4 / 3, rows)} if data.image.fit == "squeeze" else {}
        return {key: pictures, **squeezed}
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
