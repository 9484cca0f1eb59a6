"""Features of every row of a source in one file, beside its columns: read in parts, each kept until the file is whole.

Parts are files of a folder beside the target. A call that was killed leaves those that it finished, and the same call
goes on after them; the target appears in one step, when all of it is there.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmssl.adaptation.cache import digest_of
from mmssl.adaptation.features import POOLED, extract
from mmssl.adaptation.request import Model
from mmssl.adaptation.rows import Labeled, SourceSplit, in_order, open_rows
from mmssl.atomic import flush, temporary_name, write_text
from mmssl.data.features import name_of
from mmssl.data.sources import StreamSource, digest
from mmssl.embedding_files import FORMATS
from mmssl.encoders.base import Encoder
from mmssl.errors import DataError, RecipeError, RunError, nearest
from mmssl.hub.load import load
from mmssl.objectives.base import Objective
from mmssl.recipe import Data
from mmssl.run_directory import Run
from mmssl.training.lock import locked

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger("mmssl")
ID, FEATURES = "id", "features"
BATCHES = 16
"""Of a part: what is lost, and held in memory, at most."""


def embed(
    model: Run | str | Path | Encoder | Objective,
    data: Labeled,
    to: str | Path,
    *,
    encoder: str | None = None,
    layer: str | None = None,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    force: bool = False,
    trust: bool = False,
) -> Path:
    """Write the features of all rows of a source, with their numbers and columns.

    The file has a row a row that can be decoded: `id`, its number in the source; the source's columns but raw media, of
    which the path stays where there is one, with classes by name; `features`, float32 (D,). A column of the source that
    is called like one of these two gets a `_` after its name.

    A call that was killed goes on where it was, when it is made again.

    Args:
        model: a run, its directory, its name on the Hub, an encoder, or a task.
        data: as for `mmssl.adapt`, but no batches.
        to: `*.parquet`, or `*.npz` (an array a column, texts and lists as strings, lists in JSON).
        encoder: whose features; the first one of the run or task where left out.
        layer: depth whose mean over places is written in place of the pooled features; see `Encoder.layers`.
        split: of a source that is named.
        limit: only so many rows, spread over the split; of a stream the first ones.
        columns: batch key -> column, as in a recipe.
        batch_size: rows that go through the encoder at a time.
        workers: processes that decode.
        force: write over a file that is there.
        trust: import the objective or encoder of your own that a run's directory names.

    Returns:
        The file.

    Raises:
        RecipeError: for a name or kind of file that does not exist.
        DataError: for rows that are not there, or too many of which cannot be decoded.
        RunError: where the file is there, or cannot be written, or features are not finite.
    """
    target = Path(to)
    if target.suffix not in FORMATS:
        raise RecipeError(f"{target}: features are written as {' or '.join(FORMATS)}")
    if target.exists() and not force:
        raise RunError(f"{target} is there already; name another file, or write over it with --force (force=True)")
    for name, value in {"limit": limit, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise RecipeError(f"{name} = {value}: expected at least 1")
    if isinstance(model, str | Path):
        model = load(model, trust=trust)
        if torch.accelerator.is_available():
            model.objective.to(torch.accelerator.current_accelerator())
    asked = Model.of(model, encoder)
    network, modality = asked.encoder, asked.encoder.modality
    if modality == "fusion":
        raise RecipeError(f"'{asked.name}' is a fusion, which reads no data of its own; name another encoder")
    how = asked.run.decoding(modality) if asked.run else network.reading()
    rows = open_rows(data, asked.reads([modality], workers), how, columns, None, split)
    if not isinstance(rows, SourceSplit):
        raise DataError("embed reads a source or a data set; of batches, take mmssl.adaptation.features")
    if isinstance(rows.source, StreamSource):
        total = rows.source.count()
        chosen = np.arange(min(limit or total, total))
    else:
        total = len(rows.source)
        number = min(limit or total, total)
        chosen = np.intersect1d(np.arange(number) * total // max(1, number), rows.present(total))
    plan = {
        "encoder": digest_of(network),
        "layer": layer,
        "rows": [digest(rows.source), len(chosen), limit],
        "decoding": _decoding(rows.spec, modality),
        "batch_size": batch_size,
    }
    folder = target.with_name(f".{target.name}.parts")
    try:
        with locked(folder):
            _write_parts(folder, plan, network, layer, rows, chosen, batch_size)
            _assemble(folder, target, len(chosen))
        shutil.rmtree(folder)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}") from error
    return target


def _decoding(spec: Data, modality: str) -> dict[str, Any]:
    return spec.model_dump(mode="json", include={modality, "start", "columns", "split"})


def _write_parts(
    folder: Path,
    plan: Mapping[str, Any],
    encoder: Encoder,
    layer: str | None,
    rows: SourceSplit,
    chosen: np.ndarray,
    batch_size: int,
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
    size = BATCHES * batch_size
    if first:
        log.info("%s: going on after %d of %d rows", folder, min(first * size, len(chosen)), len(chosen))
    left = chosen[first * size :]
    cells = _Columns(rows, left)
    for number, (ids, vectors) in enumerate(_parts(encoder, layer, rows, left, batch_size), start=first):
        if not len(ids):
            continue
        table = cells.table(ids, vectors)
        part = folder / f"{number:08d}.parquet"
        temporary = temporary_name(part)
        pyarrow.parquet.write_table(table, temporary)
        flush([temporary])
        temporary.replace(part)


def _parts(
    encoder: Encoder, layer: str | None, rows: SourceSplit, chosen: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Numbers int64 (n,) and features float32 (n, D) of the rows of each part that can be decoded."""
    size = BATCHES * batch_size
    batches = rows.read(in_order(chosen, batch_size))
    last = [int(chosen[min(end, len(chosen)) - 1]) for end in range(size, len(chosen) + size, size)]
    found: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        ids = batch[ID]
        while int(ids[0]) > last[0]:
            yield _joined(found)
            found, last = [], last[1:]
        (features,), _ = extract([encoder], [batch], layers=layer is not None)
        depth = POOLED if layer is None else layer
        if depth not in features:
            raise RecipeError(f"the encoder has no layer '{layer}'{nearest(depth, features)}")
        found.append((ids, features[depth]))
    yield _joined(found)


def _joined(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, Tensor]:
    if not found:
        return np.zeros(0, dtype=np.int64), torch.zeros(0, 0)
    ids, vectors = zip(*found, strict=True)
    return torch.cat(ids).numpy(), torch.cat(vectors)


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

    def table(self, ids: np.ndarray, vectors: Tensor) -> pyarrow.Table:
        """Rows of the file."""
        import pyarrow

        cells: dict[str, list[Any]] = {name: [] for name in self.names}
        for row in self._rows(ids.tolist()) if self.names else ():
            for name in self.names:
                cells[name].append(self._cell(name, row[name]))
        width = vectors.shape[1]
        flat = pyarrow.array(vectors.reshape(-1).numpy())
        columns = {f"{name}_" if name in (ID, FEATURES) else name: own for name, own in cells.items()}
        return pyarrow.table(
            {
                ID: ids,
                **columns,
                FEATURES: pyarrow.FixedSizeListArray.from_arrays(flat, width),
            }
        )

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


class Dropped:
    """A cell of raw media without a path."""


def plain(cell: Any) -> Any:
    """A cell as a column of a table holds it: of media their path."""
    if isinstance(cell, bytes | bytearray | np.ndarray):
        return Dropped()
    if isinstance(cell, Mapping):
        if {"bytes", "path"} & cell.keys():
            return cell.get("path") or Dropped()
        return Dropped() if {"array", "frames"} & cell.keys() else dict(cell)
    return cell


def _assemble(folder: Path, target: Path, rows: int) -> None:
    """The parts as one file, under a name of its own until it is whole."""
    parts = sorted(folder.glob("[0-9]*.parquet"))
    if not parts:
        raise DataError(f"there are no rows: none of {rows} can be decoded")
    temporary = folder / target.name
    FORMATS[target.suffix](parts, temporary)
    flush([temporary])
    temporary.replace(target)
    flush([target.parent])
