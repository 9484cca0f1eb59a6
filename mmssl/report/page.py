"""report.html: one self-contained page that says what a run is and what came out."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, Template, select_autoescape
from PIL import Image

from mmssl.adaptation.table import Table
from mmssl.atomic import write_text
from mmssl.audit.verdict import closing_lines
from mmssl.errors import RunError, without_passwords
from mmssl.media.cell import sentence
from mmssl.registry import components
from mmssl.report.figures import DPI
from mmssl.training.monitors import MONITOR, SAME_ROWS

if TYPE_CHECKING:
    from mmssl.run_directory import Run

MEASURES = {
    "rank": "effective rank",
    "spread": "spread",
    "dead": "dead share",
    "alignment": "alignment",
    "uniformity": "uniformity",
}
NOT_RESULTS = {"step", "lr", "samples_per_second", "data_wait", "peak_memory_gib", "eta", "gradient_norm"}


def write_report(run: Run) -> Path:
    """Write report.html into the run directory, pictures inside; returns its path."""
    page = without_passwords(_template().render(**_facts(run)))
    path = run.directory / "report.html"
    write_text(path, page)
    return path


@cache
def _template() -> Template:
    """Compiled once, for every probe of a run writes its report anew."""
    loader = PackageLoader("mmssl.report", ".")
    return Environment(loader=loader, autoescape=select_autoescape(default=True)).get_template("page.html.jinja")


def _facts(run: Run) -> dict[str, Any]:
    training, last = run.recipe.training, run.history[-1] if run.history else {}
    first = run.history[0] if run.history and run.history[0]["step"] == 0 else {}
    chance = run.chance
    levels = chance.levels
    speeds = [record["samples_per_second"] for record in run.history if "samples_per_second" in record]
    waits = [record["data_wait"] for record in run.history if "data_wait" in record]
    return {
        "name": run.directory.name,
        "objective": run.recipe.objective["name"],
        "question": task.summary if (task := components("objective").get(run.recipe.objective["name"])) else "",
        "sources": sorted({data.source for data in run.recipe.sources().values()}),
        "encoders": [
            {
                "name": name,
                "model": encoder.spec["model"],
                "dim": encoder.dim,
                "parameters": sum(p.numel() for p in encoder.parameters()),
            }
            for name, encoder in run.encoders.items()
        ],
        "steps": run.step,
        "samples": run.step * training.batch_size,
        "batch": training.batch_size,
        "closing": [line[0].upper() + line[1:] for line in closing_lines(run.history, chance, training.batch_size)],
        "results": [
            {
                "name": key,
                "untrained": first.get(key),
                "value": value,
                "again": last.get(f"{SAME_ROWS}/{key}"),
                "chance": levels.get(key),
            }
            for key, value in last.items()
            if key not in NOT_RESULTS and key.partition("/")[0] not in ("probe", MONITOR, SAME_ROWS)
        ],
        "monitors": _monitors(first, last),
        "measures": MEASURES,
        "speed": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "minutes": _seconds(run.history, training.batch_size) / 60,
        "wait": sorted(waits)[len(waits) // 2] if waits else None,
        "memory": last.get("peak_memory_gib"),
        "probes": [_probe(tree) for tree in run.probes],
        "errors": _count_lines(run.directory / "errors.jsonl"),
        "figures": [_figure(path) for path in sorted((run.directory / "figures").glob("*.png"))],
        "recipe": run.recipe.dump(),
        "directory": str(run.directory),
    }


def _monitors(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each network or set of embeddings: pairs of what each measure was at step 0 and at the end."""
    names = dict.fromkeys(key.partition("/")[2].rpartition("/")[0] for key in last if key.startswith(f"{MONITOR}/"))
    return [
        {"name": name, "values": [tuple(r.get(f"{MONITOR}/{name}/{what}") for r in (first, last)) for what in MEASURES]}
        for name in names
    ]


def read_figure(path: Path) -> tuple[bytes, int]:
    """A figure's file, and the width at which its letters have the size of the page's.

    Raises:
        RunError: where it is missing or damaged.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.load()
            return content, round(picture.width * 96 / DPI)
    except Exception as error:  # Pillow's decoders raise anything on damaged bytes.
        what = f"damaged ({sentence(error)})" if path.exists() else "missing"
        raise RunError(f"{path} is {what}; remove report.html, and --resume draws all anew") from error


def _figure(path: Path) -> dict[str, Any]:
    """What the page shows of it, or why it does not."""
    try:
        content, width = read_figure(path)
    except RunError as error:
        return {"name": path.stem, "problem": str(error)}
    return {"name": path.stem, "data": base64.b64encode(content).decode(), "width": width}


def _probe(tree: Mapping[str, Any]) -> dict[str, Any]:
    table = Table.from_json(tree)
    head, lines = table.cells()
    picture = io.BytesIO()
    if table.depth_sentence:
        table.figure(picture)
    return {"table": table, "head": head, "lines": lines, "figure": base64.b64encode(picture.getvalue()).decode()}


def _seconds(history: Sequence[Mapping[str, Any]], rows: int) -> float:
    """Time spent training, from the speed between one record and the next."""
    seconds, before = 0.0, 0
    for record in history:
        if "samples_per_second" in record:
            seconds += (record["step"] - before) * rows / record["samples_per_second"]
            before = record["step"]
    return seconds


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line))
