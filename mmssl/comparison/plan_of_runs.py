"""A comparison of runs that are there already, as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmssl.comparison.plan import RAW, UNTRAINED, Plan
from mmssl.comparison.tasks import ORDER, common_decoding
from mmssl.data.sources import open_source
from mmssl.errors import RecipeError
from mmssl.hub.load import load
from mmssl.recipe import Data
from mmssl.run_directory import Run


def plan_of_runs(
    runs: Sequence[str], data: Data | None, *, label: str | None, modality: str | None = None, **others: Any
) -> Plan:
    """A comparison of runs that are there: those whose folders differ in a last `-number` are seeds of one line.

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
    return Plan(
        data=decoding.model_dump(mode="json"),
        label=label,
        modality=modality,
        runs=lines,
        baselines=(UNTRAINED, RAW),
        **{**others, "seeds": tuple(range(max(map(len, lines.values())))), "rates": (1.0,)},
    )
