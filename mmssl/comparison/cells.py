"""Cells that are not measured again: kept as soon as they are there, shared between processes, and gone on with."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmssl.adaptation.features import POOLED
from mmssl.atomic import temporary_name, write_text, writing
from mmssl.comparison.measure import Cell, measure
from mmssl.comparison.monitors import Answered
from mmssl.comparison.plan import NAMED, RAW, Plan
from mmssl.errors import RunError
from mmssl.shots import with_rows
from mmssl.training.lock import locked
from mmssl.way_on import repeated

CELL, ANSWERS = "cell.json", "answers.npz"
WAIT = 2.0  # seconds between two looks at what others do
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def cells_of(plan: Plan) -> list[Cell]:
    """All of a comparison, in the order in which they are begun: rates first, then seed by seed, then audits."""
    chosen = [Cell(line, plan.seeds[0], rate) for line in plan.tuned for rate in plan.rates]
    whole = []
    for number, seed in enumerate(plan.seeds):
        for line in plan.lines:
            if line in plan.runs:
                if number < len(plan.runs[line]):
                    whole.append(Cell(line, number))
            elif number == 0 or line not in (RAW, NAMED):
                whole.append(Cell(line, seed))
    audits = [Cell(line, plan.seeds[0], audit=True) for line in (*plan.tasks, *plan.runs) if plan.audit]
    return chosen + whole + audits


def read_cell(out: Path, cell: Cell) -> dict[str, Any] | None:
    """What was measured; None where it was not yet."""
    try:
        found: dict[str, Any] = json.loads((out / "cells" / cell.name / CELL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def read_answers(out: Path, cell: Cell) -> Answered:
    """Which test rows it answered right; empty where that cannot be said."""
    path = out / "cells" / cell.name / ANSWERS
    if not path.exists():
        return {}
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def factor_of(plan: Plan, line: str, out: Path) -> float | None:
    """The factor of a line's learning rate: the best on validation rows; None where that is not known yet.

    Of equals the one nearest to the recipe's own; a rate at which training diverged is not taken.
    """
    if line not in plan.tuned:
        return plan.rates[0] if len(plan.rates) == 1 else 1.0
    found = {rate: read_cell(out, Cell(line, plan.seeds[0], rate)) for rate in plan.rates}
    if None in found.values():
        return None
    scores = {rate: cell["validation"] for rate, cell in found.items() if cell and "validation" in cell}
    if not scores:
        return 1.0
    best = max(scores.values())
    return min((rate for rate, score in scores.items() if score == best), key=lambda rate: abs(np.log(rate)))


def fill(out: Path, *, jobs: int = 1, quiet: bool = False) -> None:
    """Measure every cell that is missing; others may do the same in the same folder.

    Args:
        out: the comparison's folder.
        jobs: processes side by side on this machine.
        quiet: print nothing.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    others = [context.Process(target=_job, args=(out, threads, quiet), daemon=False) for _ in range(jobs - 1)]
    for process in others:
        process.start()
    before = torch.get_num_threads()
    try:
        if jobs > 1:
            torch.set_num_threads(threads)
        _fill(out, quiet)
        for process in others:
            process.join()
    except BaseException:
        for process in others:
            process.terminate()
        raise
    finally:
        torch.set_num_threads(before)


def _job(out: Path, threads: int, quiet: bool) -> None:
    """One more process; it ends with the one that started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(threads)
    with repeated(), writing(out):
        _fill(out, quiet)


def alone() -> None:
    """Leave the group of a launcher: its processes share the list of cells, and each cell is trained by one of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        local = os.environ.get("LOCAL_RANK", "0")
        for name in LAUNCHED:
            os.environ.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(local) % torch.cuda.device_count())


def _fill(out: Path, quiet: bool) -> None:
    plan = Plan.read(out)
    cells = cells_of(plan)
    while missing := [cell for cell in cells if read_cell(out, cell) is None]:
        if not any(_try(plan, cell, out, cells, quiet) for cell in missing):
            time.sleep(WAIT)


def _try(plan: Plan, cell: Cell, out: Path, cells: list[Cell], quiet: bool) -> bool:
    """Measure a cell unless it waits for its rate, or somebody else is at it."""
    factor = cell.rate if cell.rate is not None else 1.0 if cell.audit else factor_of(plan, cell.line, out)
    if factor is None:
        return False
    folder = out / "cells" / cell.name
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except RunError:
            if not os.access(out, os.W_OK):
                raise
            return False
        if read_cell(out, cell) is not None:
            return True
        try:
            found, answered = measure(plan, cell, factor, out, _nothing if quiet else partial(print, flush=True))
        except RunError as error:
            if "finite" not in str(error):
                raise
            found, answered = {"failed": str(error)}, {}
        if answered:
            temporary = temporary_name(folder / ANSWERS)
            with temporary.open("wb") as file:
                np.savez_compressed(file, **answered)  # type: ignore[arg-type]
            temporary.replace(folder / ANSWERS)
        write_text(folder / CELL, json.dumps({**found, "factor": factor}, indent=1))
    if not quiet:
        done = sum(read_cell(out, one) is not None for one in cells)
        print(f"{done} of {len(cells)}: {progress_of(cell, found)}", flush=True)
    return True


def _nothing(text: str) -> None:
    """What is said to nobody."""


def progress_of(cell: Cell, found: dict[str, Any]) -> str:
    """What is printed of a cell when it is there: scores of the last depth, as in the table's columns."""
    what = f"{cell.line.replace('_', ' ')}, seed {cell.seed}"
    if "failed" in found:
        return f"{what}: {found['failed']}"
    if cell.audit:
        return f"audit of {found['audit']['sentence']}"
    if cell.rate is not None:
        return (
            f"{cell.line.replace('_', ' ')}, rate x {cell.rate:g}: {100 * found['validation']:.1f} on validation rows"
        )
    # Not of the best depth, which is chosen on validation rows of all seeds.
    drawn = found.get("drawn", {})
    scores = {with_rows(key, drawn.get(key, [])): depths[POOLED] for key, depths in found.get("scores", {}).items()}
    percent = found.get("metric", {}).get("percent", True)
    told = [f"{title} {100 * score:.1f} %" if percent else f"{title} {score:.3f}" for title, score in scores.items()]
    told = told or [f"effective rank {found['monitors']['effective_rank']:.1f}"]
    return f"{what}: {', '.join(told)} ({found['minutes']:.1f} min)"
