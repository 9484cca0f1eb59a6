"""Which rows a batch has: a function of (seed, step) alone, for tables and for streams.

A table is read in a new permutation every epoch; a stream in its own order, permuted in blocks. What is left over at
the end of an epoch is dropped, so that no batch holds a row twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from mmssl.data.base import MapSource, Row
from mmssl.data.sources import StreamSource
from mmssl.errors import DataError
from mmssl.ops.draws import mix_seed

# Rows after an undecodable one that are tried in its place.
NEIGHBORS = 100

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
        steps_per_epoch: whole batches in the source.

    Raises:
        DataError: where there are fewer rows than in a batch.
    """

    def __init__(self, source: MapSource, columns: Sequence[str], batch_size: int, seed: int) -> None:
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.present = find_present(source, columns)
        _check_enough(source.name, len(self.present), batch_size)
        self.steps_per_epoch = len(self.present) // batch_size

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
    first: int
    rows: list[Row]


class StreamOrder:
    """The order of the source, permuted in blocks.

    To begin in the middle of an epoch, what is before the first block that is needed is passed over undecoded. How
    many rows there are is known after the first epoch; a start beyond it costs one more pass, which counts them.

    Args:
        source: of sequential access.
        block_size: rows of a block; two blocks or three are held in memory, undecoded.
        batch_size: rows of the global batch.
        seed: of the permutations.

    Attributes:
        steps_per_epoch: whole batches in the source; None until its end was seen.
    """

    def __init__(self, source: StreamSource, block_size: int, batch_size: int, seed: int) -> None:
        self.source, self.block_size, self.batch_size, self.seed = source, block_size, batch_size, seed
        self.steps_per_epoch: int | None = None

    def picks(self, start: int, stop: int, mine: slice) -> Iterator[Picked]:
        """Rows `mine` of the global batches `start` to `stop - 1`.

        Raises:
            DataError: where the stream has fewer rows than a batch, or than it had before.
        """
        step = start
        while step < stop:
            epoch, within = divmod(step, self.steps_per_epoch) if self.steps_per_epoch else (0, step)
            number, passed = divmod(within * self.batch_size, self.block_size)
            needed = -(-(passed + (stop - step) * self.batch_size) // self.block_size)
            waiting: list[tuple[_Block, int]] = []
            end = None
            for block in _ahead(self._blocks(number, needed)):
                order = _permutation(len(block.rows), self.seed, epoch, block.first // self.block_size)
                waiting += [(block, int(place)) for place in order[passed:]]
                passed, end = 0, block.first + len(block.rows)
                while len(waiting) >= self.batch_size and step < stop:
                    yield _pick(waiting[: self.batch_size][mine])
                    waiting = waiting[self.batch_size :]
                    step += 1
            if step == stop:
                return
            if self.steps_per_epoch is None:
                rows = self.source.count() if end is None else end
                _check_enough(self.source.name, rows, self.batch_size)
                self.steps_per_epoch = rows // self.batch_size
            elif step < (epoch + 1) * self.steps_per_epoch:
                raise DataError(f"{self.source.name} ended after {end} rows, in an earlier epoch it had more")

    def _blocks(self, number: int, count: int) -> Iterator[_Block]:
        rows = self.source.rows(skip=number * self.block_size)
        for index in range(number, number + count):
            block = list(islice(rows, self.block_size))
            if block:
                yield _Block(index * self.block_size, block)
            if len(block) < self.block_size:
                return


def find_present(source: MapSource, columns: Sequence[str]) -> np.ndarray:
    """Numbers of the rows that have all of these columns, int64; a warning says how many have not.

    Raises:
        DataError: where there are none.
    """
    present = source.present(columns)
    names = " and ".join(columns)
    if not len(present):
        raise DataError(f"{source.name} has no row with {names}" if len(source) else f"{source.name} has no rows")
    if len(present) < len(source):
        missing = len(source) - len(present)
        log.warning("%s: %d of %d rows have no %s and are left out", source.name, missing, len(source), names)
    return present


def _pick(waiting: list[tuple[_Block, int]]) -> Picked:
    return Picked(
        [block.first + place for block, place in waiting],
        [block.rows[place] for block, place in waiting],
        lambda position: _after(*waiting[position]),
    )


def _after(block: _Block, place: int) -> Iterator[tuple[int, Row | None]]:
    for distance in range(1, min(NEIGHBORS + 1, len(block.rows))):
        other = (place + distance) % len(block.rows)
        yield block.first + other, block.rows[other]


def _ahead(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """The same blocks; the next one is read while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = pool.submit(next, blocks, None)
            yield block


def _permutation(rows: int, *seed: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(mix_seed(*seed))
    return torch.randperm(rows, generator=generator).numpy()


def _check_enough(name: str, rows: int, batch_size: int) -> None:
    if rows < batch_size:
        raise DataError(
            f"{name} has {rows} usable rows, fewer than the batch of {batch_size}; lower training.batch_size"
        )
