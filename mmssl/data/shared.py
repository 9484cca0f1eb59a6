"""A stream shared by a fixed number of readers, so that every process reads only what its rows come from.

Readers are no processes: they are disjoint parts of the stream, in the order of its files, and their number is the
recipe's. A row of the global batch always comes from the same ones, whoever reads them. Where the rows of all files are
known, each reader has equally many of them, to one, in files or parts of files; else each has whole files, and begins
anew at its own end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import gcd
from typing import Any, NamedTuple

from mmssl.data.base import Row
from mmssl.data.packing import NOTE, Packing, Place, packed_rows
from mmssl.data.stream import StreamSource
from mmssl.data.stream_files import Found, files_of
from mmssl.data.stream_index import Index, before
from mmssl.errors import DataError, without_passwords

FEWEST_ROWS = 16
"""Of a reader: a stream that is too small for `data.readers` is shared by fewer."""
LOOKING = 16
"""Files that are looked through at a time."""
NUMBERED_APART = 2**32
"""Rows of a file, where numbers of rows begin anew with each file."""
TOKENS = 2**32

log = logging.getLogger(__name__)


class Division(NamedTuple):
    """How rows of the global batch come from readers.

    The batch is cut into as many groups of rows as it can, `gcd(batch, readers)`, and each is served by its own readers
    in turn. A process whose number divides both has whole groups.

    Attributes:
        readers: their number.
        rows: of a group in a batch.
        turns: readers of a group.
    """

    readers: int
    rows: int
    turns: int

    @classmethod
    def of(cls, readers: int, batch_size: int) -> Division:
        """For a batch of so many rows."""
        groups = gcd(readers, batch_size)
        return cls(readers, batch_size // groups, readers // groups)

    def reader(self, step: int, row: int) -> int:
        """Who gives a row of the batch of a step."""
        group, place = divmod(row, self.rows)
        return group * self.turns + (step * self.rows + place) % self.turns

    def given(self, reader: int, steps: int) -> int:
        """Rows that a reader has given in the first steps."""
        return max(0, -(-(steps * self.rows - reader % self.turns) // self.turns))

    def sizes(self, rows: int) -> list[int]:
        """Rows of each reader, equal to one; the first of each group have one more."""
        groups = self.readers // self.turns
        return [
            rows // self.readers + (reader % self.turns * groups + reader // self.turns < rows % self.readers)
            for reader in range(self.readers)
        ]

    def steps(self, rows: int) -> int:
        """Whole batches that all readers together have."""
        return rows // (self.readers // self.turns) // self.rows


class Span(NamedTuple):
    """Rows of a file, up to its end where `stop` is None; `number` is that of the first of the file's rows."""

    file: int
    start: int
    stop: int | None
    number: int


class SharedStream:
    """The files of a stream, and who reads which rows of them.

    Args:
        source: the stream, of the columns that are read.
        requires: columns that no row may lack; one that does is none.
        readers: at most so many, as a divisor of this number.
        batch_size: rows of the global batch.
        index: what is known of the files.
        packing: of texts into full rows; None for rows as they are.

    Attributes:
        readers: each with its part.
        rows: of all of them; None where only reading tells.
        steps_per_epoch: whole batches of these; None where rows are not known, or packed.
        notes: what is not as a user may think, a sentence each.

    Raises:
        DataError: where there are no rows, or fewer than in a batch.
    """

    def __init__(
        self,
        source: StreamSource,
        requires: Sequence[str],
        *,
        readers: int,
        batch_size: int,
        index: Index,
        packing: Packing | None = None,
    ) -> None:
        self.source, self.index, self.packing = source, index, packing
        self.files = files_of(source, requires)
        self.rows = self._look(source.limit)
        if self.rows == 0:
            names = " and ".join(requires)
            raise DataError(f"{source.name} has no row with {names}" if names else f"{source.name} has no rows")
        self.notes = [NOTE] if packing else []
        self.division = Division.of(self._number(readers), batch_size)
        self.steps_per_epoch = None
        if self.rows is not None and packing is None:
            check_enough(source.name, self.rows, batch_size)
            self.steps_per_epoch = self.division.steps(self.rows)
        make = Reader if packing is None else PackedReader
        self.readers = [make(self, number, spans) for number, spans in enumerate(self._spans())]

    @property
    def described(self) -> str:
        """How large it is and who shares it, which a resumed run has to find again."""
        size = f"{self.rows:,} rows" if self.rows is not None else f"{len(self.files.names):,} files"
        return f"a stream of {size} for {self.division.readers} readers"

    def read(self, span: Span, start: int) -> Iterator[Row]:
        """Rows of a span after the first `start`."""
        file = self.files.names[span.file]
        known, learning = self.index[file], not self.files.divisible
        first, places = span.start + start, known.places
        begin = before(places, first)
        end = len(places) if span.stop is None else before(places, span.stop - 1) + 1
        row = places[begin][0]
        following = places[end][1] if end < len(places) else None
        for place, one in self.files.rows(span.file, [place for _, place in places[begin:end]], following):
            if learning and place is not None:
                self.index.learn(file, row, place)
            if row >= first:
                yield one
            row += 1
            if row == span.stop:
                return
        if span.stop is None:
            self.index.end(file, row)
        else:
            raise DataError(f"{self.source.name}: {file} ended after {row} rows, it had {known.rows} before")

    def _look(self, limit: int | None) -> int | None:
        """Look through the files that are not known yet, up to the limit; how many rows all have."""
        unknown = [n for n, file in enumerate(self.files.names) if not self.index[file].found]
        if len(unknown) > LOOKING:
            kept = f", and keeping what is found in {self.index.path}" if self.index.path else ""
            told = without_passwords(self.source.name)
            log.warning("%s: looking through %d files once%s", told, len(unknown), kept)
        with ThreadPoolExecutor(LOOKING) as pool:
            for first in range(0, len(unknown), LOOKING):
                if limit and self._known_rows >= limit:
                    break
                some = unknown[first : first + LOOKING]
                for number, found in zip(some, pool.map(self.files.find, some), strict=True):
                    if found is None:
                        if limit is None:
                            return None
                        # So few are counted by reading them.
                        rows = islice(self.files.rows(number, [0], None), limit - self._known_rows)
                        found = Found(sum(1 for _ in rows), [(0, 0)])
                    self.index.keep(self.files.names[number], found.rows, found.places)
        return min(self._known_rows, limit or self._known_rows)

    @property
    def _known_rows(self) -> int:
        return sum(self.index[file].rows or 0 for file in self.files.names)

    def _number(self, wanted: int) -> int:
        """Of readers: as many as wanted, or the largest divisor of it that the stream is large enough for."""
        name, files = self.source.name, len(self.files.names)
        if self.rows is not None:
            files = sum(bool(self.index[file].rows) for file in self.files.names)
        most = wanted
        if self.rows is not None:
            most = min(most, max(1, self.rows // FEWEST_ROWS))
        if self.rows is None or not self.files.divisible:
            most = min(most, files)
        number = max(divisor for divisor in range(1, most + 1) if wanted % divisor == 0)
        if number < wanted:
            why = f"{self.rows:,} rows" if self.rows is not None and most > files else f"{files:,} files"
            self.notes.append(f"{number} readers in place of data.readers = {wanted}, for {name} has {why}")
        return number

    def _spans(self) -> list[list[Span]]:
        names, readers = self.files.names, self.division.readers
        if self.rows is None:
            bounds = [reader * len(names) // readers for reader in range(readers + 1)]
            apart = NUMBERED_APART if len(names) > 1 else 0
            return [
                [Span(file, 0, None, file * apart) for file in range(bounds[reader], bounds[reader + 1])]
                for reader in range(readers)
            ]
        spans: list[list[Span]] = []
        file = start = number = 0
        for size in self.division.sizes(self.rows):
            own: list[Span] = []
            while size:
                rows = self.index[names[file]].rows or 0
                stop = min(rows, start + size)
                if stop > start:
                    own.append(Span(file, start, stop, number))
                size -= stop - start
                start = stop
                if start == rows and size:
                    file, start, number = file + 1, 0, number + rows
            spans.append(own)
        return spans


class Reader:
    """One of the readers, who goes through its rows again and again.

    Args:
        stream: what it reads.
        number: among the readers.
        spans: its rows.
    """

    def __init__(self, stream: SharedStream, number: int, spans: Sequence[Span]) -> None:
        self.stream, self.number, self.spans = stream, number, spans

    @property
    def rows(self) -> int | None:
        """How many it has; None until its end was seen."""
        sizes = [self._size(span) for span in self.spans]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def read(self, start: int) -> Iterator[tuple[int, Row]]:
        """Number and row, from its `start`-th row to its last one."""
        for span in self.spans:
            size = self._size(span)
            if size is not None and start >= size:
                start -= size
                continue
            yield from enumerate(self.stream.read(span, start), span.number + span.start + start)
            start = max(0, start - (self._size(span) or 0))

    def _size(self, span: Span) -> int | None:
        if span.stop is not None:
            return span.stop - span.start
        return self.stream.index[self.stream.files.names[span.file]].rows


class PackedReader(Reader):
    """A reader whose rows are packed of its documents; how many there are is known once it has seen all of them."""

    @property
    def rows(self) -> int | None:
        """See `Reader`."""
        return self.stream.index[self._name].rows

    @property
    def _name(self) -> str:
        documents = f"{self.spans[0].number + self.spans[0].start} to {self.spans[-1].stop} of {self.stream.rows}"
        return f"packed by reader {self.number} of {self.stream.division.readers}, documents {documents}"

    def read(self, start: int) -> Iterator[tuple[int, Row]]:
        """See `Reader`."""
        packing, known = self.stream.packing, self.stream.index[self._name]
        assert packing is not None  # else there would be no such reader
        row, place = known.places[before(known.places, start)]
        at = Place(*divmod(place, TOKENS))
        texts: Iterator[Any] = (document[packing.column] for _, document in super().read(at.document))
        for begin, cell in packed_rows(texts, packing, at):
            self.stream.index.learn(self._name, row, begin.document * TOKENS + begin.token)
            if row >= start:
                yield self.number * NUMBERED_APART + row, cell
            row += 1
        self.stream.index.end(self._name, row)


def check_enough(name: str, rows: int, batch_size: int) -> None:
    """Raise DataError where there are fewer rows than in a batch."""
    if rows < batch_size:
        way_out = f"; lower training.batch_size (--set training.batch_size={rows})" if rows else ""
        raise DataError(f"{name} has {rows} usable rows, fewer than the batch of {batch_size}{way_out}")
