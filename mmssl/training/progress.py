"""What a run tells while it runs: a bar on a terminal, plain lines elsewhere, and metrics.jsonl always."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmssl.atomic import append_lines, write_text
from mmssl.batch import Batch
from mmssl.errors import RunError
from mmssl.objectives.base import VALID, Chance

DECODING, AUGMENTATION, NETWORK, OPTIMIZER = "decoding", "augmentation", "network", "optimizer"
ADVICE = {
    DECODING: "what may help is training.workers=auto, data.cache=FOLDER, or files of the size that is decoded",
    AUGMENTATION: "what may help is a smaller decoded size, fewer views, or a GPU",
    NETWORK: "what may help is training.precision=bf16 and training.compile=true on a GPU, or more processes",
    OPTIMIZER: "what may help is a larger training.batch_size, or training.sharded=true on several processes",
}
"""What a step's time goes to, and what to change where that is most of it."""


def peak_memory() -> float:
    """Largest memory so far in GiB: of the CUDA device where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Clock:
    """Samples per second, and what a step's time goes to.

    Parts follow each other: `enter` ends one and begins the next. On a CUDA device their ends are recorded in its
    stream and read with the next record, when the loss has been waited for: nothing is waited for here.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._since = time.perf_counter()
        self._waited = 0.0
        self._rows = 0
        self._spent: dict[str, float] = {}
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def enter(self, part: str) -> None:
        """The part of a step that begins here; `""` for none of those that are counted.

        Decoding on a CUDA device is how long its stream had nothing to do until the rows were there.
        """
        mark: float | torch.cuda.Event = time.perf_counter()
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((part, mark))

    def waiting_for(self, batches: Iterator[Batch], rows: int) -> Batch:
        """The next batch, whose `rows` and time to arrive are counted."""
        asked = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - asked
        self._rows += rows
        return batch

    def read(self) -> dict[str, float]:
        """`samples_per_second` and `data_wait` (0 to 1) since the last call."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        values = {"samples_per_second": self._rows / elapsed, "data_wait": self._waited / elapsed}
        for (part, began), (_, ended) in pairwise(self._marks):
            if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
                ended.synchronize()
                self._spend(part, began.elapsed_time(ended) / 1000)
            elif isinstance(began, float) and isinstance(ended, float):
                self._spend(part, ended - began)
        self._since, self._waited, self._rows, self._marks = now, 0.0, 0, []
        return values

    def _spend(self, part: str, seconds: float) -> None:
        if part:
            self._spent[part] = self._spent.get(part, 0.0) + seconds

    def bound_by(self) -> str:
        """What most of the time until the last reading went to, and what to change; empty before the first."""
        total = sum(self._spent.values())
        if not total:
            return ""
        shares = {part: seconds / total for part, seconds in self._spent.items()}
        most = max(shares, key=lambda part: shares[part])
        parts = ", ".join(f"{part} {shares[part]:.0%}" for part in ADVICE if part in shares)
        return f"bound by {most} ({parts}): {ADVICE[most]}"


class Reporter:
    """The console and metrics.jsonl of one run; silent on all processes but the first.

    Args:
        steps: of the whole run.
        start: steps already done.
        chance: the level of guessing, shown next to the loss.
        path: metrics.jsonl, appended to; None writes no file.
        quiet: print nothing.
    """

    def __init__(self, steps: int, start: int, chance: Chance, path: Path | None, quiet: bool) -> None:
        self.chance = chance
        self.steps = steps
        self._path = path
        self._console = Console(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("starting", total=steps, completed=start)

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """Print a line that is in no file."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl and show it."""
        if self._path:
            append_lines(self._path, [json.dumps(record)])
        text = describe(record, self.chance)
        if self._bar:
            self._bar.update(self._task, completed=record["step"], description=text)
        else:
            rest = record.get("eta")
            tail = f"  eta {rest / 60:.1f} min" if rest is not None else ""
            self._console.print(f"step {record['step']}/{self.steps}  {text}{tail}", highlight=False, soft_wrap=True)


def describe(record: Mapping[str, Any], chance: Chance) -> str:
    """One line of a record: loss and metrics against chance, speed, waiting, memory."""
    parts = []
    if "loss" in record:
        level = "" if chance.loss is None else f" (chance {chance.loss:.4f})"
        parts.append(f"loss {record['loss']:.4f}{level}")
    if record.get(VALID) == 0:
        parts.append("no row counts")
    parts += [f"{key} {record[key]:.3f} (chance {level:.3g})" for key, level in chance.metrics.items() if key in record]
    parts += [f"{key} {value:.3f}" for key, value in record.items() if key.startswith("probe/")]
    if "samples_per_second" in record:
        parts.append(f"{record['samples_per_second']:.0f} samples/s")
        parts.append(f"data-wait {record['data_wait']:.0%}")
        parts.append(f"{record['peak_memory_gib']:.1f} GiB")
    return "  ".join(parts)


def truncate_after(path: Path, step: int, kinds: Mapping[str, type | UnionType]) -> None:
    """Drop the lines of a JSON-lines file that speak of a later step, or are damaged; for resuming.

    Args:
        path: may be missing.
        step: the last one to keep.
        kinds: what the values of a record are by its keys, and under "" those of all other keys.

    Raises:
        RunError: where it is no file.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise RunError(f"{path}: is no file; remove it, or choose another --out")
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict) or not kinds.keys() - {""} <= record.keys():
            continue
        fits = all(isinstance(value, kinds.get(key, kinds[""])) for key, value in record.items())
        if fits and record["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
