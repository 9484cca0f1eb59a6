"""What the scripts that measure share: cells that are not run again, and the place of a table in docs/results.md."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeAlias

from mmssl.atomic import write_text

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results.md"
Cells: TypeAlias = "dict[str, dict[str, Any]]"
"""What was measured, by the words that name a cell, its seed last; numbers as JSON has them, with text for keys."""


def read_cells(path: Path) -> Cells:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def fill_cells(
    path: Path,
    wanted: Sequence[tuple[Any, ...]],
    measure: Callable[..., dict[str, Any]],
    *shared: Any,
    workers: int = 2,
) -> None:
    """Call `measure(*one, *shared)` for every wanted cell that `path` lacks, and keep each as soon as it is there.

    Args:
        path: of a JSON file.
        wanted: names of the cells, in the order in which they are begun.
        measure: can be pickled.
        *shared: what every cell needs in addition to its name.
        workers: cells side by side, one thread each.
    """
    kept = read_cells(path)
    missing = [one for one in wanted if _key(one) not in kept]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        jobs = {pool.submit(measure, *one, *shared): _key(one) for one in missing}
        try:
            for job in as_completed(jobs):
                add_cell(path, jobs[job], job.result())
                print(jobs[job], job.result(), flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def add_cell(path: Path, name: str, cell: dict[str, Any]) -> None:
    """Keep a cell with those that this call, or another one next to it, has kept before."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        cells = read_cells(path) | {name: cell}
        write_text(path, json.dumps(dict(sorted(cells.items())), indent=1) + "\n")
    finally:
        os.close(descriptor)


def _end_with_parent() -> None:
    """Else a worker goes on for the rest of its cell when the script is killed, on a core that others time."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _key(one: tuple[Any, ...]) -> str:
    return " ".join(map(str, one))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, and standard deviation over the seeds where there is one to see."""
    mean, varies = f"{statistics.fmean(values):.{digits}f}", len(values) > 1 and statistics.stdev(values) > 0
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if varies else mean


def write_tables(name: str, text: str) -> None:
    """Replace what is between `<!-- name -->` and `<!-- /name -->` in docs/results.md, and print it.

    Raises:
        ValueError: where it lacks one of the marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = RESULTS.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{RESULTS} needs the marks {begin} and {end} around a place for these tables")
    RESULTS.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
    print(text)
