"""From what a Hugging Face data set has stored to the rows of a source, and from what it raises to one sentence."""

from __future__ import annotations

import lzma
import os
import re
import tarfile
import traceback
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmssl.data.base import Row
from mmssl.data.files import BUILDERS, JSON, TEXT, extension
from mmssl.errors import DataError

# What `datasets` and pyarrow say of files without rows: of a table, of parquet, and of a tar file.
_EMPTY = re.compile(
    r"corresponds to no data|^BatchSize must be greater|^Must pass at least one table|^No columns to parse"
)
# What `datasets` says where files of one source differ in columns.
_COLUMNS = re.compile(r"but at some point there are (.*?) This happened while .*? generating data using ([^,]*)")
# What pyarrow says where files of one source have other columns, or the same in another order.
_ORDER = re.compile(r"Schema at index \d+ was different: (.*) vs (.*)")
# What unpacking a damaged file raises.
_BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
# Of a tar file of WebDataset: what comes before the first dot is the row, after it the column.
MEMBER = re.compile(r"(?:.*/)?[^./]+\.[^/]+")
# Rows of a column that are looked at together.
MANY = 100_000
Folders = Mapping[str, Path]
Merged = Mapping[str, Sequence[str]]


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns what reading a data set raises into one sentence about it."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from datasets.table import CastError

    try:
        yield
    except StopIteration as error:  # of a file without a byte
        raise DataError(f"{name} holds no rows") from error
    except KeyError as error:
        if not _innermost(error).startswith("datasets."):
            raise  # a mistake of ours
        raise DataError(f"{name}: some of its files have no column {error}; give all the same") from error
    except (OSError, ValueError, TypeError, ImportError, DatasetsError, *_BROKEN) as error:
        if isinstance(error, TypeError) and "Couldn't cast" not in str(error):
            raise
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = " ".join(str(cause).split()).removeprefix(f"{name}: ")
        file = _read_last(cause)
        place = f"{name}: {file}" if file and not name.endswith(file) else name
        if differs := _COLUMNS.search(reason):
            columns, file = differs.groups()
            reason = (
                f"its files differ in columns, {Path(file).name} has {columns}; give all the same, or name one file"
            )
        elif isinstance(cause, CastError):
            have, wanted = ", ".join(cause.table_column_names), ", ".join(cause.requested_column_names)
            reason = f"its columns are {have}, and those of the first file {wanted}; give all the same"
        elif order := _ORDER.search(reason):
            reason = f"its files differ in columns or their order, {order[1]} and {order[2]}; give all the same"
        elif reason.endswith("to null"):
            reason = "the first file has no value in a column in which this one has some; put one with values first"
        elif "range requests" in reason:
            reason = "the server answers with whole files, not with parts of them; download it"
        elif "zstd" in reason:
            reason += "; `pip install zstandard` reads it, or unpack it: `unzstd`"
        elif "JSON parse error" in reason:
            reason += '; each line should be an object, as in {"text": "some words"}, in UTF-8'
        if isinstance(cause, UnicodeDecodeError):
            reason += "; text should be UTF-8: `iconv -f latin1 -t utf-8` converts it, `iconv -c -t utf-8` cleans it"
        elif "surrogate" in reason:
            reason += "; whoever wrote it cut a character in two: in Python, text.encode('utf-8', 'replace').decode()"
        if _EMPTY.search(reason):
            raise DataError(f"{place} holds no rows") from error
        raise DataError(f"{place}: cannot be read: {reason}") from error


def _innermost(error: BaseException) -> str:
    """The module whose code raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", ""))


def _read_last(error: BaseException) -> str | None:
    """The file, and of a tar file the member, that a reader of `datasets` was at; None where it was at none.

    Its errors do not say it, but what it held does, whatever it calls it: the path of a table, the name of a member.
    """
    told = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__", "")).startswith("datasets.packaged_modules."):
            told = _file_among([value for value in frame.f_locals.values() if isinstance(value, str)]) or told
    return told


def _file_among(texts: Collection[str]) -> str | None:
    """The table, text or tar file whose path is among texts, and the longest that may be the name of a member."""
    known = {**BUILDERS, **TEXT, **JSON}
    path = next((one for one in texts if extension(one) in known and ("://" in one or os.path.isfile(one))), None)
    if path is None:
        return None
    members = [one for one in texts if one != path and MEMBER.fullmatch(one)] if extension(path) == ".tar" else []
    return ", ".join(Path(one).name for one in [path, *sorted(members, key=len)[-1:]])


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
