"""Regenerate the shortcut tables of docs/results.md, cell by cell: what is in scripts/shortcuts.json is not run again.

    MMSSL_DATA=path/to/data python scripts/shortcuts.py             everything that is missing, then the tables
    MMSSL_DATA=path/to/data python scripts/shortcuts.py rotation    the cells of one task
    python scripts/shortcuts.py --table                             only the tables, into docs/results.md

A cell is one task with some of its options and one kind of structure-free pictures: see `mmssl.audit.shortcuts`. It
takes about 15 seconds of one CPU core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from tables import write_tables

from mmssl import recipe
from mmssl.audit.nulls import FILES, Arm
from mmssl.audit.nulls import planted as planted_arm
from mmssl.audit.shortcuts import Finding, control_of, measure, with_control

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "scripts" / "shortcuts.json"


class Task(NamedTuple):
    objective: dict[str, Any]
    size: int
    training: dict[str, int]


class Cell(NamedTuple):
    task: str
    words: str
    options: dict[str, Any]
    arm: Arm

    @property
    def key(self) -> str:
        arm = self.arm
        return f"{self.task} | {self.words} | {arm.null} | {arm.file} | {arm.artifact} | {arm.scale:g}"


# Small heads and one grid, for speed, and few orders, with which a small network soon learns where a tile belongs. What
# hides artifacts is as by default.
TASKS = {
    "rotation": Task({"name": "rotation"}, 48, {}),
    "jigsaw": Task(
        {"name": "jigsaw", "orders": 4, "tile_width": 64, "hidden": 256}, 72, {"batch_size": 32, "rows": 512}
    ),
    "relative_position": Task({"name": "relative_position", "grids": 1, "hidden": 64}, 72, {"rows": 512}),
}
PLAIN = [
    *(Arm(file=file) for file in FILES),
    Arm("constant"),
    Arm("natural", "jpeg 4:2:0"),
    Arm("phases", "jpeg 4:2:0"),
    Arm(file="any width", scale=2),
    Arm(file="jpeg 4:2:2", scale=2),
]
# Everything off, then one remedy at a time, then the defaults.
JIGSAW = {"gray": 0.0, "projection": 0.0, "drop": 0.0, "shift": 0, "standardize": False}
POSITION = {"color": "none", "coarse": 0.0, "standardize": False}
JIGSAW_COLOR: dict[str, dict[str, Any]] = {
    "none": JIGSAW,
    "gray": JIGSAW | {"gray": 1.0},
    "projection": JIGSAW | {"projection": 1.0},
    "one channel": JIGSAW | {"drop": 1.0},
    "channels shifted by 0 to 4": JIGSAW | {"shift": 4},
    "defaults": {},
    "defaults, one channel": {"gray": 0.0, "projection": 0.0, "drop": 1.0},
}
POSITION_COLOR: dict[str, dict[str, Any]] = {
    "none": POSITION,
    "projection": POSITION | {"color": "projection"},
    "one channel": POSITION | {"color": "drop"},
    "defaults": {},
}
BRIGHTNESS = {
    "standardized tiles": {"standardize": True},
    "standardized tiles, flat_field": {"standardize": True, "flat_field": True},
}
REMEDIES: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("jigsaw", "green shift"): JIGSAW_COLOR,
    ("jigsaw", "red-blue shift"): JIGSAW_COLOR,
    ("jigsaw", "vignetting"): {
        "none": JIGSAW,
        **{words: JIGSAW | options for words, options in BRIGHTNESS.items()},
        "defaults": {},
        "defaults, flat_field": {"flat_field": True},
    },
    ("jigsaw", "watermark"): {
        "defaults": {},
        "area 0.3 to 1": {"views": {"area": [0.3, 1.0]}},
        "margin 0.2": {"views": {"margin": 0.2}},
    },
    ("relative_position", "green shift"): POSITION_COLOR,
    ("relative_position", "red-blue shift"): POSITION_COLOR,
    ("relative_position", "vignetting"): {
        "none": POSITION,
        **{words: POSITION | options for words, options in BRIGHTNESS.items()},
        "defaults": {},
        "defaults, flat_field": {"flat_field": True},
    },
    ("relative_position", "watermark"): {"defaults": {}},
    ("rotation", "watermark"): {
        "no crop": {"views": {"area": None}},
        "defaults": {},
        "margin 0.2": {"views": {"margin": 0.2}},
    },
    ("rotation", "squash"): {"defaults": {}},
    ("rotation", "resaved 4:2:2"): {"defaults": {}},
    ("rotation", "red-blue shift"): {"defaults": {}},
    ("rotation", "vignetting"): {"defaults": {}},
}
PAD = "fit: pad"


def cells() -> list[Cell]:
    """All of them; the controls first, then what remedies do, then every kind of file."""
    plain = [Cell(task, "defaults", {}, arm) for task in TASKS for arm in PLAIN]
    planted = [
        Cell(task, words, options, planted_arm(artifact))
        for (task, artifact), remedies in REMEDIES.items()
        for words, options in remedies.items()
    ]
    padded = [Cell(task, PAD, {}, Arm()) for task in TASKS]
    controls = [
        Cell(task, "defaults", {}, control_of(arm)) for task in TASKS for arm in PLAIN if arm.null != "constant"
    ]
    return list({cell.key: cell for cell in [*controls, *padded, *planted, *plain]}.values())


def run(cell: Cell) -> Finding:
    objective, size, training = TASKS[cell.task]
    audited = {
        "encoders": {"image": {"model": "timm/resnet10t"}},
        "objective": objective | cell.options,
        "data": {
            "source": "$MMSSL_DATA/stamps",  # for `phases`; nothing else reads it
            "image": {"size": size, "fit": "pad" if cell.words == PAD else "crop"},
        },
    }
    return measure(recipe.load(audited), cell.arm, **training)


def findings() -> dict[str, Finding]:
    """Key of a cell -> finding, judged by its control; cells that were not run are left out."""
    stored = json.loads(CELLS.read_text()) if CELLS.exists() else {}
    found = {}
    for cell in cells():
        if cell.key in stored:
            finding = Finding(cell.arm, **stored[cell.key])
            null = "white" if cell.arm.null == "constant" else cell.arm.null
            control = cell._replace(words="defaults", arm=control_of(Arm(null, scale=cell.arm.scale)))
            if control.key in stored:
                finding = with_control(finding, Finding(control.arm, **stored[control.key]))
            found[cell.key] = finding
    return found


def tables() -> str:
    """Two in Markdown: every kind of file with the defaults of each task, and planted artifacts with each remedy."""
    found = findings()

    def entry(cell: Cell) -> str:
        f = found.get(cell.key)
        if f is None:
            return ""
        text = f"{f.accuracy:.1%}".replace("%", " %")
        return f"**{text}**" if f.verdict == "leaks" else f"{text} (no power)" if f.verdict == "no power" else text

    chances = {task: next((f"{f.chance:.1%}" for k, f in found.items() if k.startswith(task)), "") for task in TASKS}
    titles = [f"`{task}` ({chance.replace('%', ' %')})" for task, chance in chances.items()]
    lines = ["| noise in files, nothing planted | " + " | ".join(titles) + " |", "|---|" + "---|" * len(TASKS)]
    names = {"white": "white noise", "natural": "1/f² noise", "phases": "photographs with random phases"}
    for arm in PLAIN:
        size = " larger than the decode size" if arm.scale != 1 else ""
        row = [entry(Cell(task, "defaults", {}, arm)) for task in TASKS]
        lines.append(f"| {names.get(arm.null, 'one color')}, {arm.file}{size} | " + " | ".join(row) + " |")
    row = [entry(Cell(task, PAD, {}, Arm())) for task in TASKS]
    lines.append("| white noise, 4:3 png, `fit: pad` | " + " | ".join(row) + " |")
    row = [entry(Cell(task, "defaults", {}, control_of(Arm()))) for task in TASKS]
    lines.append("| white noise, png, rings planted: the control | " + " | ".join(row) + " |")

    lines += ["", "| planted | task | what is done about it: right answers |", "|---|---|---|"]
    for (task, artifact), remedies in REMEDIES.items():
        each = [
            f"{words} {entry(Cell(task, words, options, planted_arm(artifact)))}" for words, options in remedies.items()
        ]
        lines.append(f"| {artifact} | `{task}` | " + ", ".join(each) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"some of {', '.join(TASKS)}; all where left out")
    parser.add_argument("--table", action="store_true", help="only the tables, into docs/results.md")
    given = parser.parse_args()
    if unknown := [task for task in given.tasks if task not in TASKS]:
        parser.error(f"there is no task '{unknown[0]}' here; there are {', '.join(TASKS)}")
    if not given.table:
        for cell in cells():
            stored = json.loads(CELLS.read_text()) if CELLS.exists() else {}
            if cell.key in stored or (given.tasks and cell.task not in given.tasks):
                continue
            began = time.process_time()
            finding = run(cell)
            stored = json.loads(CELLS.read_text()) if CELLS.exists() else {}
            numbers = {name: round(getattr(finding, name), 6) for name in ("accuracy", "chance", "low", "high", "z")}
            stored[cell.key] = numbers | {"verdict": finding.verdict}
            CELLS.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
            print(
                f"{cell.key}: {finding.accuracy:.1%} {finding.verdict} {time.process_time() - began:.0f} s", flush=True
            )
    text = tables()
    write_tables("shortcuts", text)


if __name__ == "__main__":
    main()
