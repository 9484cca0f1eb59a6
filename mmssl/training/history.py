"""The records of a run: in memory, in metrics.jsonl, on the console, in TensorBoard and other trackers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

from mmssl.objectives.base import Chance
from mmssl.training.progress import Reporter, truncate_after

# What lines hold: numbers, and for a row that cannot be decoded its source, number and the reason.
METRICS = {"step": int, "": int | float}
ERRORS = {"step": int, "id": int, "source": str, "reason": str, "": object}


class History:
    """All records so far, and every place that a new one is written to.

    Args:
        accelerator: with the trackers that the recipe asks for.
        directory: of the run; None keeps records in memory alone.
        steps: of the whole run.
        done: steps already done; records of later ones, which a killed run may have left, are dropped.
        chance: the level of guessing, shown next to the loss.
        quiet: print nothing.

    Attributes:
        records: those of metrics.jsonl, of earlier parts of a resumed run too.
    """

    def __init__(
        self, accelerator: Accelerator, directory: Path | None, steps: int, done: int, chance: Chance, quiet: bool
    ) -> None:
        main = accelerator.is_main_process
        self.records: list[dict[str, Any]] = [] if directory is None else _stored(directory, done, main)
        self._trackers = [] if directory is None else _trackers(accelerator, directory, done)
        file = directory / "metrics.jsonl" if directory and main else None
        self._reporter = Reporter(steps, done, chance, file, quiet or not main)
        self._hook = threading.excepthook

    def __enter__(self) -> History:
        self._reporter.__enter__()
        threading.excepthook = partial(_unless_told_again, self._hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reporter.__exit__(kind, error, trace)
        try:
            # Not accelerator.end_training(), which also takes the process group down under a later probe or fit.
            for tracker in self._trackers:
                tracker.finish()
        finally:
            threading.excepthook = self._hook

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._reporter.advance(step)

    def say(self, text: str) -> None:
        """Print a line that is in no file."""
        self._reporter.say(text)

    def log(self, record: dict[str, Any]) -> None:
        """Write one record everywhere; it holds `step`."""
        self._reporter.log(record)
        numbers = {key: value for key, value in record.items() if key not in ("step", "eta")}
        for tracker in self._trackers:
            tracker.log(numbers, step=record["step"])
        self.records.append(record)


def _unless_told_again(hook: Callable[[threading.ExceptHookArgs], Any], error: threading.ExceptHookArgs) -> None:
    """What a thread of TensorBoard cannot write it hands on to the next record, which raises it."""
    if not (isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard.")):
        hook(error)


def _stored(directory: Path, done: int, main: bool) -> list[dict[str, Any]]:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "metrics.jsonl"
    if main:
        truncate_after(path, done or -1, METRICS)  # a run that starts over measures step 0 anew
        truncate_after(directory / "errors.jsonl", done, ERRORS)
    if dist.is_initialized():
        dist.barrier()
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["step"] <= (done or -1)]


def _trackers(accelerator: Accelerator, directory: Path, done: int) -> list[Any]:
    # Made by hand: accelerate would name its folder after the project, and the project is what W&B shows.
    board = TensorBoardTracker("tensorboard", logging_dir=str(directory), purge_step=done and done + 1)
    accelerator.log_with.append(board)
    accelerator.init_trackers("mmssl")
    return accelerator.trackers
