"""Files of a stream, kind by kind: how many rows each has, and at which places reading it can begin.

Rows are those that have what is read: one that lacks it is none. They are the same, and in the same order, as those of
`StreamSource.present`, which reads all files from the first to the last.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Container, Iterator, Sequence
from functools import reduce
from itertools import chain
from operator import and_, or_
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from mmssl.data.base import Row
from mmssl.data.ranges import Ranges
from mmssl.data.shards import Shards
from mmssl.data.stored import explained, resolved, stored
from mmssl.data.stream import StreamSource, not_blank
from mmssl.errors import DataError

if TYPE_CHECKING:
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

# Bytes of text between two places: a 256th of the file, within these bounds.
LEAST, MOST = 2**12, 2**20
ROWS_AT_A_TIME = 64


class Found(NamedTuple):
    """What looking through a file tells.

    Attributes:
        rows: how many it has.
        places: row and place at which reading can begin: number of a row group or record batch, or byte.
    """

    rows: int
    places: list[tuple[int, int]]


class Files:
    """Files that can be read from their beginning only: csv, compressed ones, and whatever else `datasets` reads.

    Args:
        source: the stream, of the columns that are read.
        requires: columns that no row may lack.

    Attributes:
        names: path or address of each.
        divisible: whether several readers may share a file.
    """

    divisible = False

    def __init__(self, source: StreamSource, requires: Sequence[str]) -> None:
        self.source = source
        self.columns = stored(source.columns, source.merged)
        self.groups = [stored([column], source.merged) for column in requires]
        self.kwargs: dict[str, Any] = getattr(source.loaded._ex_iterable, "kwargs", {})
        self.names = _names(self.kwargs) or [f"part {number}" for number in range(source.loaded.num_shards)]

    def called(self, number: int) -> str:
        """What a message calls a file: by its name, where it has one."""
        return self.names[number] if _names(self.kwargs) else self.source.name

    def find(self, number: int) -> Found | None:
        """Look through a file; None for one of which only reading all of it would tell."""
        return None

    def rows(self, number: int, places: Sequence[int], end: int | None) -> Iterator[tuple[int | None, Row]]:
        """Rows of a file from the first of these places to the end of the last one.

        Args:
            number: of the file.
            places: some that follow each other.
            end: the one after them, None for the end of the file.

        Returns:
            Rows, each with a place of its own where reading tells one.
        """
        one = self.source.loaded.shard(num_shards=len(self.names), index=number, contiguous=True)
        sequential = StreamSource(
            one, self.called(number), self.source.folders, self.source.merged, None, self.source.blanks
        )
        required = [column for column in sequential.columns if stored([column], self.source.merged) in self.groups]
        for row in sequential.present(required).select(self.source.columns).rows():
            yield None, row


class TableFiles(Files):
    """Files of which a part is read as a table at once; readers that are in the same part share it."""

    divisible = True

    def __init__(self, source: StreamSource, requires: Sequence[str]) -> None:
        super().__init__(source, requires)
        self._parts: WeakValueDictionary[tuple[int, int], Table] = WeakValueDictionary()

    def rows(self, number: int, places: Sequence[int], end: int | None) -> Iterator[tuple[int | None, Row]]:
        """See `Files`."""
        with explained(self.called(number)):
            for place, following in zip(places, [*places[1:], end], strict=True):
                table = self._parts.get((number, place))
                if table is None:
                    table = self._parts[number, place] = self._kept(number, self._read(number, place, following))
                for batch in table.to_batches(max_chunksize=ROWS_AT_A_TIME):
                    for row in batch.to_pylist():
                        yield None, resolved(row, self.source.folders, self.source.merged)

    def find(self, number: int) -> Found | None:
        """See `Files`."""
        with explained(self.called(number)):
            places = self._places(number)
            counts = [self._count(number, *part) for part in zip(places, [*places[1:], None], strict=True)]
        return Found(sum(counts), list(zip(np.cumsum([0, *counts])[:-1].tolist(), places, strict=True)))

    def _places(self, number: int) -> list[int]:
        raise TypeError(f"{type(self).__name__} has no places")

    def _read(self, number: int, place: int, following: int | None) -> Table:
        """All rows between two places, or to the end."""
        raise TypeError(f"{type(self).__name__} has no tables")

    def _count(self, number: int, place: int, following: int | None) -> int:
        return self._kept(number, self._read(number, place, following)).num_rows

    def _check(self, number: int, columns: Container[str]) -> None:
        """Raise DataError where a file lacks a column that is read."""
        for name in self.columns:
            if name not in columns:
                raise DataError(
                    f"{self.called(number)} has no column '{name}', which other files have; give all the same"
                )

    def _kept(self, number: int, table: Table) -> Table:
        """The rows that have what is read."""
        import datasets
        import pyarrow as pa
        from datasets.table import table_cast

        if not table.num_rows:
            return table
        self._check(number, table.column_names)
        valid = [reduce(or_, (table[name].is_valid().to_numpy() for name in group)) for group in self.groups]
        if self.source.blanks:
            valid.append(np.fromiter((not_blank(text) for text in table["text"].to_pylist()), bool, table.num_rows))
        if valid and not (kept := reduce(and_, valid)).all():
            table = table.filter(pa.array(kept))
        table = table.select(self.columns)
        features = self.source.loaded.features
        if not features:
            return table
        return table_cast(table, datasets.Features({name: features[name] for name in self.columns}).arrow_schema)


class ParquetFiles(TableFiles):
    """Places are row groups."""

    def __init__(self, source: StreamSource, requires: Sequence[str]) -> None:
        super().__init__(source, requires)
        self._footers: dict[int, tuple[Any, int]] = {}

    def _places(self, number: int) -> list[int]:
        return list(range(self._opened(number).num_row_groups))

    def _read(self, number: int, place: int, following: int | None) -> Table:
        return self._opened(number).read_row_group(place, columns=self.columns, use_threads=False)

    def _count(self, number: int, place: int, following: int | None) -> int:
        group = self._opened(number).metadata.row_group(place)
        leaves = [group.column(leaf) for leaf in range(group.num_columns)]
        whole = {
            leaf.path_in_schema.split(".")[0]
            for leaf in leaves
            if leaf.is_stats_set and leaf.statistics.has_null_count and leaf.statistics.null_count == 0
        }
        if group.num_rows:
            self._check(number, {leaf.path_in_schema.split(".")[0] for leaf in leaves})
        unsure = [name for names in self.groups if not whole & {*names} for name in names]
        if not unsure:
            return int(group.num_rows)
        table = self._opened(number).read_row_group(place, columns=unsure, use_threads=False)
        groups = [names for names in self.groups if {*names} <= {*unsure}]
        return int(
            reduce(and_, (reduce(or_, (table[n].is_valid().to_numpy() for n in names)) for names in groups)).sum()
        )

    def _opened(self, number: int) -> ParquetFile:
        """A file, whose footer and size are asked for once."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        footer, size = self._footers.get(number, (None, None))
        raw = Ranges(self.names[number], end=size)
        opened = ParquetFile(pa.PythonFile(raw, mode="r"), metadata=footer, pre_buffer=True)
        self._footers[number] = opened.metadata, raw.size
        return opened


class ArrowFiles(TableFiles):
    """Places are record batches; files are mapped into memory, so that passing one over reads nothing."""

    def _places(self, number: int) -> list[int]:
        return list(range(len(list(self._batches(number)))))

    def _read(self, number: int, place: int, following: int | None) -> Table:
        import pyarrow as pa

        return next(pa.Table.from_batches([batch]) for n, batch in enumerate(self._batches(number)) if n == place)

    def _batches(self, number: int) -> Iterator[Any]:
        import pyarrow as pa

        mapped = pa.memory_map(self.names[number])
        try:
            yield from pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(mapped)
            yield from (opened.get_batch(batch) for batch in range(opened.num_record_batches))


class LineFiles(TableFiles):
    """Texts and JSON, a row a line. Places are the bytes at which some lines begin."""

    def _places(self, number: int) -> list[int]:
        with open(self.names[number], "rb") as file:
            size = file.seek(0, os.SEEK_END)
            step = min(max(size // 256, LEAST), MOST)
            places = [0]
            while (wanted := places[-1] + step) < size:
                file.seek(wanted)
                file.readline()
                if file.tell() >= size:
                    break
                places.append(file.tell())
        return places

    def _read(self, number: int, place: int, following: int | None) -> Table:
        """By the reader of `datasets`, which takes files."""
        import pyarrow as pa

        with Ranges(self.names[number], place) as file:
            content = file.read(-1 if following is None else following - place)
        if not content.strip():
            return pa.table({column: [] for column in self.columns})
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder, Path(self.names[number]).name)  # which errors name
            part.write_bytes(content)
            one = {
                key: [value[number]] if isinstance(value[number], str) else [[str(part)]]
                for key, value in self.kwargs.items()
            }
            return pa.concat_tables([table for _, table in self.source.loaded._ex_iterable.generate_tables_fn(**one)])


class TarFiles(Files):
    """Webdataset shards. Places are the bytes at which samples begin."""

    def __init__(self, source: StreamSource, requires: Sequence[str]) -> None:
        super().__init__(source, requires)
        self.shards = Shards(self.names)
        self.divisible = not any("://" in name for name in self.names)

    def find(self, number: int) -> Found | None:
        """See `Files`; of shards at addresses, what an index beside them says."""
        with explained(self.called(number)):
            places = self.shards.places(number, self._has_each)
            if places is not None:
                return Found(len(places), list(enumerate(places))[:: max(1, len(places) // 256)] or [(0, 0)])
            rows = self.shards.rows_by_index(number)
        return None if rows is None else Found(rows, [(0, 0)])

    def rows(self, number: int, places: Sequence[int], end: int | None) -> Iterator[tuple[int | None, Row]]:
        """See `Files`."""
        import datasets

        features = self.source.loaded.features
        wanted = datasets.Features({name: features[name] for name in self.columns})
        with explained(self.called(number)):
            for place, sample in self.shards.samples(number, places[0], end):
                if self._has_each(sample):
                    row = wanted.encode_example({name: sample.get(name) for name in self.columns})
                    yield place, resolved(row, self.source.folders, self.source.merged)

    def _has_each(self, sample: Container[str]) -> bool:
        return all(any(name in sample for name in group) for group in self.groups)


def files_of(source: StreamSource, requires: Sequence[str]) -> Files:
    """The files of a stream, as the kind that they are; see `Files`."""
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.text.text import Text
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    made = source.loaded._ex_iterable
    generate = getattr(made, "generate_tables_fn", None) or getattr(made, "generate_examples_fn", None)
    builder = getattr(generate, "__self__", None)
    plain = Files(source, requires)
    if any("::" in name for name in plain.names):
        return plain
    here = all(os.path.isfile(name) for name in plain.names)
    if isinstance(builder, Parquet):
        return ParquetFiles(source, requires)
    if isinstance(builder, WebDataset):
        return TarFiles(source, requires)
    if isinstance(builder, Arrow) and here:
        return ArrowFiles(source, requires)
    lines = isinstance(builder, Text) or (isinstance(builder, Json) and source.loaded.features is not None)
    if lines and here and not any(_is_list_or_packed(name) for name in plain.names):
        return LineFiles(source, requires)
    return plain


def _is_list_or_packed(file: str) -> bool:
    """Whether a file is one JSON list, or compressed."""
    with open(file, "rb") as opened:
        head = opened.read(64)
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") or head[:2] in (b"\x1f\x8b", b"PK", b"BZ")


def _names(kwargs: dict[str, Any]) -> list[str]:
    """Of all files, in order."""
    for key in ("base_files", "tar_paths", "files"):
        if key in kwargs:
            return [name if isinstance(name, str) else next(iter(chain(name))) for name in kwargs[key]]
    return []
