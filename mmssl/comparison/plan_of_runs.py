"""A comparison of runs that are there already, as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmssl.comparison.plan import RAW, SUPERVISED, UNTRAINED, Plan, cost_of_row
from mmssl.comparison.tasks import ORDER, common_decoding, encoder_of
from mmssl.data.sources import open_source
from mmssl.errors import MmsslError, RecipeError
from mmssl.hub.load import load
from mmssl.recipe import Data
from mmssl.run_directory import Run

TRIED = 8
"""Rows by which it is measured how often a task puts one through the encoder."""


class Spent(NamedTuple):
    """The budget that a run had: optimizer steps, and encoder samples of each."""

    steps: int
    batch: int

    def __str__(self) -> str:
        return f"{self.steps:,} steps of {self.batch:,} encoder samples"


def plan_of_runs(
    runs: Sequence[str],
    data: Data | None,
    *,
    label: str | None,
    modality: str | None = None,
    supervised: bool = True,
    **others: Any,
) -> Plan:
    """A comparison of runs that are there: those whose folders differ in a last `-number` are seeds of one line.

    Baselines have the network of most runs, and the supervised one their most common budget.

    Raises:
        RunError: for a run that cannot be read.
        RecipeError: where their encoders do not read the same kind of input.
    """
    lines: dict[str, list[str]] = {}
    loaded: dict[str, Run] = {}
    for directory in runs:
        name = Path(directory).name
        stem, _, seed = name.rpartition("-")
        lines.setdefault(stem if stem and seed.isdigit() else name, []).append(directory)
        loaded[directory] = load(directory)
    kinds = [{encoder.modality for encoder in run.encoders.values()} for run in loaded.values()]
    shared = [key for key in ORDER if all(key in own for own in kinds) and modality in (None, key)]
    if not shared:
        every = ", ".join(sorted(set().union(*kinds)))
        raise RecipeError(f"the runs' encoders read {every}; compare those of one kind")
    modality = shared[0]
    decodings = [run.decoding(modality) for run in loaded.values()]
    network = next(one for run in loaded.values() for one in run.encoders.values() if one.modality == modality)
    decoding = common_decoding(decodings, modality, network) if modality in ("audio", "video") else decodings[0]
    if data is not None:
        given = data.model_dump(mode="json", include={"source", "split", "config", "columns", "limit"})
        decoding = decoding.model_copy(update=given)
    if label is None:
        label = "label" if "label" in open_source(decoding).columns else None
    first = {line: loaded[own[0]] for line, own in lines.items()}
    like, notes = _like(first, modality)
    known: dict[str, Any] = {"baselines": (UNTRAINED, RAW), "rates": (1.0,)}
    if supervised and label is not None:
        spent, samples, told = _spent(first, modality, decoding)
        known = {"baselines": (UNTRAINED, RAW, SUPERVISED), "budget": f"steps={spent.steps}", "batch": spent.batch}
        known["samples"] = samples
        notes += told
    return Plan(
        data=decoding.model_dump(mode="json"),
        label=label,
        modality=modality,
        runs=lines,
        like="" if like == next(iter(lines)) else lines[like][0],
        notes=tuple(notes),
        **{**others, **known, "seeds": tuple(range(max(map(len, lines.values()))))},
    )


def _like(runs: Mapping[str, Run], modality: str) -> tuple[str, list[str]]:
    """The first line with the network that most have, and which others have another."""
    networks = {line: run.recipe.encoders[encoder_of(run.recipe, modality)] for line, run in runs.items()}
    own = [{key: value for key, value in one.items() if key != "modality"} for one in networks.values()]
    common = max(own, key=own.count)
    others = [line for line, one in zip(networks, own, strict=True) if one != common]
    note = f"baselines have the network {common['model']} of most runs, and {', '.join(others)} another"
    return next(line for line in networks if line not in others), [note] if others else []


def _spent(runs: Mapping[str, Run], modality: str, decoding: Data) -> tuple[Spent, dict[str, float], list[str]]:
    """The most common budget, encoder samples that a row of each line cost where that can be measured, and notes."""
    samples: dict[str, float] = {}
    found: dict[str, Spent] = {}
    notes: list[str] = []
    for line, run in runs.items():
        training = run.recipe.training
        try:
            samples[line] = round(cost_of_row(run.recipe, modality, decoding, line, TRIED), 4)
        except MmsslError as error:
            notes.append(f"a row of {line} is counted as one encoder sample, for its own cannot be read: {error}")
        found[line] = Spent(training.steps, max(1, round(training.batch_size * samples.get(line, 1.0))))
    ((common, _),) = Counter(found.values()).most_common(1)
    others = [f"{line} had {one}" for line, one in found.items() if one != common]
    most = "the runs" if not others else "most runs" if len(others) < len(found) - 1 else "the first run"
    told = f"the supervised network learned in {common}, as {most} did{'; ' * bool(others)}{', '.join(others)}"
    return common, samples, [told, *notes]
