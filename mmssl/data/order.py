"""Which rows a batch has: a function of (seed, step) alone, for tables and for streams.

A table is read in a new permutation every epoch; a stream by readers, each in its own order and permuted in blocks.
What is left over at the end of an epoch is dropped, so that no batch holds a row twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from mmssl.data.base import MapSource, Row
from mmssl.data.shared import SharedStream, check_enough
from mmssl.errors import DataError
from mmssl.ops.draws import mix_seed

# Rows after an undecodable one that are tried in its place.
NEIGHBORS = 100
# Readers of a process that read at a time.
MOST_READING = 16

log = logging.getLogger(__name__)


class Picked(NamedTuple):
    """Rows of one batch.

    Attributes:
        ids: their numbers in the source.
        rows: undecoded, of a stream; None where the worker reads them itself.
        others: position in the batch -> (id, row or None) of those after it in the source, for a row that cannot be
            decoded.
    """

    ids: list[int]
    rows: list[Row] | None
    others: Callable[[int], Iterator[tuple[int, Row | None]]]


class MapOrder:
    """Every epoch a permutation of the rows.

    Args:
        source: of random access.
        columns: rows in which one of these is null are left out.
        batch_size: rows of the global batch.
        seed: of the permutations.

    Attributes:
        rows: in the source.
        steps_per_epoch: whole batches of them.

    Raises:
        DataError: where there are fewer rows than in a batch.
    """

    def __init__(self, source: MapSource, columns: Sequence[str], batch_size: int, seed: int) -> None:
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.present = find_present(source, columns)
        self.rows = len(self.present)
        check_enough(source.name, self.rows, batch_size)
        self.steps_per_epoch = self.rows // batch_size

    def picks(self, start: int, stop: int, mine: slice) -> Iterator[Picked]:
        """Rows `mine` of the global batches `start` to `stop - 1`."""
        epoch = -1
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = _permutation(len(self.present), self.seed, epoch)
            first = step % self.steps_per_epoch * self.batch_size
            places = order[first : first + self.batch_size][mine]
            yield Picked(self.present[places].tolist(), None, partial(self._after, places))

    def _after(self, places: np.ndarray, position: int) -> Iterator[tuple[int, Row | None]]:
        for distance in range(1, min(NEIGHBORS + 1, len(self.present))):
            yield int(self.present[(places[position] + distance) % len(self.present)]), None


class _Block(NamedTuple):
    numbers: list[int]
    rows: list[Row]


class StreamOrder:
    """Rows of a stream, each reader's in its own order, permuted in blocks.

    To begin anywhere, readers go to where they would be.

    Args:
        stream: who reads what.
        buffer: rows that are permuted at a time, of all readers together; twice as many are held in memory, undecoded.
        seed: of the permutations.

    Attributes:
        rows: in the source; None where its end is not known.
        steps_per_epoch: whole batches of them, or None.
    """

    def __init__(self, stream: SharedStream, buffer: int, seed: int) -> None:
        self.stream, self.seed = stream, seed
        self.block_size = max(1, buffer // stream.division.readers)
        self.steps_per_epoch = stream.steps_per_epoch
        self.rows = stream.rows if self.steps_per_epoch else None

    def picks(self, start: int, stop: int, mine: slice) -> Iterator[Picked]:
        """Rows `mine` of the global batches `start` to `stop - 1`; no other reader's rows are read.

        Raises:
            DataError: where the stream has fewer rows than a batch, or than it had before.
        """
        division, places = self.stream.division, range(mine.start, mine.stop)
        readers = sorted({division.reader(step, row) for step in range(division.turns) for row in places})
        pool = ThreadPoolExecutor(min(MOST_READING, len(readers)))
        try:
            coming = {reader: self._rows(reader, self._given(reader, start), pool) for reader in readers}
            for step in range(start, stop):
                within = step % self.steps_per_epoch if self.steps_per_epoch else step
                yield _pick([next(coming[division.reader(within, row)]) for row in places])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _given(self, reader: int, step: int) -> int:
        """Rows that a reader has given before a step."""
        epochs, within = divmod(step, self.steps_per_epoch) if self.steps_per_epoch else (0, step)
        return epochs * (self._per_epoch(reader) or 0) + self.stream.division.given(reader, within)

    def _per_epoch(self, reader: int) -> int | None:
        """Rows that a reader gives before it begins anew; None until it has seen its end."""
        if self.steps_per_epoch:
            return self.stream.division.given(reader, self.steps_per_epoch)
        rows = self.stream.readers[reader].rows
        return None if rows is None else rows - rows % self._at_once

    @property
    def _at_once(self) -> int:
        """Rows that a reader gives of a batch; what is left of them at its end is dropped."""
        return self.stream.division.rows if self.stream.division.turns == 1 else 1

    def _rows(self, reader: int, given: int, pool: Executor) -> Iterator[tuple[_Block, int]]:
        """All rows of a reader after the first ones, epoch after epoch."""
        while True:
            known = self._per_epoch(reader)
            epoch, within = divmod(given, known) if known else (0, given)
            rows = self._epoch(reader, epoch, within, pool)
            if known:
                yield from islice(rows, known - within)
                given += known - within
                continue
            while len(some := list(islice(rows, self._at_once))) == self._at_once:
                yield from some
                given += self._at_once
            if not self._per_epoch(reader):
                name, most = self.stream.source.name, self.stream.readers[reader].rows or 0
                raise DataError(
                    f"{name} has {most} usable rows for one of its readers, fewer than it gives a batch; lower "
                    "training.batch_size or data.readers"
                )

    def _epoch(self, reader: int, epoch: int, start: int, pool: Executor) -> Iterator[tuple[_Block, int]]:
        """Rows of an epoch after the first `start`; the next block is read while one is used."""
        number, passed = divmod(start, self.block_size)
        rows = self.stream.readers[reader].read(number * self.block_size)
        coming = pool.submit(_block, rows, self.block_size)
        while (block := coming.result()).rows:
            if len(block.rows) == self.block_size:
                coming = pool.submit(_block, rows, self.block_size)
            order = _permutation(len(block.rows), self.seed, reader, epoch, number)
            yield from ((block, int(place)) for place in order[passed:])
            if len(block.rows) < self.block_size:
                return
            number, passed = number + 1, 0


def find_present(source: MapSource, columns: Sequence[str]) -> np.ndarray:
    """Numbers of the rows that have all of these columns, int64; a warning says how many have not.

    Raises:
        DataError: where there are none.
    """
    present = source.present(columns)
    names = " and ".join(columns)
    if not len(present):
        if not len(source):
            raise DataError(f"{source.name} has no rows")
        each = ", ".join(f"{len(source.present([column]))} have {column}" for column in dict.fromkeys(columns))
        shards = "; in a tar file the parts of a row follow each other" if len(columns) > 1 else ""
        raise DataError(f"{source.name} has no row with {names}: of {len(source)} rows {each}{shards}")
    if len(present) < len(source):
        missing = len(source) - len(present)
        log.warning("%s: %d of %d rows have no %s and are left out", source.name, missing, len(source), names)
    return present


def _pick(picked: list[tuple[_Block, int]]) -> Picked:
    return Picked(
        [block.numbers[place] for block, place in picked],
        [block.rows[place] for block, place in picked],
        lambda position: _after(*picked[position]),
    )


def _after(block: _Block, place: int) -> Iterator[tuple[int, Row | None]]:
    for distance in range(1, min(NEIGHBORS + 1, len(block.rows))):
        other = (place + distance) % len(block.rows)
        yield block.numbers[other], block.rows[other]


def _block(rows: Iterator[tuple[int, Row]], size: int) -> _Block:
    some = list(islice(rows, size))
    return _Block([number for number, _ in some], [row for _, row in some])


def _permutation(rows: int, *seed: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(mix_seed(*seed))
    return torch.randperm(rows, generator=generator).numpy()
