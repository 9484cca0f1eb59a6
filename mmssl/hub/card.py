"""The model card: what a run is, from its recipe, metrics and probes; nothing is written that was not measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mmssl.adaptation.table import Table
from mmssl.errors import RunError
from mmssl.hub.markdown import cell, code, fence, markdown, number, one_line
from mmssl.hub.privacy import private, public_table, publishable, replace_all
from mmssl.hub.scores import HUB_NAME, eval_results, probe_table
from mmssl.recipe import Data
from mmssl.registry import components
from mmssl.version import __version__

if TYPE_CHECKING:
    from mmssl.encoders.base import Encoder
    from mmssl.run_directory import Machine, Run

TEMPLATE = Path(__file__).with_name("card.md.jinja")
LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
# Entries of a record of metrics.jsonl that say how the machine fared and not how the task did.
MACHINE = {"step", "lr", "gradient_norm", "samples_per_second", "data_wait", "peak_memory_gib", "eta"}
APART = ("probe/", "monitor/", "same_rows/")  # of which the card has tables of its own, or which are for the figure


def model_card(run: Run, repo: str | None = None) -> str:
    """README.md of a run, with YAML front matter.

    Args:
        run: finished or not; the card says how many steps were done.
        repo: `user/name` on the Hub, for the lines that load it; a placeholder where left out.

    Returns:
        Markdown. Strings of the user's are put in code spans and fences that they cannot close.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from mmssl.audit.verdict import closing_lines
    from mmssl.hub.export import plan

    recipe = publishable(run.recipe)
    name, training = recipe.objective["name"], recipe.training
    task = components("objective").get(name)
    sources = recipe.sources()
    modalities = list(dict.fromkeys(e.modality for e in run.encoders.values() if e.modality != "fusion"))
    license, license_name = license_of(recipe.license)
    title = one_line(repo.rpartition("/")[2] if repo else run.directory.resolve().name)
    tables = [Table.from_json(tree) for tree in read_probes(run)]
    scores = [
        result
        for table in tables
        for result in eval_results(table, getattr(run.encoders.get(table.encoder), "modality", ""))
    ]
    data = ModelCardData(
        model_name=title if scores else None,
        eval_results=scores or None,
        library_name="mmssl",
        license=license,
        license_name=license_name,
        tags=list(dict.fromkeys(["self-supervised-learning", "pretext-task", one_line(name), *modalities])),
        datasets=[source.source for source in sources.values() if HUB_NAME.fullmatch(source.source)] or None,
    )
    chance = run.objective.chance(training.batch_size)
    levels = chance.levels
    final = final_metrics(run.history)
    folder = repo.rpartition("/")[2] if repo else "NAME"
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=markdown(title),
        repo=repo or "USER/NAME",
        version=__version__,
        modalities=" and ".join(modalities).capitalize(),
        task=code(name),
        family=task.family or "several tasks" if task else "from outside mmssl",
        summary=task.summary if task else "see its own documentation.",
        encoders=[_encoder_row(key, encoder, recipe.encoders[key]) for key, encoder in run.encoders.items()],
        sources=[_source_line(key, source) for key, source in sources.items()],
        training=training,
        steps=f"{run.step:,}",
        samples=f"{run.step * training.batch_size:,}",
        closing=[
            markdown(line[0].upper() + line[1:]) for line in closing_lines(run.history, chance, training.batch_size)
        ],
        metrics=[
            [code(key), number(final.get(key)), number(levels.get(key))] for key in dict.fromkeys([*levels, *final])
        ],
        cost=cost(run.history, training.batch_size, run.machines),
        audit=_audit(run),
        probes=[probe_table(table) for table in tables],
        folder=folder,
        first=repr(next(iter(run.encoders))),
        spaces=[(code(pair.a), code(pair.b)) for pair in run.objective.pairs if pair.project is not None],
        natives=[(n.directory, n.loading(f"{folder}/native/{n.directory}")) for n in plan(run)],
        recipe=fence(recipe.dump(), "yaml"),
        license=code(recipe.license) if recipe.license else "Not stated.",
    )
    return str(card.content)


def _encoder_row(name: str, encoder: Encoder, arguments: Mapping[str, Any]) -> list[str]:
    start = arguments.get("pretrained")
    return [
        code(name),
        encoder.modality,
        code(arguments["model"]),
        cell(start) if start else "random weights",
        f"{sum(parameter.numel() for parameter in encoder.parameters()):,}",
        str(encoder.dim),
    ]


def _source_line(name: str, source: Data) -> str:
    parts = [code(source.source), f"split {code(source.split)}"]
    if source.config:
        parts.append(f"configuration {code(source.config)}")
    if source.limit:
        parts.append(f"its first {source.limit:,} rows")
    return (f"{code(name)}: " if name else "") + ", ".join(parts)


def cost(history: Iterable[Mapping[str, Any]], batch_size: int, machines: Iterable[Machine]) -> str:
    """Time, speed, memory and machine of a training, as far as its records say them.

    Args:
        history: records of metrics.jsonl.
        batch_size: rows of a step.
        machines: see `Run.machines`.
    """
    rates, seconds, memory, before = [], 0.0, 0.0, 0
    for record in history:
        rate = record.get("samples_per_second", 0)
        if rate > 0:
            seconds += (record["step"] - before) * batch_size / rate
            rates.append(rate)
        memory = max(memory, record.get("peak_memory_gib", 0))
        before = record["step"]
    if not rates:
        return "not recorded"
    unit, name = next((one for one in ((3600, "h"), (60, "min")) if seconds >= 2 * one[0]), (1, "s"))
    speed = f"{median(rates):.0f} samples a second, {memory:.1f} GiB of memory a process at most"
    places = dict.fromkeys(f"{one.processes} process(es) on {markdown(one.device)}" for one in machines)
    return f"{seconds / unit:.3g} {name} of training, {speed}" + (f"; {', then '.join(places)}" if places else "")


def _audit(run: Run) -> dict[str, str] | None:
    """What `mmssl audit` said of the run; None where it was not asked."""
    found = run.audit
    return None if found is None else {"verdict": markdown(found.verdict), "text": fence(found.text, "text")}


def final_metrics(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each metric of the task; not the best one."""
    final: dict[str, float] = {}
    for record in history:
        for key, value in record.items():
            if key not in MACHINE and not key.startswith(APART) and isinstance(value, int | float):
                final[key] = value
    return final


def license_of(stated: str | None) -> tuple[str | None, str | None]:
    """`license` and `license_name` of the front matter; a license that the Hub cannot know is `other` with its name."""
    if stated is None:
        return None, None
    name = one_line(stated)
    return (name.lower(), None) if LICENSE_NAME.fullmatch(name.lower()) else ("other", name)


def read_probes(run: Run) -> list[dict[str, Any]]:
    """The tables of probes.json as they are published.

    Raises:
        RunError: where they cannot be read.
    """
    path = run.directory / "probes.json"
    try:
        named: list[dict[str, Any]] = replace_all(run.probes, private(run.recipe))
        tables = [public_table(tree) for tree in named]
        for tree in tables:
            Table.from_json(tree)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path}: not readable: {error}") from error
    return tables
