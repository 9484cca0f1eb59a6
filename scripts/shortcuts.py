"""Regenerate the shortcut tables of docs/results.md, cell by cell: what is in scripts/shortcuts.json is not run again.

    MMSSL_DATA=path/to/data python scripts/shortcuts.py             everything that is missing, then the tables
    MMSSL_DATA=path/to/data python scripts/shortcuts.py rotation    the cells of one task
    python scripts/shortcuts.py clips                               those of the five tasks on clips
    python scripts/shortcuts.py --table                             only the tables, into docs/results.md

A cell is one task with some of its options and one kind of structure-free pictures: see `mmssl.audit.shortcuts`. It
takes about 15 seconds of one CPU core. One of clips has a seed, too: see `mmssl.audit.clips`; it takes about 5 seconds,
and each kind of clips 10 to 20 at every seed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from tables import add_cell, read_cells, write_tables

from mmssl import recipe
from mmssl.audit.clip_rows import MOVING, MUTE, POSITION, RECODED, STILL, SWAPPED, TO, Rows
from mmssl.audit.clips import measure_clips, measure_control, rows_of
from mmssl.audit.nulls import CLOCK, FILES, Arm
from mmssl.audit.nulls import planted as planted_arm
from mmssl.audit.shortcuts import Finding, control_of, measure, with_control
from mmssl.audit.shortcuts import finding as found_in
from mmssl.data.toy import write_clips
from mmssl.errors import RecipeError

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
RELATIVE = {"color": "none", "coarse": 0.0, "standardize": False}
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
    "none": RELATIVE,
    "projection": RELATIVE | {"color": "projection"},
    "one channel": RELATIVE | {"color": "drop"},
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
        "none": RELATIVE,
        **{words: RELATIVE | options for words, options in BRIGHTNESS.items()},
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

# Tasks on clips: one row length for all, so that all of them read the same files. `playback_speed` sees frames as they
# are, as in its recipe for folders: a jittered color hides what a codec leaves.
CLIP_TASKS: dict[str, dict[str, Any]] = {
    "temporal_alignment": {"window": 1.0, "min_shift": 0.5, "width": 64},
    "correspondence": {"frame": True, "window": 1.0, "width": 64},
    "clip_order": {"frames": 4, "gap": 2, "width": 64, "dropout": 0.0},
    "playback_speed": {"frames": 6, "jitter": 0.0},
    "arrow_of_time": {"frames": 8},
}
HEARS = {"temporal_alignment": ("video", "audio"), "correspondence": ("image", "audio")}
CLIPS = {"start": "first", "audio": {"seconds": 2.08}, "video": {"size": 24, "fps": 12.5, "frames": 26}}
MP4, AVI = "mp4 h264+aac", "avi mpeg4+aac"
NOISE_AVI, FROZEN = f"codec noise, {AVI}", "frozen frames: one that stands still"
PLACE = "position alone: where a window was cut, and nothing of what is there"
CLIP_ARMS = {
    f"codec noise: each frame drawn on its own, {MP4}": Arm(MOVING, MP4),
    NOISE_AVI: Arm(MOVING, AVI),
    FROZEN: Arm(STILL, MP4),
    "another clip's picture: clips of the toy world, each with the sound of another": Arm(SWAPPED, MP4),
    "silence": Arm(MUTE, MP4),
    PLACE: Arm(POSITION, MP4),
    f"codec swap: trained on {MP4}, tested on {AVI}": Arm(RECODED, MP4 + TO + AVI),
}
# Task, and words of an arm -> words -> options, and seconds of each file that are left out at its beginning.
CLIP_REMEDIES: dict[tuple[str, str], dict[str, tuple[dict[str, Any], float]]] = {
    ("clip_order", FROZEN): {"after the first 4.16 s of a file": ({}, 4.16)},
    ("playback_speed", NOISE_AVI): {"color jitter, the default": ({"jitter": 0.8}, 0.0)},
    ("playback_speed", PLACE): {"equal_span: false": ({"equal_span": False}, 0.0)},
}
NOTHING = "nothing asked"
SEEDS, CLIP_ROWS, CLIP_STEPS, CLIP_BATCH = 3, 128, 100, 16


class ClipCell(NamedTuple):
    task: str
    arm: Arm
    seed: int
    remedy: str = ""

    @property
    def key(self) -> str:
        task = f"{self.task}, {self.remedy}" if self.remedy else self.task
        return f"{task} | {self.arm.null} | {self.arm.file} | {self.arm.artifact} | seed {self.seed}"


def clip_cells() -> list[ClipCell]:
    """All of them, of one seed after the other, since the same clips are read by all tasks."""
    mended = [
        ClipCell(task, Arm(CLIP_ARMS[words].null, CLIP_ARMS[words].file, artifact), seed, remedy)
        for seed in range(SEEDS)
        for (task, words), remedies in CLIP_REMEDIES.items()
        for remedy in remedies
        for artifact in (CLOCK, "none")
    ]
    return mended + [
        ClipCell(task, Arm(arm.null, arm.file, artifact), seed)
        for seed in range(SEEDS)
        for arm in CLIP_ARMS.values()
        for artifact in (CLOCK, "none")
        for task in CLIP_TASKS
        if task in HEARS or arm.null not in (SWAPPED, MUTE)
    ]


def clip_recipe(
    task: str, source: str = "toy", options: Mapping[str, Any] | None = None, skipped: float = 0.0
) -> recipe.Recipe:
    """A task on clips as it is audited; small networks stand in for its encoders. `skipped` seconds longer windows."""
    encoders = {name: {"model": "timm/resnet10t"} for name in HEARS.get(task, ("video",))}
    objective = {"name": task} | CLIP_TASKS[task] | dict(options or {})
    audio = {"seconds": CLIPS["audio"]["seconds"] + skipped}
    video = CLIPS["video"] | {"frames": CLIPS["video"]["frames"] + round(skipped * CLIPS["video"]["fps"])}
    data = {"source": source} | CLIPS | {"audio": audio, "video": video}
    return recipe.load({"encoders": encoders, "objective": objective, "data": data})


@lru_cache(maxsize=len(CLIP_ARMS))
def clips_of(arm: Arm, seed: int, skipped: float = 0.0) -> Rows:
    """What all tasks train on and test, without what is `skipped` of each file at its beginning, in seconds."""
    moving = None if arm == Arm(MOVING, MP4) else clips_of(Arm(MOVING, MP4), seed)
    with tempfile.TemporaryDirectory() as folder:
        if arm.null == SWAPPED:
            write_clips(folder, 2 * CLIP_ROWS, seed=seed, seconds=3.0, size=24)
        given = clip_recipe("temporal_alignment", folder, skipped=skipped)
        found = rows_of(given, arm, moving, CLIP_ROWS, CLIP_BATCH, seed, sound=True)
    frames, samples = CLIPS["video"]["frames"], round(CLIPS["audio"]["seconds"] * given.data.audio.rate)
    kept = [part | {"video": part["video"][:, -frames:], "audio": part["audio"][:, -samples:]} for part in found]
    return Rows(*kept) if skipped else found


def run_clips(cell: ClipCell) -> Finding | None:
    """Of one seed; None where the task asks nothing of such clips."""
    arm = Arm(cell.arm.null, cell.arm.file)
    ask = measure_control if cell.arm.is_control else measure_clips
    words = next(words for words, one in CLIP_ARMS.items() if one == arm)
    options, skipped = CLIP_REMEDIES[cell.task, words][cell.remedy] if cell.remedy else ({}, 0.0)
    rows = clips_of(arm, cell.seed, skipped)
    try:
        return ask(clip_recipe(cell.task, options=options), arm, rows, CLIP_STEPS, CLIP_BATCH, cell.seed)
    except RecipeError:
        return None


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
    stored = read_cells(CELLS)
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


def clip_table() -> str:
    """In Markdown: a line a kind of clips; in brackets right answers where a clock is planted in the same clips."""
    stored = read_cells(CELLS)

    def mean(task: str, arm: Arm, remedy: str) -> Finding | None:
        """Over the seeds, each of which has rows of its own."""
        cells = [stored.get(ClipCell(task, arm, seed, remedy).key) for seed in range(SEEDS)]
        asked = [cell for cell in cells if cell and cell["verdict"] != NOTHING]
        if not asked:
            return None
        right = fmean(cell["accuracy"] for cell in asked)
        return found_in(arm, right, asked[0]["chance"], CLIP_ROWS * len(asked))

    def entry(task: str, arm: Arm, remedy: str = "") -> str:
        one, control = mean(task, arm, remedy), mean(task, Arm(arm.null, arm.file, CLOCK), remedy)
        if one is None or control is None:
            return "asks nothing" if ClipCell(task, arm, 0).key in stored else ""
        return f"{_told(with_control(one, control))} ({control.accuracy:.1%})".replace("%", " %")

    chances = [next((cell["chance"] for key, cell in stored.items() if key.startswith(task)), 0) for task in CLIP_TASKS]
    titles = [f"`{task}` ({level:.1%})".replace("%", " %") for task, level in zip(CLIP_TASKS, chances, strict=True)]
    lines = ["| clips in files, nothing planted (a clock planted) | " + " | ".join(titles) + " |"]
    lines.append("|---|" + "---|" * len(CLIP_TASKS))
    lines += [
        f"| {words} | " + " | ".join(entry(task, arm) for task in CLIP_TASKS) + " |" for words, arm in CLIP_ARMS.items()
    ]
    lines += ["", "| clips | task | what is done about it |", "|---|---|---|"]
    for (task, words), remedies in CLIP_REMEDIES.items():
        arm = CLIP_ARMS[words]
        each = [f"nothing {entry(task, arm)}", *(f"{remedy} {entry(task, arm, remedy)}" for remedy in remedies)]
        lines.append(f"| {words} | `{task}` | {', '.join(each)} |")
    return "\n".join(lines)


def _told(finding: Finding) -> str:
    """Right answers, in bold where they are above chance."""
    text = f"{finding.accuracy:.1%}"
    return (
        f"**{text}**" if finding.verdict == "leaks" else f"{text} (no power)" if finding.verdict == "no power" else text
    )


def tables() -> str:
    """Two in Markdown: every kind of file with the defaults of each task, and planted artifacts with each remedy."""
    found = findings()

    def entry(cell: Cell) -> str:
        f = found.get(cell.key)
        return "" if f is None else _told(f).replace("%", " %")

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
    known = [*TASKS, "clips", *CLIP_TASKS]
    parser.add_argument("tasks", nargs="*", help=f"some of {', '.join(known)}; all where left out")
    parser.add_argument("--table", action="store_true", help="only the tables, into docs/results.md")
    given = parser.parse_args()
    if unknown := [task for task in given.tasks if task not in known]:
        parser.error(f"there is no task '{unknown[0]}' here; there are {', '.join(known)}")
    wanted = {*given.tasks, *(CLIP_TASKS if "clips" in given.tasks else ())} or {*TASKS, *CLIP_TASKS}
    if not given.table:
        for cell in [*cells(), *clip_cells()]:
            if cell.task not in wanted or cell.key in read_cells(CELLS):
                continue
            began = time.process_time()
            finding = run(cell) if isinstance(cell, Cell) else run_clips(cell)
            add_cell(CELLS, cell.key, _kept(finding))
            said = f"{finding.accuracy:.1%} {finding.verdict}" if finding else NOTHING
            print(f"{cell.key}: {said} {time.process_time() - began:.0f} s", flush=True)
    write_tables("shortcuts", tables())
    write_tables("clip shortcuts", clip_table())


def _kept(finding: Finding | None) -> dict[str, Any]:
    """As JSON has it."""
    if finding is None:
        return {"verdict": NOTHING}
    numbers = {name: round(getattr(finding, name), 6) for name in ("accuracy", "chance", "low", "high", "z")}
    return numbers | {"verdict": finding.verdict}


if __name__ == "__main__":
    main()
