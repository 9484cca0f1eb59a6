"""The audits of the tasks of table 1 of docs/results.md, cell by cell: what is in scripts/audited.json is kept.

    MMSSL_DATA=path/to/data python scripts/audited.py                    what is missing, then the table
    MMSSL_DATA=path/to/data python scripts/audited.py rotation,simclr    of these tasks alone
    python scripts/audited.py --table                                    only the table, into docs/results.md

A cell is `mmssl audit` of the recipe that `scripts/compared.py fashion_cnn` trains, with fewer steps and rows. It takes
a quarter of a minute to two minutes of one CPU core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from compared import COMPARISONS
from tables import fill_cells, read_cells, write_tables

CELLS = Path(__file__).resolve().with_suffix(".json")
STEPS, ROWS = 100, 256
TASKS = (
    *("rotation", "relative_position", "jigsaw", "inpainting", "autoencoder"),
    *("simclr", "moco", "byol", "simsiam", "nnclr", "vicreg", "barlow_twins", "swav", "dino", "lejepa", "deepcluster"),
    *("densecl", "instance_discrimination"),
)
NULLS = {
    "constant": "one color",
    "natural": "1/f² noise",
    "phases": "own pictures, random phases",
    "white": "white noise",
}


def measure(task: str) -> dict[str, Any]:
    """What the audit of a task of the comparison says."""
    import torch

    from mmssl import recipe as recipes
    from mmssl.audit.own_files import audit_recipe, verdict_of
    from mmssl.comparison.plan import make_plan
    from mmssl.recipe import Data

    torch.set_num_threads(1)
    asked = COMPARISONS["fashion_cnn"]
    same = {key: asked[key] for key in ("encoder", "size", "label")}
    plan = make_plan(Data(source=asked["data"]), tasks=[task], budget="steps=1", supervised=False, **same)
    found = audit_recipe(recipes.load(plan.tasks[task]), steps=STEPS, rows=ROWS)
    return {
        "verdict": found.verdict,
        "arms": [
            {
                "null": NULLS.get(one.arm.null, one.arm.null),
                "control": one.arm.is_control,
                "verdict": verdict_of(one),
                **{key: getattr(one, key) for key in ("accuracy", "high", "chance")},
            }
            for one in found.findings
        ],
        "edges": None if found.edges is None else [found.edges.verdict, found.edges.accuracy, found.edges.chance],
        "gradients": [[leak.what, leak.verdict] for leak in found.leaks],
        "notes": found.notes,
    }


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown, a line a task."""
    lines = [
        "| task | data without structure | right there (chance) | controls | edges | gradients | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        if task not in cells:
            continue
        cell = cells[task]
        arms = [one for one in cell["arms"] if not one["control"]]
        controls = [one for one in cell["arms"] if one["control"]]
        names = ", ".join(dict.fromkeys(one["null"] for one in arms)) or "; ".join(cell["notes"])
        most = max(arms, key=lambda one: one["accuracy"], default=None)
        right = f"{most['accuracy']:.1%}, up to {most['high']:.1%} ({most['chance']:.1%})" if most else ""
        found = sum(one["verdict"] == "control found" for one in controls)
        power = f"{found} of {len(controls)} found" if controls else ""
        if controls:
            low, high = min(one["accuracy"] for one in controls), max(one["accuracy"] for one in controls)
            power += f", {low:.1%} to {high:.1%}" if high > low else f", {high:.1%}"
        edges = "" if cell["edges"] is None else f"{cell['edges'][0]}, {cell['edges'][1]:.1%}"
        exact = ", ".join(f"{what}: {verdict}" for what, verdict in cell["gradients"])
        lines.append(f"| `{task}` | {names} | {right} | {power} | {edges} | {exact} | {cell['verdict']} |")
    return "\n".join(line.replace("%", " %") for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="?", default=",".join(TASKS), help="separated by commas; all where left out")
    parser.add_argument("--table", action="store_true", help="only the table")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    if not given.table:
        fill_cells(CELLS, [(task,) for task in given.tasks.split(",")], measure, workers=given.jobs)
    write_tables("audited", table(read_cells(CELLS)))


if __name__ == "__main__":
    main()
