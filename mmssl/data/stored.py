"""From what a Hugging Face data set has stored to the rows of a source, and from what it raises to one sentence."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmssl.data.base import Row
from mmssl.errors import DataError

# What `datasets` and pyarrow say of files without rows: of a table, of parquet, and of a tar file.
_EMPTY = re.compile(
    r"corresponds to no data|^BatchSize must be greater|^Must pass at least one table|^No columns to parse"
)
# What `datasets` says where files of one source differ in columns.
_COLUMNS = re.compile(r"but at some point there are (.*?) This happened while .*? generating data using ([^,]*)")
# Rows of a column that are looked at together.
MANY = 100_000
Folders = Mapping[str, Path]
Merged = Mapping[str, Sequence[str]]


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns what reading a data set raises into one sentence about it."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        yield
    except (OSError, ValueError, ImportError, DatasetsError, tarfile.TarError, EOFError, zlib.error) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = " ".join(str(cause).split())
        if differs := _COLUMNS.search(reason):
            columns, file = differs.groups()
            reason = (
                f"its files differ in columns, {Path(file).name} has {columns}; give all the same, or name one file"
            )
        if isinstance(cause, UnicodeDecodeError):
            reason += "; text should be UTF-8: `iconv -f latin1 -t utf-8` converts it, `iconv -c -t utf-8` cleans it"
        elif "surrogate" in reason:
            reason += "; whoever wrote it cut a character in two: in Python, text.encode('utf-8', 'replace').decode()"
        if _EMPTY.search(reason):
            raise DataError(f"{name} holds no rows") from error
        raise DataError(f"{name}: cannot be read: {reason}") from error


def resolved(row: Row, folders: Folders, merged: Merged) -> Row:
    """A row as a reader sees it: paths from the folder that they are relative to, merged columns as one."""
    found = {c: str(folder / row[c]) for c, folder in folders.items() if isinstance(row.get(c), str)}
    chosen = {c: first(row.get(name) for name in names) for c, names in merged.items() if c in row}
    hidden = {name for c, names in merged.items() for name in names if name != c}
    return {c: cell for c, cell in row.items() if c not in hidden} | found | chosen


def first(cells: Iterable[Any]) -> Any:
    """The first cell that holds something."""
    return next((cell for cell in cells if cell is not None), None)


def visible(columns: Iterable[str], merged: Merged) -> tuple[str, ...]:
    """Columns as a reader sees them."""
    hidden = {name for column, names in merged.items() for name in names if name != column}
    return tuple(column for column in columns if column not in hidden)


def stored(columns: Iterable[str], merged: Merged) -> list[str]:
    """Columns as the data set has them."""
    return list(dict.fromkeys(name for column in columns for name in merged.get(column, (column,))))


def distinct(dataset: Any, column: str) -> Iterator[Any]:
    """Different cells of a column, found without making an object of each; where cells are nested, every one.

    Args:
        dataset: of `datasets`, a table or a stream.
        column: as it is stored.
    """
    import pyarrow as pa
    from pyarrow import compute

    seen: set[Any] = set()
    for table in dataset.select_columns([column]).with_format("arrow").iter(MANY):
        cells = table[column]
        if pa.types.is_nested(cells.type):
            yield from cells.to_pylist()
        else:
            new = [cell for cell in compute.unique(cells).to_pylist() if cell not in seen]
            seen.update(new)
            yield from new
