"""Tables of probes in a card: as Markdown, and as the metadata (`model-index`) from which the Hub draws its own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mmssl.adaptation.table import BASELESS, NAMES, Row, Table
from mmssl.hub.markdown import cell, code, markdown, one_line
from mmssl.hub.privacy import place_of
from mmssl.shots import shots_in_words, with_rows

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PLACED = {"masks": "image-segmentation", "boxes": "object-detection", "tags": "token-classification"}
READ = ("image", "text", "audio", "video")


def probe_table(table: Table) -> dict[str, Any]:
    """What the templates show of a table; strings of the user's cannot close their place."""
    head, lines = table.cells()
    named = 1 + any(row.part for row in table.rows)  # the first columns hold names, of which some are the user's
    sentence = [table.depth_sentence] if table.depth_sentence else []
    return {
        "title": f"Probe {code(table.probe)}" + (f" of the column {code(table.label)}" if table.label else ""),
        "extent": markdown(table.extent),
        "test": cell(table.test),
        "seeds": len(table.seeds),
        "gain": markdown(table.gain) if len(table.rows) > 1 else "",
        "head": [markdown(name) for name in head],
        "lines": [
            [cell(text) if i < named and text else markdown(text) for i, text in enumerate(line)] for line in lines
        ],
        "notes": [markdown(note) for note in (*sentence, *table.notes, *table.warnings)],
    }


def eval_results(table: Table, modality: str) -> list[EvalResult]:
    """The pretrained network's metrics as the Hub lists them, each next to what the baselines have in the main one.

    Args:
        table: of a probe.
        modality: that its encoder reads; empty for a pair.

    Returns:
        One result a metric and row, of finite values, as shares and not in percent.
    """
    from huggingface_hub import EvalResult

    place, split = place_of(one_line(table.test)), one_line(table.test).partition(", split ")[2].partition(",")[0]
    return [
        EvalResult(
            task_type=task_type(table, modality),
            dataset_type=place if HUB_NAME.fullmatch(place) else re.sub(r"[^\w.-]+", "-", place).strip("-") or "rows",
            dataset_name=one_line(table.test),
            dataset_split=split or None,
            metric_type=name,
            metric_value=round(value, 4),
            metric_name=label,
        )
        for name, value, label in _metrics(table)
        if math.isfinite(value)
    ]


def task_type(table: Table, modality: str) -> str:
    """The Hub's name for what a probe asks."""
    if table.target in PLACED:
        return PLACED[table.target]
    if table.target in ("classes", "labels") and modality in READ:
        return f"{modality}-classification"
    return "image-feature-extraction" if modality == "image" else "feature-extraction"


def _metrics(table: Table) -> Iterator[tuple[str, float, str]]:
    """Metric, value, and what it is of; the first row in all metrics, baselines of the same part in the main one."""
    asked = one_line(f"{table.probe} probe" + (f" of {table.label}" if table.label else ""))
    asked += f", {with_rows(shots_in_words(table.shots, 'shots'), table.drawn)}" if table.shots else ""

    def label(title: str, row: Row) -> str:
        part = f" {one_line(row.part)}" if row.part else ""
        return f"{title} ({asked}, {NAMES.get(row.encoder, one_line(row.encoder))}{part})"

    first = table.rows[0]
    for metric in table.metrics:
        yield metric.name, first.metrics[metric.name], label(metric.title, first)
    for row in table.rows[1:]:
        if row.encoder not in BASELESS and row.part in ("", first.part):
            yield table.main.name, row.metrics[table.main.name], label(table.main.title, row)
