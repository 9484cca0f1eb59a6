"""What is compared: the tasks that rows and encoder allow, all with one budget, one encoder and one way of asking."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import TypeAdapter

from mmssl import recipe as recipes
from mmssl.atomic import write_text
from mmssl.batch import Batch, count_rows, middle_window
from mmssl.build import build
from mmssl.comparison.budget import Budget, encoder_samples, step_seconds
from mmssl.comparison.tasks import (
    KEPT_OF_DATA,
    KEPT_OF_TRAINING,
    ORDER,
    Task,
    common_decoding,
    encoder_arguments,
    encoder_of,
    found_tasks,
    has_column,
    usable_rows,
    usual_encoder,
    with_other_encoder,
)
from mmssl.data.base import MapSource
from mmssl.data.columns import find_column
from mmssl.data.duplicates import across_splits
from mmssl.data.loader import read
from mmssl.data.sources import Source, open_source
from mmssl.encoders import create
from mmssl.encoders.text import tokenizers_of
from mmssl.errors import DataError, MmsslError, RecipeError, RunError
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws
from mmssl.recipe import Data, Recipe
from mmssl.training.lock import one_at_a_time

PLAN = "comparison.json"
UNTRAINED, RAW, SUPERVISED, NAMED = "untrained", "raw input", "supervised", "pretrained"
RATE = 1e-3
"""Peak learning rate of the supervised network, before it is tuned."""


@dataclass(frozen=True)
class Plan:
    """A comparison, as it is kept in its folder.

    Attributes:
        data: rows to train on, and how probes decode them.
        test: rows to be scored on; those of the source itself where None.
        label: column; None where there are no labels, and tasks are ranked without them.
        target: what the labels are; by the column's cells where None.
        groups: column of what no split divides.
        modality: of the encoder that is compared.
        tasks: name -> recipe with everything but seed, rate and probes.
        samples: name -> encoder samples that a row of the task costs.
        budget: of each task, as it was given; of runs that are there that of the supervised network, or empty.
        batch: encoder samples of a step.
        seeds: of every line.
        rates: factors of each recipe's learning rate, of which one is chosen on validation rows.
        probe: that learns from few labels, and its depth.
        shots: labels a class, or a share of all as `1%`, the fewest rows first; none asks with all labels.
        finetune: whether the encoder is tuned on few labels as well.
        audit: whether each task is asked where there is nothing to see.
        limit: rows of training and of test that probes read, each.
        baselines: lines next to the tasks.
        pretrained: encoder of others that is a line as well.
        runs: line -> directories of runs that are there already, a seed each.
        like: of these the one whose network the baselines have; the first where empty.
        notes: what was read differently, and what was left out, a sentence each.
    """

    data: dict[str, Any]
    label: str | None
    modality: str
    test: str | None = None
    target: str | None = None
    groups: str | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, float] = field(default_factory=dict)
    budget: str = ""
    batch: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    probe: str = "logistic"
    shots: tuple[int | str, ...] = (10, 100)
    finetune: bool = False
    audit: bool = True
    limit: int | None = 10000
    baselines: tuple[str, ...] = (UNTRAINED, RAW, SUPERVISED)
    pretrained: dict[str, Any] | None = None
    runs: dict[str, list[str]] = field(default_factory=dict)
    like: str = ""
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> Data:
        """The source and decoding of probes."""
        return Data(**self.data)

    @property
    def lines(self) -> tuple[str, ...]:
        """Of the table: tasks or runs, then baselines."""
        return (*self.tasks, *self.runs, *self.baselines, *([NAMED] if self.pretrained else []))

    @property
    def tuned(self) -> tuple[str, ...]:
        """Lines whose rate is chosen."""
        if self.label is None or len(self.rates) < 2:
            return ()
        return (*self.tasks, *([SUPERVISED] if SUPERVISED in self.baselines else []))

    @property
    def steps(self) -> int:
        """Of the supervised network: the median of the tasks', or the budget of runs."""
        own = sorted(recipe["training"]["steps"] for recipe in self.tasks.values())
        return own[len(own) // 2] if own else Budget.of(self.budget).steps(self.batch, 0.0)

    def write(self, out: Path) -> None:
        """Keep it in `out`; tasks that are new to a comparison that is kept there become lines of it.

        Raises:
            RunError: where another comparison is kept there, or a damaged one.
        """
        out.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(out):  # several may begin together, and steps of minutes differ from one to the other
            self._write(out)

    def _write(self, out: Path) -> None:
        tree = json.loads(json.dumps(asdict(self)))
        path = out / PLAN
        if path.exists():
            stored = self.read(out)
            other, added = json.loads(json.dumps(asdict(stored))), set(self.tasks) - set(stored.tasks)
            if self.budget.startswith("minutes"):  # a step takes another time whenever it is measured
                tree, other = _without_steps(tree), _without_steps(other)
            elif added and set(stored.tasks) < set(self.tasks):
                tree["tasks"] = {name: tree["tasks"][name] for name in stored.tasks}
            differing = [key for key in tree if key not in ("notes", "samples") and other.get(key) != tree[key]]
            if differing:
                unnamed = [name for name in stored.tasks if name not in self.tasks]
                way = f"name {', '.join(unnamed)} as well, or " if differing == ["tasks"] and unnamed else ""
                # Tasks hold the steps, sizes and encoder, and differ with the keys that say these.
                what = min(differing, key=lambda key: key == "tasks")
                if what == "tasks" and set(stored.tasks) == set(self.tasks):
                    what = "recipes or encoders of its tasks"
                raise RunError(f"{out} holds a comparison with other {what}; {way}choose another --out")
            if not added:
                return
            order = [*stored.tasks, *(name for name in self.tasks if name in added)]
            tree = json.loads(json.dumps(asdict(replace(self, tasks={name: self.tasks[name] for name in order}))))
        write_text(path, json.dumps(tree, indent=1))

    @classmethod
    def read(cls, out: Path) -> Self:
        """The one that is kept in `out`.

        Raises:
            RunError: where there is none.
        """
        try:
            return TypeAdapter(cls).validate_json((out / PLAN).read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{out / PLAN} cannot be read: {error}") from error


def make_plan(
    given: Data,
    *,
    label: str | None = None,
    tasks: Sequence[str | Task] | None = None,
    modality: str | None = None,
    encoder: str | Mapping[str, Any] | None = None,
    budget: str = "steps=800",
    size: int | None = None,
    seconds: float | None = None,
    supervised: bool = True,
    **others: Any,
) -> Plan:
    """Choose and build the tasks, and measure what a row of each costs; see `mmssl.compare` for the arguments.

    Raises:
        RecipeError: for a task that does not fit, or where none does.
        DataError: for a source that cannot be read.
    """
    spent = Budget.of(budget)
    source = open_source(given)
    present = [key for key in ORDER if has_column(given, key, source.columns)]
    if not present:
        raise DataError(
            f"{given.source}: no column holds image, text, audio or video; it has: {', '.join(source.columns)}"
        )
    if label is None and "label" in source.columns:
        label = "label"
    named = tasks is not None
    model = encoder_arguments(encoder)
    found = found_tasks(tasks, present, modality, model, given.source)
    modality, fitting = found.modality, found.recipes
    if reserved := {name.replace("_", " ") for name in fitting} & {UNTRAINED, RAW, SUPERVISED, NAMED}:
        raise RecipeError(f"no task can be called {reserved.pop()}, which is a baseline")
    kinds = {part.get("modality", name) for one in fitting.values() for name, part in one.encoders.items()}
    if seconds and "audio" not in kinds:
        raise RecipeError(
            f"seconds = {seconds:g}: no task here hears, they read {', '.join(sorted(kinds))}; leave it out"
        )
    notes = list(found.notes)
    base = model or usual_encoder(fitting.values(), modality)
    seen = "video" if "video" in present and "image" not in present else "image"
    smallest = min(getattr(recipe.data, seen).size for recipe in fitting.values())
    scale = size / smallest if size else 1.0
    batch = others.get("batch", 256)
    trees: dict[str, dict[str, Any]] = {}
    samples: dict[str, float] = {}
    wanted = {name: _tree(recipe, given, modality, base, scale, seconds) for name, recipe in fitting.items()}
    network = create(**{**base, "modality": modality, "pretrained": False}) if modality == "video" else None
    failed: list[MmsslError] = []
    measured: dict[str, tuple[int, float, float]] = {}
    decoding: Data | None = None
    # The window of probes is that of most tasks that are left, which is known when each was tried with that of all.
    while decoding != (common := common_decoding([_data(tree) for tree in wanted.values()], modality, network)):
        decoding = common
        for name, tree in list(wanted.items()):
            try:
                tried = max(1, min(8, usable_rows(source, given, tree)))
                measured[name] = _measured(tree, modality, name, batch, decoding, spent, tried)
            except (RecipeError, DataError) as error:
                if named:
                    raise with_other_encoder(error, name, base, len(fitting)) from error
                failed.append(error)
                notes.append(f"{name.replace('_', ' ')} is left out: {error}")
                del wanted[name]
        if not wanted:
            if all(isinstance(error, DataError) for error in failed):
                raise failed[0]
            raise RecipeError("; ".join(notes))
    rows = {name: usable_rows(source, given, tree) for name, tree in wanted.items()}
    if short := [name for name in wanted if measured[name][0] > rows[name]]:
        batch, name = min((max(1, int(rows[name] * measured[name][1])), name) for name in short)
        raise RecipeError(
            f"{given.source} has {rows[name]} usable rows, and a step of {name} takes {measured[name][0]}; lower batch "
            f"(--batch) to {batch} or less"
        )
    for name, tree in wanted.items():
        own, cost, taken = measured[name]
        steps = spent.steps(batch, taken)
        tree["training"] |= {
            "steps": steps,
            "batch_size": own,
            "log_every": max(1, steps // 50),
            "save_every": max(1, steps // 4),
            "schedule": {"warmup": steps // 20},
        }
        trees[name], samples[name] = tree, round(cost, 4)
    if modality in ("audio", "video"):
        how = getattr(decoding, modality)
        told = f"{how.seconds:g} s" if modality == "audio" else f"{how.frames} frames, {how.fps:g} a second,"
        told = f"{decoding.windows} windows of {told}" if decoding.windows > 1 else told
        kept = "" if seconds and modality == "audio" else "; tasks keep the windows of their recipes"
        notes.append(f"probes read {told} of each row for every line{kept}")
    notes += _shared(given, source, modality)
    if label is None:
        notes.append(
            "there are no labels (--label), so that tasks are ranked by what needs none, and rates are not tuned"
        )
    baselines = (UNTRAINED, RAW, *([SUPERVISED] if supervised and label else []))
    return Plan(
        data=decoding.model_dump(mode="json"),
        label=label,
        modality=modality,
        tasks=trees,
        samples=samples,
        budget=budget,
        baselines=baselines,
        notes=tuple(notes),
        **others,
    )


def _shared(given: Data, source: Source, modality: str) -> list[str]:
    """Rows of the source's own test split that are training rows as well."""
    if modality not in ("image", "text") or given.split != "train" or "test" not in source.splits:
        return []
    splits = {"train": source, "test": open_source(given.model_copy(update={"split": "test"}))}
    whole = {name: one for name, one in splits.items() if isinstance(one, MapSource)}
    return across_splits(whole, find_column(given, modality, source.columns), images=modality == "image")


def _without_steps(tree: dict[str, Any]) -> dict[str, Any]:
    """A plan as JSON, without what follows from the steps of its tasks."""
    counted = ("steps", "log_every", "save_every", "schedule")
    tasks = {
        name: {**task, "training": {key: value for key, value in task["training"].items() if key not in counted}}
        for name, task in tree.get("tasks", {}).items()
    }
    return {**tree, "tasks": tasks}


def _data(tree: Mapping[str, Any]) -> Data:
    return Data.model_validate(tree["data"])


def _tree(
    recipe: Recipe, data: Data, modality: str, encoder: Mapping[str, Any], scale: float, seconds: float | None
) -> dict[str, Any]:
    """The recipe on other rows, with the common encoder and no probe."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    kept = {key: tree["data"][key] for key in KEPT_OF_DATA if key in tree["data"]}
    for key in ("image", "video"):
        kept[key]["size"] = round(kept[key]["size"] * scale)
    if seconds:
        kept["audio"]["seconds"] = seconds
    # What is asked of the rows goes before what the recipe says of them.
    asked = data.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    for key in kept.keys() & asked.keys():
        kept[key] = {**kept[key], **asked.pop(key)} if isinstance(kept[key], dict) else asked.pop(key)
    tree["data"] = {**kept, **asked}
    name = encoder_of(recipe, modality)
    # Built first, of all tasks, so that it starts from the same weights whatever the other side of a pair is.
    tree["encoders"] = {
        name: _read_as(modality, name, encoder),
        **{k: v for k, v in tree["encoders"].items() if k != name},
    }
    tree["training"] = {key: tree["training"][key] for key in KEPT_OF_TRAINING if key in tree["training"]}
    for key in ("probe", "probes"):
        tree.pop(key, None)
    return tree


def _read_as(modality: str, name: str, encoder: Mapping[str, Any]) -> dict[str, Any]:
    """The common encoder's arguments under the name that a task has for it."""
    own = {key: value for key, value in encoder.items() if key != "modality"}
    return own if name == modality else own | {"modality": modality}


def _measured(
    tree: dict[str, Any], modality: str, name: str, batch: int, decoding: Data, budget: Budget, tried: int
) -> tuple[int, float, float]:
    """Rows of a step, encoder samples of a row as probes see it by `tried` rows, and seconds of a step if needed."""
    recipe = recipes.load(tree | {"training": tree["training"] | {"steps": 1}})
    cost = cost_of_row(recipe, modality, decoding, name, tried)
    rows = max(2, round(batch / cost))
    seconds = 0.0
    if budget.unit == "minutes":
        timed = recipes.load(_few(recipe, rows))
        task, source = build(timed, where=name)
        seconds = step_seconds(task, next(source.batches(0, 1)))
    return rows, cost, seconds


def cost_of_row(recipe: Recipe, modality: str, decoding: Data, name: str, tried: int) -> float:
    """Encoder samples of a row of a task, as probes see it; see `encoder_samples`.

    Args:
        recipe: of the task.
        modality: of the encoder that is compared.
        decoding: of probes.
        name: of the task, for errors.
        tried: rows by which it is measured.

    Raises:
        RecipeError: where the task has nothing to learn from the rows.
        DataError: for rows that cannot be read.
    """
    objective, loader = build(recipes.load(_few(recipe, tried)), where=name)
    encoder = objective.encoder(encoder_of(recipe, modality))
    tokenizers = tokenizers_of(objective.exported)
    plain = middle_window(next(iter(read(decoding, (modality,), tokenizers=tokenizers, batch_size=2))))
    samples = list(loader.batches(0, 4))
    if not any(_loss(objective, sample) for sample in samples):  # colors of gray pictures, say
        raise RecipeError("its loss on these rows is 0 before any training: they hold nothing to predict")
    return encoder_samples(objective, encoder, samples[0], plain)


def _few(recipe: Recipe, rows: int) -> dict[str, Any]:
    """The recipe for one step of so many rows, without what a step does not need."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    kept = {key: tree["training"][key] for key in KEPT_OF_TRAINING if key in tree["training"]}
    tree["training"] = {**kept, "batch_size": rows, "workers": 0, "steps": 1}
    return {key: value for key, value in tree.items() if key not in ("probe", "probes")}


@torch.no_grad()
def _loss(objective: Objective, batch: Batch) -> float:
    return float(objective(objective.transform(batch, Draws(0, 0, count_rows(batch))))["loss"])
