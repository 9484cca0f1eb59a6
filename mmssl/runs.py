"""From a recipe to a run directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from mmssl import recipe as recipes
from mmssl.adaptation.cache import FeatureCache
from mmssl.adaptation.recipe_probes import check_probes, probe_at_end, probes_during
from mmssl.atomic import write_text
from mmssl.batch import to_device
from mmssl.build import build
from mmssl.data.loader import Loader
from mmssl.errors import MmsslError, RunError
from mmssl.hub.load import load
from mmssl.objectives.base import Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.recipe import Recipe
from mmssl.run_directory import FEATURES, Run
from mmssl.training import checkpoint
from mmssl.training.launch import check_trackers, start_processes
from mmssl.training.loop import fit

# Settings that may differ when a run is resumed: they change how, not what, is computed.
FREE_ON_RESUME = {"workers", "log_every", "save_every", "trackers", "accumulate"}


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    set: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Run:
    """Pretrain a recipe, probe it and write the run directory.

    Args:
        recipe: a YAML file, the name of one that comes along, its content as a mapping, or a Recipe.
        set: dotted key -> value, put in place of the recipe's.
        out: the run directory; `runs/<name of the recipe>` by default.
        resume: go on from the last checkpoint in `out`; starts afresh where there is none.
        quiet: print nothing.

    Raises:
        RecipeError: before anything is downloaded or trained.
        DataError: when the data cannot be read.
        RunError: where `out` already holds a run and `resume` is not set.
        Interrupted: after SIGINT or SIGTERM, once the state is saved.
    """
    state = start_processes()
    where = str(recipe) if isinstance(recipe, str | Path) else "recipe"
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json", exclude_none=True)
    resolved = recipes.load(recipe, set)
    check_probes(resolved, where)
    directory = Path(out) if out else Path("runs") / (Path(where).stem if where != "recipe" else "run")
    new = not directory.exists()
    resume = _prepare(directory, resolved, resume, state.is_main_process)
    state.wait_for_everyone()
    try:
        check_trackers(resolved.training)
        objective, loader = build(resolved, directory, where=where)
        resolved = recipes.in_steps(resolved, loader.steps_per_epoch, where)
    except MmsslError:
        if new and state.is_main_process:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    state.wait_for_everyone()
    if state.is_main_process:
        write_text(directory / "recipe.yaml", _complete(resolved, objective).dump())
    result = Run(directory, resolved, objective, objective.exported)
    last = checkpoint.newest(directory) if resume else None
    complete = last is not None and checkpoint.read_state(last)["step"] == resolved.training.steps
    complete = complete and (directory / "report.html").exists()
    during = probes_during(result, resolved.every_probe())
    result.history = fit(
        objective,
        loader,
        resolved.training,
        directory,
        resume=resume,
        probe=during[0] if during else None,
        probe_every=during[1] if during else 0,
        quiet=quiet,
    )
    result.step = resolved.training.steps
    if state.is_main_process and not quiet:
        _print_verdict(result)
    objective.eval()
    if any(isinstance(parameter, DTensor) for parameter in objective.parameters()):
        # Sharded weights work on all processes together; what follows is done by one.
        state.wait_for_everyone()
        result = load(directory, trust=True)
        result.objective.to(state.device)
    if state.is_main_process and not complete:
        _finish(result, loader)
    state.wait_for_everyone()
    return result


def preview(objective: Objective, loader: Loader, rows: int = 6, seed: int = 0) -> list[Panel]:
    """The panels of one batch's first rows: what the task feeds the network, the target, the prediction."""
    batch = next(loader.batches(0, 1))
    device = next(objective.parameters()).device
    few = to_device({key: value[:rows] for key, value in batch.items()}, device)
    was_training = objective.training
    objective.eval()
    with torch.no_grad():
        inputs = objective.transform(few, Draws(seed, 0, min(rows, len(next(iter(few.values())))), device=device))
        panels = objective.preview(inputs, objective.predict(inputs))
    objective.train(was_training)
    return panels


def _prepare(directory: Path, recipe: Recipe, resume: bool, main: bool) -> bool:
    """Make the run directory or check that it may be resumed; whether there is something to resume."""
    stored = directory / "recipe.yaml"
    if not resume:
        if stored.exists():
            raise RunError(f"{directory} already holds a run; add --resume to go on with it, or choose another --out")
        if main:
            directory.mkdir(parents=True, exist_ok=True)
        return False
    if not stored.exists():
        if main:
            directory.mkdir(parents=True, exist_ok=True)
        return False
    before = recipes.load(stored).model_dump()
    for name, given in before["encoders"].items():
        if given.get("pretrained"):  # stored with its whole architecture, of which the recipe names a part
            before["encoders"][name] = {k: v for k, v in given.items() if k in recipe.encoders.get(name, {})}
    free = FREE_ON_RESUME | ({"steps"} if recipe.training.epochs else set())  # worked out of the epochs
    changed = [key for key in _differences(before, recipe.model_dump()) if key not in free]
    if changed:
        raise RunError(
            f"{directory}: cannot resume, the recipe differs from the one it was started with in {', '.join(changed)}; "
            "choose another --out to start anew"
        )
    return True


def _complete(recipe: Recipe, objective: Objective) -> Recipe:
    """The recipe with the whole architecture of encoders that started from stored weights, which may have named it."""
    encoders = {
        name: given | {k: v for k, v in objective.encoder(name).spec.items() if k not in ("tokenizer", "pretrained")}
        if given.get("pretrained")
        else given
        for name, given in recipe.encoders.items()
    }
    return recipe.model_copy(update={"encoders": encoders})


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in a.keys() | b.keys():
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from _differences(left, right, "" if key == "training" else f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}"


def _print_verdict(run: Run) -> None:
    from mmssl.audit.verdict import closing_lines  # its distributions take a second to import

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in closing_lines(run.history, run.chance, run.recipe.training.batch_size):
        console.print(line)


def _finish(run: Run, loader: Loader) -> None:
    """Probe table, figures and the report of a finished run."""
    from mmssl.report.figures import draw_conflicts, draw_history, draw_panels
    from mmssl.report.page import write_report

    figures = run.directory / "figures"
    figures.mkdir(exist_ok=True)
    draw_panels(preview(run.objective, loader, seed=run.recipe.training.seed), figures / "preview.png")
    draw_history(run.history, run.chance, figures / "history.png")
    draw_conflicts(run.history, figures / "conflicts.png")
    cache = FeatureCache(run.directory / FEATURES)
    for spec in run.recipe.every_probe():
        run.add_probe(probe_at_end(run, spec, seed=run.recipe.training.seed, cache=cache).to_json())
    write_report(run)
