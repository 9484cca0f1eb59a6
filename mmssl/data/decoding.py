"""Rows to tensors in worker processes, and what becomes of rows that cannot be decoded.

Workers are started afresh (`forkserver`) and not forked from the training process, whose threads and CUDA context they
must not inherit. A script that trains with workers therefore needs `if __name__ == "__main__":` around its own code.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmssl.alive import began, end_with
from mmssl.atomic import append_lines
from mmssl.batch import Batch
from mmssl.data.base import MapSource, Row
from mmssl.data.columns import Decoder
from mmssl.data.digest import add_cell
from mmssl.errors import DataError, MmsslError
from mmssl.media.cell import sentence
from mmssl.recipe import Data

# Rows seen before the share of undecodable ones is judged.
FEWEST_ROWS = 20
# A source that takes no more than this when decoded is kept in memory; all sources of a process share as much again.
KEPT_BYTES = 2**30
SOURCES = 4
"""A source whose rows all readers of a process share takes this part of `KEPT_BYTES` at most."""

# A stream is read in the main process, which sends its rows: no source then.
Reader = tuple[MapSource | None, Decoder]


# A training that waits for more workers than this waits for its disk.
ENOUGH_WORKERS = 16


def cores_to_spare() -> int:
    """Cores that this process may run on, shared with the others of its machine, less the one that trains; 0 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(ENOUGH_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


class Task(NamedTuple):
    """What to decode: `rows` is None where the source is read by number; `windows` are in [0, 1)."""

    ids: list[int]
    rows: list[Row] | None
    windows: list[float]


class Decoded(NamedTuple):
    """A batch, None where no row could be decoded, and (position, reason) of those that could not.

    Their places in the batch are filled by another row.
    """

    batch: Batch | None
    failures: list[tuple[int, str]]


class Failures:
    """Counts undecodable rows of one source and stops the run when there are too many.

    Args:
        spec: of the source; `max_bad` is the share allowed.
        name: of the source in the recipe.
        path: errors.jsonl, to which a row is appended once; None for none.
        rows: of an epoch; of more that come some were there before. None where that is not known.
        key: as the caller sets `max_bad`.
    """

    def __init__(
        self,
        spec: Data,
        name: str = "",
        path: Path | None = None,
        *,
        rows: int | None = None,
        key: str = "data.max_bad",
    ) -> None:
        self.spec, self.name, self.path, self.rows, self.key = spec, name, path, rows, key
        self.seen = self.step = 0
        self.bad: set[int] = set()
        self.first: list[str] = []

    def add(self, step: int, ids: Sequence[int], failures: Sequence[tuple[int, str]]) -> None:
        """Take note of a batch; of one that was seen before nothing, since the first rows are read again at the end.

        Args:
            step: from 1; 0 of rows that are read once.
            ids: numbers of its rows.
            failures: position, and why the row there cannot be decoded.

        Raises:
            DataError: where the share is past `max_bad` by more than chance: by three standard deviations of the
                number of bad rows, so that a few among the first do not stop a run that is within its share.
        """
        if 0 < step <= self.step:
            return
        self.step = step
        self.seen += len(ids)
        if self.rows is not None:
            self.seen = min(self.seen, self.rows)
        source = self.name or self.spec.source
        new = {ids[position]: reason for position, reason in failures if ids[position] not in self.bad}
        self.bad |= new.keys()
        self.first += [f"row {number}: {reason}" for number, reason in new.items()][: 3 - len(self.first)]
        if self.path is not None and new:
            known = _written(self.path, source)  # by an earlier part of the run, or by other processes
            records = [
                {"step": step, "source": source, "id": row, "reason": reason}
                for row, reason in new.items()
                if row not in known
            ]
            append_lines(self.path, (json.dumps(record, ensure_ascii=False) for record in records))
        bad, allowed = len(self.bad), self.spec.max_bad * self.seen
        whole = step > 0 and self.seen == self.rows  # an epoch of a source with fewer rows
        if (self.seen >= FEWEST_ROWS or whole) and bad > allowed + 3 * math.sqrt(allowed):
            some = f"{'; '.join(self.first)}{f'; all of them are in {self.path}' if self.path else ''}"
            if bad >= self.seen:
                raise DataError(f"{self.spec.source}: none of {self.seen} rows can be decoded: {some}")
            enough = math.ceil(100 * bad / self.seen) / 100
            raise DataError(
                f"{self.spec.source}: {bad} of {self.seen} rows cannot be decoded, more than {self.key} = "
                f"{self.spec.max_bad}: {some}; mend or remove them, or raise {self.key} to {enough} "
                f"(--set {self.key}={enough})"
            )

    @property
    def different(self) -> int:
        """Rows met so far, up to the last step, by all processes of the run where there is a file."""
        if self.path is None:
            return len(self.bad)
        return sum(step <= self.step for step in _written(self.path, self.name or self.spec.source).values())


class SharedRows:
    """Decoded rows that all readers of a process share; where they take more than `KEPT_BYTES`, the oldest go."""

    def __init__(self) -> None:
        self._rows: dict[bytes, dict[str, Tensor]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """What a row decodes to; None where that is not kept."""
        return self._rows.get(key)

    def keep(self, key: bytes, decoded: dict[str, Tensor]) -> None:
        """For whoever reads it next."""
        with self._lock:
            if key not in self._rows:
                self._rows[key] = decoded
                self._bytes += size_of(decoded)
            while self._bytes > KEPT_BYTES:
                self._bytes -= size_of(self._rows.pop(next(iter(self._rows))))

    def clear(self) -> None:
        """Forget them all."""
        with self._lock:
            self._rows.clear()
            self._bytes = 0


SHARED = SharedRows()


def size_of(decoded: Mapping[str, Tensor]) -> int:
    """Bytes of a row."""
    return sum(value.nbytes for value in decoded.values())


class Rows(Dataset[dict[str, Decoded] | MmsslError]):
    """What a worker holds; its items are batches, or what ends the reading.

    The latter is an item, for the loader would put the worker's traceback into the sentence of one that is raised.

    Rows of a small source that decode to the same tensors every time are decoded once and kept: where no worker has
    to be sent them, for whoever reads equal cells next in this process, such as the probes of a comparison.

    Args:
        readers: name -> source, None for a stream, and its decoder.
        workers: processes that hold a copy of this; they share the memory allowed.
    """

    def __init__(self, readers: Mapping[str, Reader], workers: int) -> None:
        self.readers, self.workers = dict(readers), workers
        self.kept: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in readers}
        self.how = {name: decoder.how if decoder.fixed else None for name, (_, decoder) in readers.items()}

    def __getitem__(self, tasks: dict[str, Task]) -> dict[str, Decoded] | MmsslError:
        try:
            return {name: self._batch(name, task) for name, task in tasks.items()}
        except MmsslError as error:
            return error

    def decode(self, name: str, number: int, row: Row | None, window: float) -> dict[str, Tensor] | str:
        """One row's tensors, or why there are none; `row` is None where the source is read by number."""
        if found := self.kept[name].get(number):
            return found
        source, decoder = self.readers[name]
        try:
            if row is None:
                assert source is not None  # else the row would be there
                row = source.row(number)
            key = self._key(name, number, row)
            decoded = (SHARED.get(key) if key else None) or decoder(row, window)
        except (DataError, OSError) as error:
            return str(error)
        except MmsslError:
            raise
        except Exception as error:  # decoders raise anything on hostile bytes; too many such rows stop the run
            return f"cannot be decoded: {type(error).__name__}: {sentence(error)}"
        whole = 0 if source is None else size_of(decoded) * len(source) * max(1, self.workers)
        if source is not None and decoder.fixed and whole <= KEPT_BYTES:
            self.kept[name][number] = decoded
        if key and whole <= KEPT_BYTES // SOURCES:
            SHARED.keep(key, decoded)
        elif key:
            self.how[name] = None  # as large are all of its rows
        return decoded

    def _key(self, name: str, number: int, row: Row) -> bytes | None:
        """Equal for rows that decode to equal tensors, of a file that was changed another one; None where not shared.

        With workers each keeps its own rows, for what the main process has is not sent there.
        """
        (source, decoder), how = self.readers[name], self.how[name]
        if source is None or how is None or self.workers:
            return None
        content = hashlib.blake2b(how.encode(), digest_size=20)
        if source.fingerprint is not None:
            content.update(f"{source.fingerprint} {number}".encode())
            return content.digest()
        for column in decoder.reads:
            add_cell(content, row[column])
        return content.digest()

    def _batch(self, name: str, task: Task) -> Decoded:
        rows = task.rows if task.rows is not None else [None] * len(task.ids)
        decoded = [self.decode(name, *one) for one in zip(task.ids, rows, task.windows, strict=True)]
        failures = [(position, row) for position, row in enumerate(decoded) if isinstance(row, str)]
        filler = next((row for row in decoded if not isinstance(row, str)), None)
        if filler is None:
            return Decoded(None, failures)
        whole = [filler if isinstance(row, str) else row for row in decoded]
        return Decoded({key: torch.stack([row[key] for row in whole]) for key in filler}, failures)


def decode(rows: Rows, tasks: Iterator[dict[str, Task]]) -> Iterator[dict[str, Decoded]]:
    """Do the tasks, in order; they are taken a few ahead of the answers where there are workers.

    Args:
        rows: of all sources.
        tasks: one task a source.

    Raises:
        DataError: where a worker dies.
        MmsslError: where no row can be decoded at all, such as of a disk that is full.
    """
    loader = DataLoader(
        rows,
        batch_size=None,
        sampler=tasks,
        num_workers=rows.workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=_context() if rows.workers else None,
        worker_init_fn=partial(_end_with, os.getpid(), began(os.getpid())) if rows.workers else None,
        # Its own, for the loader takes a number from it, and the global one belongs to the training.
        generator=torch.Generator(),
    )
    workers: Sequence[BaseProcess] = ()
    try:
        batches = iter(loader)
        workers = getattr(batches, "_workers", ())
        for batch in batches:
            if isinstance(batch, MmsslError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, EOFError) as error:
        # The loader notices a death, or the tensors of a batch can no longer be fetched from the dead. A stream, read
        # in this process, may lose its connection, too.
        lost = isinstance(error, ConnectionError | EOFError)
        reset = lost and bool(wait([worker.sentinel for worker in workers], timeout=1))
        if not (reset or str(error).startswith("DataLoader worker")):
            raise
        raise DataError(
            f"a worker process that decodes data died ({' '.join(str(error).split())}); either memory or shared memory "
            "ran out (use fewer training.workers, or 0 to see which row it is), or a script uses workers without "
            'if __name__ == "__main__": around its own code'
        ) from error


def _end_with(reader: int, since: str, worker: int) -> None:
    """Have this worker end when the process that reads its batches does.

    The loader's own watch is on the fork server, which lives as long as its workers do.
    """
    end_with(reader, since)


def _as_it_is(batch: Any) -> Any:
    return batch


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the server, and not by each worker.
    context.set_forkserver_preload([__name__, "datasets"])
    return context


def _written(path: Path, source: str) -> dict[int, int]:
    """Rows of a source that the file names -> the step at which each was first met."""
    if not path.exists():
        return {}
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {record["id"]: record["step"] for record in records if record["source"] == source}
