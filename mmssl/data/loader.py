"""Batches for the loop, and every row once for adaptation.

The main process says which rows a batch has (`mmssl.data.order`), workers decode them (`mmssl.data.decoding`). A row
that cannot be decoded is replaced by the next one in the source that can. So a batch is a function of (seed, step, row
of the global batch), for any number of workers and processes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmssl.batch import Batch
from mmssl.data.base import MapSource, Row
from mmssl.data.columns import WINDOWS, Classes, Decoder, TextToIds, find_classes, find_column
from mmssl.data.decoding import Decoded, Failures, Reader, Rows, Task, decode
from mmssl.data.digest import digest
from mmssl.data.named_files import check_named_files
from mmssl.data.order import MapOrder, Picked, StreamOrder, find_present
from mmssl.data.packing import Packing, pack
from mmssl.data.shared import SharedStream
from mmssl.data.sources import Source, TableSource, open_source
from mmssl.data.stream import StreamSource
from mmssl.data.stream_index import Index
from mmssl.errors import DataError, RecipeError, counted, nearest
from mmssl.ops.draws import Draws, mix_seed
from mmssl.recipe import Data

# Rows whose channels are compared at the start of a run.
HEARD = 8
ERRORS, STREAMS = "errors.jsonl", "streams.jsonl"
"""In a run directory."""

log = logging.getLogger(__name__)


class Loader:
    """This process's rows of every global batch.

    Args:
        sources: name -> where rows come from; the name is empty where there is only one.
        needs: batch keys: `image`, `text`, `audio`, `video` or `label`, as `name/key` for a source that has a name.
        batch_size: rows of the global batch.
        seed: of order and windows.
        tokenizers: modality -> tokenizer.
        workers: processes that decode; 0 decodes in this one.
        share: which share of the global batch is this process's, from 0.
        shares: number of processes.
        directory: of the run, where `errors.jsonl` names undecodable rows and `streams.jsonl` says what is known of the
            files of streams; None keeps neither.

    Attributes:
        sources: name -> opened source.

    Raises:
        RecipeError: for a source without a need, a need without a source, or a batch that cannot be divided.
        DataError: for what is wrong with the data that can be known before it is decoded.
    """

    def __init__(
        self,
        sources: Mapping[str, Data],
        needs: Sequence[str],
        *,
        batch_size: int,
        seed: int,
        tokenizers: Mapping[str, TextToIds] | None = None,
        workers: int = 0,
        share: int = 0,
        shares: int = 1,
        directory: Path | None = None,
    ) -> None:
        if batch_size % shares:
            raise RecipeError(f"a batch of {batch_size} rows cannot be divided among {shares} processes")
        self.batch_size, self.seed, self.specs = batch_size, seed, dict(sources)
        self.share, self.shares = share, shares
        self.sources: dict[str, Source] = {}
        readers: dict[str, Reader] = {}
        self._orders: dict[str, MapOrder | StreamOrder] = {}
        errors = directory / ERRORS if directory else None
        self._failures: dict[str, Failures] = {}
        for name, keys in _needs_by_source(needs, sources).items():
            spec = sources[name]
            source = open_source(spec)
            label = find_column(spec, "label", source.columns) if "label" in keys else None
            decoder = Decoder(
                spec,
                [key for key in keys if key != "label"],
                columns=source.columns,
                tokenizers=tokenizers,
                label=label,
                classes=find_classes(source.distinct(label)) if label else None,
            )
            source = source.select(decoder.reads)
            packing = _packing(decoder) if spec.text.pack else None
            if isinstance(source, TableSource):
                check_named_files(source, [column for key, column in decoder.columns.items() if key != "text"])
            own = mix_seed(seed, "order", name)
            if isinstance(source, StreamSource):
                shared = self._shared(name, source, decoder, directory, packing)
                self._orders[name] = StreamOrder(shared, spec.shuffle_buffer, own)
            else:
                source = pack(source, packing) if packing else source
                self._orders[name] = MapOrder(source, decoder.requires, batch_size, own)
            self.sources[name] = source
            readers[name] = _reader(source, decoder)
            epoch, key = self._orders[name].rows, f"data.{name}.max_bad" if name else "data.max_bad"
            self._failures[name] = Failures(spec, name, errors, rows=epoch, key=key)

        self._rows = Rows(readers, workers)

    def _shared(
        self, name: str, source: StreamSource, decoder: Decoder, directory: Path | None, packing: Packing | None
    ) -> SharedStream:
        reads = [
            name,
            *decoder.requires,
            f"limit {source.limit}",
            *([f"packed to {packing.length}"] if packing else []),
        ]
        shared = SharedStream(
            source,
            decoder.requires,
            readers=self.specs[name].readers,
            batch_size=self.batch_size,
            index=Index(directory / STREAMS if directory else None, reads),
            packing=packing,
        )
        readers = shared.division.readers
        if readers % self.shares:
            why = f" ({shared.notes[-1]})" if readers < self.specs[name].readers else ""
            raise RecipeError(
                f"{source.name}: {readers} readers cannot be divided among {self.shares} processes{why}; choose "
                "data.readers and the number of processes so that one is a multiple of the other"
            )
        return shared

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches until the longest source begins anew; None where that is a stream whose end was not seen yet."""
        known = [order.steps_per_epoch for order in self._orders.values()]
        return None if None in known else max(steps for steps in known if steps is not None)

    @property
    def undecodable(self) -> int:
        """Different rows so far that could not be decoded."""
        return sum(failures.different for failures in self._failures.values())

    def digests(self) -> dict[str, str]:
        """Name of source -> its number of rows and a hash of a sample; what a resumed run has to find again."""
        found = {}
        for name, source in self.sources.items():
            order = self._orders[name]
            found[name] = digest(source, order.stream.described if isinstance(order, StreamOrder) else None)
        return found

    def found(self) -> list[str]:
        """What was found, a line each: rows and columns of every source, and what may not be expected."""
        lines = []
        for name, source in self.sources.items():
            order, spec = self._orders[name], self.specs[name]
            rows = f"{len(order.present):,} rows" if isinstance(order, MapOrder) else order.stream.described
            columns = ", ".join(source.columns)
            lines.append(f"data{'.' + name if name else ''}: {rows} of {spec.source}, split {spec.split}: {columns}")
            notes = order.stream.notes if isinstance(order, StreamOrder) else []
            lines += [f"  {note}" for note in (*source.notes, *notes, *_canceling(*self._rows.readers[name]))]
        return lines

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This process's rows of the global batches `start` to `stop - 1`, in order, with `id` and masks.

        Raises:
            DataError: where too many rows cannot be decoded, or a worker dies.
        """
        rows = self.batch_size // self.shares
        mine = slice(self.share * rows, (self.share + 1) * rows)
        picks = {name: order.picks(start, stop, mine) for name, order in self._orders.items()}
        waiting: deque[dict[str, tuple[Picked, Task]]] = deque()

        def tasks() -> Iterator[dict[str, Task]]:
            for step in range(start, stop):
                picked = {name: next(one) for name, one in picks.items()}
                todo = {name: Task(p.ids, p.rows, self._windows(name, step, rows)) for name, p in picked.items()}
                waiting.append({name: (picked[name], todo[name]) for name in picks})
                yield todo

        for step, results in enumerate(decode(self._rows, tasks()), start):
            batch: Batch = {}
            for name, (picked, task) in waiting.popleft().items():
                prefix = f"{name}/" if name else ""
                for key, value in self._complete(name, step, picked, task, results[name]).items():
                    batch[prefix + key] = value
            yield batch

    def _windows(self, name: str, step: int, rows: int) -> list[float]:
        draws = Draws(self.seed, step, rows, share=self.share, shares=self.shares, stream=f"window/{name}")
        return draws.uniform().tolist()

    def _complete(self, name: str, step: int, picked: Picked, task: Task, decoded: Decoded) -> Batch:
        """The batch with every undecodable row replaced, and `id`."""
        batch, failures = decoded
        self._failures[name].add(step + 1, task.ids, failures)
        ids = list(task.ids)
        for position, reason in failures:
            ids[position], row = self._replace(name, picked, task, position, reason)
            if batch is None:
                batch = {key: value.new_zeros(len(ids), *value.shape) for key, value in row.items()}
            for key, value in row.items():
                batch[key][position] = value
        assert batch is not None  # either decoded, or every row of it replaced
        return {**batch, "id": torch.tensor(ids)}

    def _replace(self, name: str, picked: Picked, task: Task, position: int, reason: str) -> tuple[int, Batch]:
        for other, row in picked.others(position):
            decoded = self._rows.decode(name, other, row, task.windows[position])
            if not isinstance(decoded, str):
                return other, decoded
        raise DataError(
            f"{self.specs[name].source}: row {task.ids[position]} cannot be decoded, nor can those after it: {reason}"
        )


def read(
    spec: Data,
    needs: Sequence[str],
    *,
    label: str | None = None,
    classes: Classes | None = None,
    tokenizers: Mapping[str, TextToIds] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    source: Source | None = None,
    picks: Iterable[Sequence[int]] | None = None,
    windows: int = 1,
) -> Iterator[Batch]:
    """Every row once, in order; the last batch is short. Undecodable rows are left out: `id` tells which are there.

    Longer sounds and clips give their middle, or their start where `spec.start` is `first`, or `windows` of them, and
    longer texts their beginning, so that two readings agree.

    Args:
        spec: decode settings and, unless `source` is given, where the rows are.
        needs: batch keys out of `image`, `text`, `audio`, `video`.
        label: column of the classes, for the key `label`.
        classes: names or numbers of the classes in order; by default those in the column, sorted.
        tokenizers: modality -> tokenizer.
        batch_size: rows of a batch.
        workers: processes that decode; 0 decodes in this one.
        source: rows that are already open.
        picks: numbers of the rows of each batch, in place of all of them; of a stream in ascending order.
        windows: of each sound and clip; see `Decoder`.

    Raises:
        DataError: for a column that is not there, a label that is none of `classes`, or more undecodable rows than
            `spec.max_bad`; the first two before anything is decoded.
    """
    source = source if source is not None else open_source(spec)
    spec = spec.model_copy(update={"text": spec.text.model_copy(update={"start": "first", "pack": False})})
    if label is not None and label in source.columns:
        found = find_classes(source.distinct(label))
        classes = found if classes is None else classes
        unknown = sorted(set(found or ()) - set(classes or ()), key=str)
        if unknown:
            raise DataError(f"{source.name}: label {unknown[0]!r} in column '{label}' is none of the classes given")
    decoder = Decoder(
        spec, needs, columns=source.columns, tokenizers=tokenizers, label=label, classes=classes, windows=windows
    )
    source = source.select(decoder.reads)
    if picks is not None:
        return _read(source, decoder, spec, _picked(source, decoder, picks), workers)
    if isinstance(source, StreamSource):
        source = source.present(decoder.requires)
    return _read(source, decoder, spec, _in_order(source, decoder, batch_size), workers)


Numbered = Iterator[tuple[list[int], list[Row] | None]]
"""Numbers of the rows of each batch, and of a stream the rows themselves."""


def _read(source: Source, decoder: Decoder, spec: Data, numbered: Numbered, workers: int) -> Iterator[Batch]:
    waiting: deque[Task] = deque()

    def tasks() -> Iterator[dict[str, Task]]:
        for ids, rows in numbered:
            waiting.append(Task(ids, rows, [WINDOWS["middle"]] * len(ids)))
            yield {"": waiting[-1]}

    tally = Failures(spec, rows=None if isinstance(source, StreamSource) else len(source), key="max_bad")
    for results in decode(Rows({"": _reader(source, decoder)}, workers), tasks()):
        batch, failures = results[""]
        ids = waiting.popleft().ids
        tally.add(0, ids, failures)
        if batch is not None:
            bad = {position for position, _ in failures}
            good = torch.tensor([position for position in range(len(ids)) if position not in bad])
            yield {**{key: value[good] for key, value in batch.items()}, "id": torch.tensor(ids)[good]}
    if tally.bad:
        log.warning(
            "%s: %s left out: %s", source.name, counted(len(tally.bad), "undecodable row"), "; ".join(tally.first)
        )


def _canceling(source: MapSource | None, decoder: Decoder) -> list[str]:
    """Whether stereo sounds of a few rows are silent when mixed down; a stream is not asked."""
    column = decoder.columns.get("audio")
    if source is None or column is None or decoder.spec.audio.channel != "mean":
        return []
    from mmssl.media.audio import CANCELING, cancels

    rows = source.select([column])
    asked = [i * len(rows) // HEARD for i in range(HEARD)] if len(rows) > HEARD else range(len(rows))
    canceled = 0
    for number in asked:
        with suppress(DataError, OSError):  # what cannot be decoded is counted when it is trained on
            canceled += cancels(rows.row(number)[column], decoder.spec.audio.seconds)
    return [f"{canceled} of {len(asked)} rows asked: {CANCELING}"] if canceled else []


def _packing(decoder: Decoder) -> Packing:
    if decoder.needs != ("text",) or decoder.label is not None:
        read = ", ".join(decoder.needs)
        raise RecipeError(f"data.text.pack joins the texts of several rows, and here rows have {read}; set pack: false")
    tokenizer: Any = decoder.tokenizer
    packing = Packing(decoder.columns["text"], tokenizer, decoder.spec.text.length, decoder.parts)
    packing.check()
    return packing


def _reader(source: Source, decoder: Decoder) -> Reader:
    return None if isinstance(source, StreamSource) else source, decoder


def _picked(source: Source, decoder: Decoder, picks: Iterable[Sequence[int]]) -> Numbered:
    """Chosen rows by their numbers among all; those of a stream only where they have what is read."""
    rows = enumerate(source.rows()) if isinstance(source, StreamSource) else None
    for ids in picks:
        if rows is None:
            yield list(ids), None
        else:
            needed = set(ids)
            some = islice((pair for pair in rows if pair[0] in needed), len(ids))
            whole = {number: row for number, row in some if all(row[column] is not None for column in decoder.requires)}
            yield list(whole), list(whole.values())


def _in_order(source: Source, decoder: Decoder, batch_size: int) -> Numbered:
    if isinstance(source, StreamSource):
        rows = source.rows()
        first = 0
        while some := list(islice(rows, batch_size)):
            yield list(range(first, first + len(some))), some
            first += len(some)
    else:
        present = find_present(source, decoder.requires)
        for first in range(0, len(present), batch_size):
            yield present[first : first + batch_size].tolist(), None


def _needs_by_source(needs: Sequence[str], sources: Mapping[str, Data]) -> dict[str, list[str]]:
    """Name of source -> the keys needed of it, without the masks and ids that come by themselves."""
    found: dict[str, list[str]] = {name: [] for name in sources}
    for need in needs:
        name, _, key = need.rpartition("/")
        if name not in found:
            raise RecipeError(
                f"'{need}' is needed, and data has no source of that name{nearest(name, filter(None, found))}"
            )
        if key != "id" and not key.endswith("_mask"):
            found[name].append(key)
    for name, keys in found.items():
        if not keys:
            raise RecipeError(f"data{'.' + name if name else ''}: nothing is needed of this source; remove it")
    return found
