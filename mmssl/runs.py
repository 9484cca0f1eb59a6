"""From a recipe to a run directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from torch.distributed.tensor import DTensor

from mmssl import recipe as recipes
from mmssl.adaptation.cache import FeatureCache
from mmssl.adaptation.recipe_probes import check_probes, check_rows, probe_at_end, probes_during
from mmssl.atomic import write_text, writing
from mmssl.batch import to_device
from mmssl.build import build, counted
from mmssl.data.loader import Loader
from mmssl.errors import RunError, without_passwords
from mmssl.hub.load import load
from mmssl.objectives.base import Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.gather import alone
from mmssl.recipe import Recipe, Training
from mmssl.run_directory import FEATURES, Machine, Run, keep_machine
from mmssl.training import checkpoint
from mmssl.training.launch import check_trackers, device_name, start_processes
from mmssl.training.lock import locked
from mmssl.training.loop import fit
from mmssl.training.optim import lr_factor
from mmssl.training.peers import check_alike, ending_together
from mmssl.version import __version__

# Settings that may differ when a run is resumed: they change how, not what, is computed.
FREE_ON_RESUME = {"workers", "log_every", "save_every", "trackers", "accumulate", "checkpointing", "sharded"}
# Settings that may be changed on the way, which is said: what the advice on a diverged run names, and a longer run.
STATED_ON_RESUME = {"steps", "epochs", "clip", "precision", "optimizer.lr"}
DATA = "data.json"
"""In a run directory: number of rows and a hash of every source."""


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    set: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    changed_data: bool = False,
    quiet: bool = False,
) -> Run:
    """Pretrain a recipe, probe it and write the run directory.

    Args:
        recipe: a YAML file, the name of one that comes along, its content as a mapping, or a Recipe.
        set: dotted key -> value, put in place of the recipe's.
        out: the run directory; `runs/<name of the recipe>` by default.
        resume: go on from the last checkpoint in `out`; starts afresh where there is none. A finished run goes on where
            `training.steps` is larger than it was.
        changed_data: resume although the data is not what it was.
        quiet: print nothing.

    Raises:
        RecipeError: before anything is downloaded or trained.
        DataError: when the data cannot be read.
        RunError: where `out` already holds a run and `resume` is not set, or another process writes there.
        Interrupted: after SIGINT, SIGTERM or SIGUSR1, once the state is saved.
    """
    state = start_processes()
    where = str(recipe) if isinstance(recipe, str | Path) else "recipe"
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json", exclude_none=True)
    resolved = recipes.load(recipe, set)
    check_probes(resolved, where)
    directory = Path(out) if out else Path("runs") / (Path(where).stem if where != "recipe" else "run")
    # Of a name that cannot be one, too.
    new = not os.path.exists(directory / "recipe.yaml") and not os.path.exists(directory / "state")
    empty = not os.path.exists(directory)
    with ending_together(), _alone(directory, state), writing(directory):
        try:
            return _run(resolved, directory, where, resume, changed_data, quiet, state)
        except BaseException:
            if new and not (directory / "recipe.yaml").exists() and state.is_main_process:
                shutil.rmtree(directory if empty else directory / "tokenizers", ignore_errors=True)
            raise


def _run(
    resolved: Recipe, directory: Path, where: str, resume: bool, changed_data: bool, quiet: bool, state: PartialState
) -> Run:
    check_alike({"mmssl": __version__} | resolved.model_dump(), "start all of them with the same line")
    resolved = counted(resolved, where)
    resume = _prepare(directory, resolved, resume, quiet or not state.is_main_process)
    last = checkpoint.newest(directory) if resume else None
    check_alike({"checkpoint": last.name if last else "none"}, "--out has to be a folder that all of them see")
    check_trackers(resolved.training)
    objective, loader = build(resolved, directory, where=where)
    resolved = recipes.in_steps(resolved, loader.steps_per_epoch, where)
    digests = loader.digests()
    seen = {f"data{name and '.' + name}": digest for name, digest in digests.items()}
    check_alike(seen, "all of them have to see the same files")
    if resume and not changed_data:
        check_data(directory, digests)
    result = Run(directory, resolved, objective, objective.exported)
    if not resume:
        check_rows(result, resolved.every_probe())
    state.wait_for_everyone()
    if state.is_main_process:
        write_text(directory / DATA, json.dumps(digests, indent=1))
        write_text(directory / "recipe.yaml", _complete(resolved, objective).dump())
        keep_machine(directory, Machine(device_name(state.device), state.num_processes, __version__))
        _say([] if quiet else loader.found())
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
    with torch.no_grad(), alone():
        inputs = objective.transform(few, Draws(seed, 0, min(rows, len(next(iter(few.values())))), device=device))
        panels = objective.preview(inputs, objective.predict(inputs))
    objective.train(was_training)
    return panels


def next_calls(run: Run, recipe: str, own_data: bool) -> list[str]:
    """Lines that say what to call after a run.

    Args:
        run: that has ended.
        recipe: as it was named.
        own_data: whether it ran on another source than the recipe's.
    """
    first, *others = [
        (f"{question}:", f"  mmssl adapt {run.directory} --data {options}") for question, options in _questions(run)
    ]
    more = [line for question, call in others for line in (f"or {question}", call)]
    if own_data:
        return [
            f"\nnext, {first[0]}",
            first[1],
            *more,
            "or what the task sees:",
            f"  mmssl show {run.directory} --out task.png",
        ]
    source = "data.source" if "" in run.recipe.sources() else f"data.{next(iter(run.recipe.sources()))}.source"
    without = f" --set {'probes' if run.recipe.probes else 'probe'}=null" * bool(run.recipe.every_probe())
    return [
        "\nnext, the same on your own folder of files:",
        f"  mmssl run {recipe} --set {source}=path/to/folder{without} --out runs/mine",
        f"or {first[0]}",
        first[1],
        *more,
    ]


def _questions(run: Run) -> Iterator[tuple[str, str]]:
    """What the task has trained for, and the options of `mmssl adapt` that ask for it."""
    encoders = run.objective.exported
    pairs = [{encoders[pair.a].modality, encoders[pair.b].modality} for pair in run.objective.pairs]
    if not pairs:
        yield "what the encoder knows about labeled rows", "path/to/labeled --label label --probe logistic --layers"
    elif {"video", "audio"} in pairs and run.objective.meets == "nowhere":  # told from other moments of the same clip
        yield "by how much sound and picture of a clip are apart", "path/to/clips --probe offset"
    else:
        yield "how well each side of a pair finds the other", "path/to/pairs --probe retrieval"
    if {"video", "audio"} in pairs or {"image", "audio"} in pairs:
        yield "where in the picture its sound comes from", "path/to/boxes --label box --probe localization"


@contextmanager
def _alone(directory: Path, state: PartialState) -> Iterator[None]:
    """The lock of the run directory, which the main process holds for all."""
    with ExitStack() as stack:
        refusal: list[str | None] = [None]
        if state.is_main_process:
            try:
                stack.enter_context(locked(directory))
            except RunError as error:
                refusal = [str(error)]
        if state.num_processes > 1:
            broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise RunError(refusal[0])
        yield


def check_data(directory: Path, digests: Mapping[str, str]) -> None:
    """Raise RunError where the data is not what the run began with."""
    try:
        before = json.loads((directory / DATA).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # a run of an earlier version
    for name, found in digests.items():
        had = before.get(name) if isinstance(before, dict) else None
        if isinstance(had, str) and had != found:
            rows, now = had.partition(",")[0], found.partition(",")[0]
            if rows != now:
                what = f"it has {now} and had {rows}"
            elif "stream" in rows:
                what = "its columns or files are others, or of other sizes"
            else:
                what = f"its {rows} are others, in another order, or of files that have changed"
            raise RunError(
                f"{directory}: cannot resume, data{name and '.' + name} has changed since the run began: {what}; "
                "bring it back, go on with it all the same (--changed-data), or choose another --out"
            )


def _prepare(directory: Path, recipe: Recipe, resume: bool, quiet: bool) -> bool:
    """Check that the run directory is new or may be resumed; whether there is something to resume."""
    stored = directory / "recipe.yaml"
    if not resume and stored.exists():
        raise RunError(f"{directory} already holds a run; add --resume to go on with it, or choose another --out")
    if not stored.exists() and (last := checkpoint.newest(directory)):
        raise RunError(
            f"{directory}: recipe.yaml is missing, and without it {last.name} cannot be gone on from; bring it back, "
            "as a copy or as the recipe that the run was started with, or choose another --out"
        )
    if not resume or not stored.exists():
        shutil.rmtree(directory / "tokenizers", ignore_errors=True)  # of a start that came to nothing
        return False
    started = recipes.load(stored)
    before = started.model_dump()
    for name, given in before["encoders"].items():
        if given.get("pretrained"):  # stored with its whole architecture, of which the recipe names a part
            before["encoders"][name] = {k: v for k, v in given.items() if k in recipe.encoders.get(name, {})}
    free = FREE_ON_RESUME | STATED_ON_RESUME
    differing = list(_differences(before, recipe.model_dump()))
    changed = [key for key in differing if key not in free]
    last = checkpoint.newest(directory)
    done = checkpoint.read_state(last)["step"] if last else 0
    if recipe.training.epochs is None and recipe.training.steps < done:
        changed.append(f"steps, of which {done} are done")
    if changed:
        raise RunError(
            f"{directory}: cannot resume, the recipe differs from the one it was started with in {', '.join(changed)}; "
            "choose another --out to start anew"
        )
    for key in differing:
        if key in STATED_ON_RESUME and not (key == "steps" and recipe.training.epochs):
            was, now = (_at(tree, key) for tree in (before["training"], recipe.training.model_dump()))
            _say([] if quiet else [f"from step {done} on: training.{key} = {now} (was {was})"])
            if key == "steps" and done and not quiet:
                _say([_bend(started.training, recipe.training, done)])
    return True


def _bend(before: Training, now: Training, done: int) -> str:
    """What a longer run does to the learning rate: its schedule is stretched, and not begun anew."""
    last, following = (f"{t.optimizer.lr * lr_factor(t, i):.3g}" for t, i in ((before, done - 1), (now, done)))
    return (
        f"from step {done} on: learning rate {following} (was {last}), as {now.schedule.name} has it over {now.steps}"
    )


def _at(tree: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree[part]
    return tree


def _say(lines: Iterable[str]) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(without_passwords(line), markup=False)


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

    _say(closing_lines(run.history, run.chance, run.recipe.training.batch_size))


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
    with alone():  # the others wait
        for spec in run.recipe.every_probe():
            run.add_probe(probe_at_end(run, spec, seed=run.recipe.training.seed, cache=cache).to_json())
    write_report(run)
