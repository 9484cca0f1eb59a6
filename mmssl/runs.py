"""From a recipe to a run directory, and from a run directory back to encoders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from mmssl import encoders as encoder_room
from mmssl import objectives as objective_room
from mmssl import recipe as recipes
from mmssl.batch import Batch, to_device
from mmssl.data.columns import find_column
from mmssl.data.loader import Loader
from mmssl.data.sources import open_source
from mmssl.encoders.base import Encoder
from mmssl.errors import DataError, MmsslError, RecipeError, RunError
from mmssl.media.text import Tokenizer
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.gather import process_share
from mmssl.recipe import Data, Recipe
from mmssl.registry import find
from mmssl.training import checkpoint
from mmssl.training.loop import fit, start_processes

# Settings that may differ when a run is resumed: they change how, not what, is computed.
FREE_ON_RESUME = {"workers", "log_every", "save_every", "trackers", "accumulate"}
TOKENIZER_TEXTS = 100_000


@dataclass
class Run:
    """A finished or loaded run.

    Attributes:
        directory: holds recipe.yaml, model.safetensors, metrics.jsonl, report.html and figures/.
        recipe: resolved.
        objective: with its heads.
        encoders: name -> encoder with the trained weights.
        step: optimiser steps behind the weights.
        history: the records of metrics.jsonl.
    """

    directory: Path
    recipe: Recipe
    objective: Objective
    encoders: dict[str, Encoder]
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def chance(self) -> Chance:
        """The level of guessing at the recipe's batch size."""
        return self.objective.chance(self.recipe.training.batch_size)

    @property
    def probes(self) -> dict[str, Any] | None:
        """The probe table of probes.json, or None where the recipe asks for none."""
        path = self.directory / "probes.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """Modality -> tokenizer, for those encoders that have one."""
        return tokenizers_of(self.encoders)


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    set: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Run:
    """Pretrain a recipe, probe it and write the run directory.

    Args:
        recipe: a YAML file, its content as a mapping, or a Recipe.
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
    directory = Path(out) if out else Path("runs") / (Path(where).stem if where != "recipe" else "run")
    resume = _prepare(directory, resolved, resume, state.is_main_process)
    state.wait_for_everyone()

    objective, loader = build(resolved, directory, where=where)
    state.wait_for_everyone()
    if state.is_main_process:
        _write(directory / "recipe.yaml", _complete(resolved, objective).dump())
    result = Run(directory, resolved, objective, dict(_encoders_of(objective)))
    last = checkpoint.newest(directory) if resume else None
    complete = last is not None and checkpoint.read_state(last)["step"] == resolved.training.steps
    complete = complete and (directory / "report.html").exists()
    probe = _probe_during(result)
    result.history = fit(
        objective,
        loader,
        resolved.training,
        directory,
        resume=resume,
        probe=probe,
        probe_every=resolved.probe.every if resolved.probe else 0,
        quiet=quiet,
    )
    result.step = resolved.training.steps
    objective.eval()
    if state.is_main_process and not complete:
        _finish(result, loader)
    state.wait_for_everyone()
    return result


def load(path: str | Path, *, trust: bool = False) -> Run:
    """Read a run back: a run directory, a folder made by `push --dry-run`, or a name on the Hub.

    Weights come from model.safetensors alone; nothing is unpickled or executed.

    Args:
        path: directory, or Hub id such as `user/model`.
        trust: let the folder name an objective outside the library, whose code is then imported. Wherever it came
            from: a folder does not say who wrote it.

    Raises:
        RunError: for a folder that is missing, truncated or does not fit its recipe.
    """
    from mmssl.hub.pull import check_folder, download

    directory = Path(path)
    if not directory.is_dir():
        directory = download(str(path))
    check_folder(directory, trust=trust)
    recipe = recipes.load(directory / "recipe.yaml")
    stored = directory / "tokenizers"
    tokenizers = {p.name: Tokenizer.load(p) for p in sorted(stored.iterdir())} if stored.is_dir() else {}
    objective = build_objective(recipe, tokenizers, where=str(directory / "recipe.yaml"), pretrained=False)
    checkpoint.load_weights(objective, directory / checkpoint.WEIGHTS)
    objective.eval()
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    history = [json.loads(line) for line in lines if line.endswith("}")]
    step = history[-1]["step"] if history else recipe.training.steps
    return Run(directory, recipe, objective, dict(_encoders_of(objective)), step, history)


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
    if objective.coupled and training.batch_size < 2:
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
        tokenizers=tokenizers_of(_encoders_of(objective)),
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
    for name, given in recipe.encoders.items():
        arguments = {"modality": name, **given}
        if name in tokenizers:
            arguments["tokenizer"] = tokenizers[name]
        if not pretrained:
            arguments.pop("pretrained", None)
        built[name] = _located(f"{where}: encoders.{name}", partial(encoder_room.create, **arguments))
    hyper = {key: value for key, value in recipe.objective.items() if key != "name"}
    create = partial(objective_room.create, recipe.objective["name"], built, **hyper)
    return _located(f"{where}: objective", create)


def tokenizers_of(encoders: Mapping[str, Encoder]) -> dict[str, Tokenizer]:
    """Modality -> tokenizer, for those encoders that have one."""
    found = {e.modality: getattr(e, "tokenizer", None) for e in encoders.values()}
    return {modality: value for modality, value in found.items() if isinstance(value, Tokenizer)}


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
    changed = [key for key in _differences(before, recipe.model_dump()) if key not in FREE_ON_RESUME]
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
        prefix = need.rpartition("/")[0]
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
        for name, encoder in _encoders_of(objective).items() if "audio" in needs else ():
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
    tokenizers = tokenizers_of(_encoders_of(objective))
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
    return {}


def _probe_during(run: Run) -> Any:
    spec = run.recipe.probe
    if spec is None or spec.every == 0:
        return None
    from mmssl.adaptation import ProbeDuring

    name = spec.encoder or next(iter(run.encoders))
    return ProbeDuring(spec, run.encoders[name], _probe_data(run.recipe))


def _probe_data(recipe: Recipe) -> Data:
    """The probe's source, decoded as the training data is."""
    first = next(iter(recipe.sources().values()))
    if recipe.probe is None or recipe.probe.data is None:
        return first
    return first.model_copy(update={"source": recipe.probe.data})


def _finish(run: Run, loader: Loader) -> None:
    """Probe table, figures and the report of a finished run."""
    from mmssl.report.figures import draw_history, draw_panels
    from mmssl.report.page import write_report

    figures = run.directory / "figures"
    figures.mkdir(exist_ok=True)
    draw_panels(preview(run.objective, loader, seed=run.recipe.training.seed), figures / "preview.png")
    draw_history(run.history, run.chance, figures / "history.png")
    spec = run.recipe.probe
    if spec is not None:
        from mmssl.adaptation import adapt

        name = spec.encoder or next(iter(run.encoders))
        scores = adapt(
            run.encoders[name],
            _probe_data(run.recipe),
            label=spec.label,
            probe=spec.probe,
            groups=spec.groups,
            seed=run.recipe.training.seed,
            limit=spec.limit,
        )
        _write(run.directory / "probes.json", json.dumps(scores.to_json(), indent=1))
    write_report(run)


def _encoders_of(objective: Objective) -> dict[str, Encoder]:
    return {name: objective.encoder(name) for name in objective.encoders}


def _located(where: str, make: Any) -> Any:
    try:
        return make()
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    except (ValueError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise RecipeError(f"{where}: {first}") from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".writing_{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
