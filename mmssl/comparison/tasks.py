"""Which tasks a comparison takes: those with a recipe for own files that rows and encoder allow."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import Field, field_validator

from mmssl import recipe as recipes
from mmssl.catalog import recipe_files
from mmssl.data.base import MapSource
from mmssl.data.columns import find_column
from mmssl.data.sources import Source
from mmssl.encoders.base import Encoder
from mmssl.encoders.video import VideoEncoder
from mmssl.errors import DataError, MmsslError, RecipeError
from mmssl.recipe import Data, Recipe
from mmssl.schema import Section

OWN_FILES = ("_folder", "_files", "_pairs")
"""Ends of the names of recipes for a user's own files, of which a comparison takes those that fit."""
KEPT_OF_DATA = ("image", "text", "audio", "video", "start")
KEPT_OF_TRAINING = ("optimizer", "precision", "clip")
"""What a task keeps of its own recipe; all else of these sections is the comparison's."""
ORDER = ("image", "video", "audio", "text")
"""Of rows that hold several, the first is compared: what is seen before what is heard, and both before their words."""


class Task(Section):
    """What is compared, where it is more than a name.

    Attributes:
        recipe: name of a task or recipe, or a file.
        name: in the table; that of the recipe where left out.
        set: dotted key of the recipe -> value, as of `mmssl.run`.
    """

    recipe: Annotated[str, Field(min_length=1)]
    name: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _names_folders(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\w[\w.-]*", value):
            raise ValueError("names folders; use letters, digits, _ and -")
        return value


class Tasks(NamedTuple):
    """What is compared.

    Attributes:
        modality: of the encoder.
        recipes: name in the table -> recipe.
        notes: what is another than that of its recipe, a sentence each.
    """

    modality: str
    recipes: dict[str, Recipe]
    notes: tuple[str, ...] = ()


def found_tasks(
    tasks: Sequence[str | Task] | None,
    present: Sequence[str],
    modality: str | None,
    model: Mapping[str, Any] | None,
    source: str,
) -> Tasks:
    """Those that are named, or else all with a recipe for own files, which fit the rows.

    A task that has recipes for several kinds of rows (`simclr`: of pictures, sounds and clips) may be named by its own
    name; the table calls it by that of its recipe, such as `simclr_video`.

    Args:
        tasks: names of tasks or recipes, or these with changes; None for all.
        present: what the rows hold, in the order of `ORDER`.
        modality: of the encoder that is compared; None for the encoder's, or the first that rows and a task have.
        model: arguments of the encoder, which may name its modality.
        source: for errors.

    Raises:
        RecipeError: for a task that does not fit, or where none does.
    """
    own = {path.stem: path for path in recipe_files() if path.stem.endswith(OWN_FILES)}
    short = {stem.rpartition("_")[0]: path for stem, path in own.items()}
    wish = modality or (str(model["modality"]) if model and "modality" in model else None)
    if wish is not None and wish not in present:
        raise RecipeError(f"modality = {wish}: {source} has {', '.join(present)}")
    order = [wish] if wish else list(present)
    if tasks is None:
        found = {name: recipes.load(path) for name, path in short.items()}
        for key in order:
            fitting = {name: recipe for name, recipe in found.items() if _fits(recipe, present, [key])}
            if fitting:
                return Tasks(key, fitting)
        raise RecipeError(f"no task for own files reads {' or '.join(order)} of {source}; name some with --tasks")
    named: dict[str, Recipe] = {}
    changed: dict[str, Task] = {}
    for task in (Task(recipe=one) if isinstance(one, str) else one for one in tasks):
        stem = Path(task.recipe).stem
        choices = [stem, *(f"{stem}_{key}" for key in order)] if task.recipe == stem else []
        loaded = {name: recipes.load(short[name]) for name in choices if name in short}
        found_as = next((name for name, recipe in loaded.items() if _fits(recipe, present, order)), stem)
        name = task.name or found_as
        if name in named:
            raise RecipeError(
                f"two of the tasks are called {name}; name one of them, in a file or from Python: "
                f"{{recipe: {task.recipe}, name: another}}"
            )
        named[name] = loaded[found_as] if found_as in loaded else recipes.load(task.recipe)
        if task.set or task.name:
            changed[name] = task.model_copy(
                update={"recipe": str(short[found_as] if found_as in loaded else task.recipe)}
            )
    common = [key for key in order if all(key in reads(recipe) for recipe in named.values())]
    for name, recipe in named.items():
        if not _fits(recipe, present, order):
            needs = ", ".join(sorted(reads(recipe)))
            raise RecipeError(f"{name} reads {needs}, and {source} has {', '.join(present)}")
    if not common:
        each = "; ".join(f"{name} reads {', '.join(sorted(reads(recipe)))}" for name, recipe in named.items())
        raise RecipeError(f"the tasks have no kind of encoder in common, which could be compared: {each}")
    for name, task in changed.items():
        _check_changes(name, task, encoder_of(named[name], common[0]))
        named[name] = recipes.load(task.recipe, task.set)
    return Tasks(common[0], named, tuple(_told(name, task) for name, task in changed.items()))


def _check_changes(name: str, task: Task, encoder: str) -> None:
    """Raise RecipeError for a key of a task's recipe that the comparison decides for all of them."""
    for key in task.set:
        section, _, rest = key.partition(".")
        first = rest.partition(".")[0]
        if section == "encoders" and first in ("", encoder):
            way = "all tasks have one encoder (encoder)"
        elif section == "training" and first not in KEPT_OF_TRAINING:
            way = "all tasks have one budget (budget, batch, seeds)"
        elif section in ("probe", "probes") or (section == "data" and first not in KEPT_OF_DATA):
            way = "all tasks learn from the same rows, and are asked alike (data, label, probe, shots)"
        else:
            continue
        raise RecipeError(f"{name}: {key} cannot be set for one task of a comparison; {way}")


def _told(name: str, task: Task) -> str:
    changes = ", ".join(f"{key} = {value}" for key, value in task.set.items())
    return f"{name.replace('_', ' ')}: recipe {Path(task.recipe).stem}{f' with {changes}' * bool(changes)}"


def _fits(recipe: Recipe, present: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether its encoders read what is there, of one source, and something that is wanted."""
    read = reads(recipe)
    return read <= set(present) and bool(read & set(wanted)) and len(recipe.sources()) == 1


def reads(recipe: Recipe) -> set[str]:
    """Modalities of its encoders."""
    kinds = {str(arguments.get("modality", name)) for name, arguments in recipe.encoders.items()}
    return kinds - {"fusion"}


def encoder_of(recipe: Recipe, modality: str) -> str:
    """Name of the encoder that reads this modality."""
    return next(name for name, arguments in recipe.encoders.items() if arguments.get("modality", name) == modality)


def encoder_arguments(encoder: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The arguments of `mmssl.encoder`, from a name or a mapping, which may be written as YAML."""
    if isinstance(encoder, str):
        encoder = yaml.safe_load(encoder) if encoder.lstrip().startswith("{") else {"model": encoder}
    if encoder is None:
        return None
    if not isinstance(encoder.get("model"), str):
        raise RecipeError(f"encoder = {dict(encoder)} needs a model, as in {{model: timm/resnet18}}")
    return dict(encoder)


def has_column(spec: Data, key: str, columns: Sequence[str]) -> bool:
    """Whether rows hold this modality."""
    try:
        find_column(spec, key, columns)
    except DataError:
        return False
    return True


def usual_encoder(found: Iterable[Recipe], modality: str) -> dict[str, Any]:
    """Arguments of the encoder that most recipes have for a modality; of equals the first."""
    every = [recipe.encoders[encoder_of(recipe, modality)] for recipe in found]
    return max(every, key=every.count)


def with_other_encoder(error: MmsslError, task: str, encoder: Mapping[str, Any], tasks: int) -> MmsslError:
    """Why one of several tasks cannot be compared, and what else would do: all of them have one encoder."""
    if not isinstance(error, RecipeError) or tasks < 2:
        return error
    return RecipeError(
        f"{error}. All tasks of a comparison have one encoder, here {encoder['model']}: name another (--encoder), or "
        f"leave {task} out of --tasks"
    )


def common_decoding(sources: Sequence[Data], modality: str, encoder: Encoder | None = None) -> Data:
    """How probes decode rows for every line: pictures at the smallest size, sounds and clips as most tasks do.

    A task keeps the window and the frame rate of its recipe, which are its own; the features of all are read from the
    same input. Of windows that as many tasks have the shortest is taken.

    Args:
        sources: of the tasks, as they train.
        modality: of the encoder that is compared.
        encoder: of clips; where it is built for a number of frames, they are as many.
    """
    frames = encoder.built_for().get("frames") if isinstance(encoder, VideoEncoder) else None
    fitting = [one for one in sources if one.video.frames == frames] or list(sources)

    def window(one: Data) -> tuple[float, float]:
        if modality == "video":
            return one.video.frames, one.video.fps
        return (one.audio.seconds, one.audio.rate) if modality == "audio" else (0, 0)

    counts = Counter(map(window, fitting))
    chosen = min(counts, key=lambda own: (-counts[own], own))
    first = next(one for one in fitting if window(one) == chosen).for_probes
    sizes = {key: min(getattr(one, key).size for one in sources) for key in ("image", "video")}
    return first.model_copy(
        update={key: getattr(first, key).model_copy(update={"size": size}) for key, size in sizes.items()}
    )


def usable_rows(source: Source, given: Data, tree: Mapping[str, Any]) -> int:
    """Rows that lack nothing which a task reads; of a stream, whose end only reading tells, as many as there may be.

    Args:
        source: of `given`.
        given: rows to train on.
        tree: the task's recipe.
    """
    if not isinstance(source, MapSource):
        return sys.maxsize
    read = {part.get("modality", name) for name, part in tree["encoders"].items()} - {"fusion"}
    known = [key for key in sorted(read) if has_column(given, key, source.columns)]
    return len(source.present([find_column(given, key, source.columns) for key in known]))
