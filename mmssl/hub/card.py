"""The model card: what a run is, from its recipe, metrics and probes; nothing is written that was not measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from mmssl import recipe as recipes
from mmssl.adaptation.table import Table
from mmssl.errors import RunError
from mmssl.recipe import Data, Recipe
from mmssl.registry import components
from mmssl.version import __version__

if TYPE_CHECKING:
    from mmssl.encoders.base import Encoder
    from mmssl.run_directory import Run

TEMPLATE = Path(__file__).with_name("card.md.jinja")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
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
    license, license_name = _license(recipe.license)
    data = ModelCardData(
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
        title=markdown(repo.rpartition("/")[2] if repo else run.directory.resolve().name),
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
        probes=[_probe_table(tree) for tree in read_probes(run)],
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


def _probe_table(tree: Mapping[str, Any]) -> dict[str, Any]:
    table = Table.from_json(tree)
    head, lines = table.cells()
    named = 1 + any(row.part for row in table.rows)  # the first columns hold names, of which some are the user's
    return {
        "title": f"A {code(table.probe)} probe" + (f" of the column {code(table.label)}" if table.label else ""),
        "extent": markdown(table.extent),
        "seeds": len(table.seeds),
        "gain": markdown(table.gain) if len(table.rows) > 1 else "",
        "head": [markdown(name) for name in head],
        "lines": [
            [cell(text) if i < named and text else markdown(text) for i, text in enumerate(line)] for line in lines
        ],
        "notes": [markdown(note) for note in (*table.notes, *table.warnings)],
    }


def publishable(recipe: Recipe) -> Recipe:
    """The recipe without what is private: local paths become their last part, URLs lose passwords and queries."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    return recipes.validate(replace_all(tree, private(recipe)), "recipe")


def private(recipe: Recipe) -> dict[str, str]:
    """Strings of the recipe that are not published -> what is put in their place."""
    found = {text: _reduce(text) for text in _strings(recipe.model_dump(mode="json"))}
    places = [source.source for source in recipe.sources().values()]
    places += [probe.data for probe in recipe.every_probe() if probe.data]
    found |= {text: _last_part(text) for text in places if "://" not in text and (Path(text).exists() or "*" in text)}
    return {text: public for text, public in found.items() if text != public}


def replace_all(tree: Any, replacements: Mapping[str, str]) -> Any:
    """The same JSON tree; in every string the keys of `replacements`, longest first, are replaced by their values."""
    if isinstance(tree, Mapping):
        return {key: replace_all(value, replacements) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [replace_all(value, replacements) for value in tree]
    if isinstance(tree, str):
        for text in sorted(replacements, key=len, reverse=True):
            tree = tree.replace(text, replacements[text])
    return tree


def final_metrics(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each metric of the task; not the best one."""
    final: dict[str, float] = {}
    for record in history:
        for key, value in record.items():
            if key not in MACHINE and not key.startswith(APART) and isinstance(value, int | float):
                final[key] = value
    return final


def read_probes(run: Run) -> list[dict[str, Any]]:
    """The tables of probes.json as they are published.

    Raises:
        RunError: where they cannot be read.
    """
    path = run.directory / "probes.json"
    try:
        tables: list[dict[str, Any]] = replace_all(run.probes, private(run.recipe))
        for tree in tables:
            Table.from_json(tree)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path}: not readable: {error}") from error
    return tables


def one_line(text: Any) -> str:
    """Without line breaks and other control characters, which could close YAML or Markdown blocks."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def code(text: Any) -> str:
    """A Markdown code span that its content cannot close."""
    inner = one_line(text)
    ticks = "`" * (_longest_run(inner) + 1)
    pad = " " if inner.startswith("`") or inner.endswith("`") else ""
    return f"{ticks}{pad}{inner}{pad}{ticks}"


def fence(text: str, language: str) -> str:
    """A Markdown code block that its content cannot close."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def cell(text: Any) -> str:
    """A code span that does not end the cell of a table either."""
    return code(text).replace("|", "\\|")


def markdown(text: Any) -> str:
    """One line of plain text, in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", one_line(text))


def number(value: float | None) -> str:
    """Four significant digits; an em dash where there is none."""
    return "—" if value is None else f"{value:.4g}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _license(stated: str | None) -> tuple[str | None, str | None]:
    """`license` and `license_name` of the front matter; a license that the Hub cannot know is `other` with its name."""
    if stated is None:
        return None, None
    name = one_line(stated)
    return (name.lower(), None) if LICENSE_NAME.fullmatch(name.lower()) else ("other", name)


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping | list):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _strings(value)


def _reduce(text: str) -> str:
    if "://" in text:
        parts = urlsplit(text)
        if parts.scheme == "file":
            return _last_part(parts.path)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    local = text.startswith(("/", "~", "./", "../", "\\\\")) or PureWindowsPath(text).drive != ""
    return _last_part(text) if local else text


def _last_part(text: str) -> str:
    kind = PureWindowsPath if "\\" in text else PurePosixPath
    return kind(text).name or text
