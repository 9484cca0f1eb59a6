"""A file with a line for each row of a source, beside its columns: made in parts, each kept until the file is whole.

Parts are files of a folder beside the target. A call that was killed leaves those that it finished, and the same call
goes on after them; the target appears in one step, when all of it is there.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmssl.adaptation.rows import Reads, SourceSplit, in_order, open_rows
from mmssl.atomic import flush, temporary_name, write_text
from mmssl.batch import Batch
from mmssl.data.digest import digest
from mmssl.data.features import name_of
from mmssl.data.stream import StreamSource
from mmssl.embedding_files import FORMATS
from mmssl.errors import DataError, RecipeError, RunError
from mmssl.media.cell import Dropped, plain
from mmssl.recipe import Data
from mmssl.training.lock import locked
from mmssl.way_on import repeated

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger("mmssl")
ID = "id"
BATCHES = 16
"""Of a part: what is lost, and held in memory, at most."""


def check_target(to: str | Path, formats: Collection[str], what: str, force: bool) -> Path:
    """The file that is written.

    Args:
        to: where.
        formats: suffixes that it may have.
        what: is written, for errors.
        force: write over a file that is there.

    Raises:
        RecipeError: for another kind of file.
        RunError: where it is there.
    """
    target = Path(to)
    if target.suffix not in formats:
        raise RecipeError(f"{target}: {what} are written as {' or '.join(formats)}")
    if target.exists() and not force:
        raise RunError(f"{target} is there already; name another file, or write over it with --force (force=True)")
    return target


class EveryRow:
    """The rows of a source that have what is read, in order; those that cannot be decoded are left out and told.

    Args:
        data: as for `mmssl.adapt`, but no batches.
        reads: what is read of a row.
        how: rows are decoded.
        columns: batch key -> column.
        split: of a source that is named.
        limit: only so many rows, spread over the split; of a stream the first ones.
        batch_size: rows that are read at a time.
        what: reads them, for errors.

    Raises:
        RecipeError: for a number that makes no sense.
        DataError: for rows that are not there.
    """

    def __init__(
        self,
        data: Any,
        reads: Reads,
        how: Data,
        *,
        columns: Mapping[str, str] | None,
        split: str,
        limit: int | None,
        batch_size: int,
        what: str,
    ) -> None:
        for name, value in {"limit": limit, "batch_size": batch_size}.items():
            if value is not None and value < 1:
                raise RecipeError(f"{name} = {value}: expected at least 1")
        # What is said of a row does not depend on the others: all that can be decoded have a line.
        with repeated():
            rows = open_rows(data, reads, how, columns, None, split, max_bad=1.0)
        if not isinstance(rows, SourceSplit):
            raise DataError(f"{what} reads a source or a data set; of batches, take mmssl.adaptation.features")
        if isinstance(rows.source, StreamSource):
            total = rows.source.count()
            self.chosen = np.arange(min(limit or total, total))
        else:
            total = len(rows.source)
            number = min(limit or total, total)
            self.chosen = np.intersect1d(np.arange(number) * total // max(1, number), rows.present(total))
        self.rows, self.batch_size, self.limit = rows, batch_size, limit

    @property
    def plan(self) -> dict[str, Any]:
        """What the lines depend on besides what is made of a row."""
        decoding = self.rows.spec.model_dump(mode="json", include={*self.rows.reads.needs, "start", "columns", "split"})
        return {
            "rows": [digest(self.rows.source), len(self.chosen), self.limit],
            "decoding": decoding,
            "batch_size": self.batch_size,
        }

    def write(
        self,
        target: Path,
        make: Callable[[Batch], Tensor],
        columns: Callable[[Tensor], Mapping[str, Any]],
        plan: Mapping[str, Any],
    ) -> None:
        """Write the file: numbers of rows, their columns, and what is made of them.

        A line has `id`, the number of the row in the source; the source's columns but raw media, of which the path
        stays where there is one, with classes by name; then what is made of the row. A column of the source that is
        called like one of the others gets a `_` after its name.

        Args:
            target: see `check_target`.
            make: batch -> float32 (n, ...) on the CPU.
            columns: (n, ...) -> name -> n cells.
            plan: what decides `make` and `columns`; parts of another plan are not used.

        Raises:
            DataError: where no row, or too few, can be decoded.
            RunError: where it cannot be written.
        """
        folder = target.with_name(f".{target.name}.parts")
        try:
            with repeated(), locked(folder):
                try:
                    self._write_parts(folder, {**plan, **self.plan}, make, columns)
                    written = _assemble(folder, target, len(self.chosen))
                except BaseException:
                    if not any(folder.glob("[0-9]*.parquet")):  # nothing to go on with
                        shutil.rmtree(folder, ignore_errors=True)
                    raise
            shutil.rmtree(folder)
        except OSError as error:
            raise RunError(f"{target}: cannot be written: {error.strerror or error}") from error
        if written < len(self.chosen):
            missing = len(self.chosen) - written
            log.warning("%s: %d of %d rows cannot be read and have no line", target, missing, len(self.chosen))

    def _write_parts(
        self,
        folder: Path,
        plan: Mapping[str, Any],
        make: Callable[[Batch], Tensor],
        columns: Callable[[Tensor], Mapping[str, Any]],
    ) -> None:
        """The parts that are not there yet; those of another plan are removed first."""
        import pyarrow.parquet

        stated = json.dumps(plan, sort_keys=True)
        kept = folder / "plan.json"
        if not kept.exists() or kept.read_text(encoding="utf-8") != stated:
            for part in folder.glob("*.parquet"):
                part.unlink()
            write_text(kept, stated)
        done = [int(part.stem) for part in folder.glob("[0-9]*.parquet")]
        first = max(done, default=-1) + 1
        size = BATCHES * self.batch_size
        if first:
            log.info("%s: going on after %d of %d rows", folder, min(first * size, len(self.chosen)), len(self.chosen))
        left = self.chosen[first * size :]
        cells = _Columns(self.rows, left)
        for number, (ids, made) in enumerate(self._parts(make, left), start=first):
            if not len(ids):
                continue
            table = cells.table(ids, columns(made))
            part = folder / f"{number:08d}.parquet"
            temporary = temporary_name(part)
            pyarrow.parquet.write_table(table, temporary)
            flush([temporary])
            temporary.replace(part)

    def _parts(self, make: Callable[[Batch], Tensor], chosen: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Numbers int64 (n,), and what is made, (n, ...), of the rows of each part that can be decoded."""
        size = BATCHES * self.batch_size
        last = [int(chosen[min(end, len(chosen)) - 1]) for end in range(size, len(chosen) + size, size)]
        found: list[tuple[Tensor, Tensor]] = []
        for batch in self.rows.read(in_order(chosen, self.batch_size)):
            ids = batch[ID]
            while int(ids[0]) > last[0]:
                yield _joined(found)
                found, last = [], last[1:]
            found.append((ids, make(batch)))
        yield _joined(found)


def _joined(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, Tensor]:
    if not found:
        return np.zeros(0, dtype=np.int64), torch.zeros(0, 0)
    ids, made = zip(*found, strict=True)
    return torch.cat(ids).numpy(), torch.cat(made)


class _Columns:
    """The cells that stay, of rows that are asked for in ascending order.

    Args:
        rows: where they are.
        chosen: which may be asked for.
    """

    def __init__(self, rows: SourceSplit, chosen: np.ndarray) -> None:
        source = rows.source
        self.names = []
        if len(chosen):
            row = next(islice(source.rows(), 1)) if isinstance(source, StreamSource) else source.row(int(chosen[0]))
            self.names = [name for name in source.columns if not isinstance(plain(row[name]), Dropped)]
        self.source = source.select(self.names) if self.names else source
        self.classes = {name: names for name in self.names if (names := source.class_names(name))}
        self.stream = enumerate(self.source.rows()) if isinstance(self.source, StreamSource) and self.names else None

    def table(self, ids: np.ndarray, made: Mapping[str, Any]) -> pyarrow.Table:
        """Rows of the file."""
        import pyarrow

        cells: dict[str, list[Any]] = {name: [] for name in self.names}
        for row in self._rows(ids.tolist()) if self.names else ():
            for name in self.names:
                cells[name].append(self._cell(name, row[name]))
        columns = {f"{name}_" if name == ID or name in made else name: own for name, own in cells.items()}
        return pyarrow.table({ID: ids, **columns, **made})

    def _rows(self, ids: list[int]) -> Iterator[Mapping[str, Any]]:
        if self.stream is None:
            assert not isinstance(self.source, StreamSource)
            yield from (self.source.row(number) for number in ids)
            return
        wanted = set(ids)
        yield from islice((row for number, row in self.stream if number in wanted), len(wanted))

    def _cell(self, name: str, cell: Any) -> Any:
        if name in self.classes:
            return name_of(cell, self.classes[name])
        cell = plain(cell)
        return None if isinstance(cell, Dropped) else cell


def _assemble(folder: Path, target: Path, rows: int) -> int:
    """The parts as one file, under a name of its own until it is whole; the number of its lines."""
    import pyarrow.parquet

    parts = sorted(folder.glob("[0-9]*.parquet"))
    if not parts:
        raise DataError(f"there are no rows: none of {rows} can be decoded")
    temporary = folder / target.name
    FORMATS[target.suffix](parts, temporary)
    flush([temporary])
    temporary.replace(target)
    flush([target.parent])
    return sum(pyarrow.parquet.read_metadata(part).num_rows for part in parts)
