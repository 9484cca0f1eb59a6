"""Where rows come from: folders, table files, webdataset shards, the Hub, the toy world; nothing is decoded here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mmssl.data.annotated import AnnotatedSource, find_annotations
from mmssl.data.annotated.captions import read_text, texts_beside
from mmssl.data.annotated.layout import Annotations
from mmssl.data.annotated.mask_folders import unpaired
from mmssl.data.base import MapSource, Row
from mmssl.data.configurations import find_configuration
from mmssl.data.csv_files import check_cells, reading, separator
from mmssl.data.described import FILE_NAME, describing, joined, media_columns
from mmssl.data.features import check_classes, names_of_classes, undecoded, with_fields
from mmssl.data.files import (
    BUILDERS,
    EXTENSIONS,
    JSON,
    KINDS,
    TEXT,
    check_split,
    expand,
    extension,
    known_extensions,
    media_layout,
    split_by_name,
    split_names,
)
from mmssl.data.left_out import next_to_folders, others, unread, without_readme
from mmssl.data.ranges import TRIES, reach, wait_after
from mmssl.data.shards import shard_features, take_names
from mmssl.data.stored import Folders, Merged, distinct, explained, first, resolved, stored, visible
from mmssl.data.stream import StreamSource, not_blank
from mmssl.data.walk import walk
from mmssl.errors import DataError
from mmssl.recipe import Data

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Where pandas puts the first cells of rows that have more of them than there are names: all others would be shifted.
_INDEX = "__index_level_0__"
T = TypeVar("T")


Source = MapSource | StreamSource


class TableSource(MapSource):
    """A Hugging Face data set, whose rows can be read in any order; arguments as for `StreamSource`."""

    def __init__(
        self, dataset: Dataset, name: str = "dataset", folders: Folders | None = None, merged: Merged | None = None
    ) -> None:
        self.name, self.folders, self.merged = name, folders or {}, merged or {}
        if dataset.format["type"] == "custom":
            self.notes = ("what its transform makes of a row is not used: rows are decoded here",)
        self.dataset = undecoded(dataset.with_format(None))
        self.columns = visible(dataset.column_names, self.merged)

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> Row:
        """See `MapSource`."""
        with explained(self.name):
            return resolved(self.dataset[int(index)], self.folders, self.merged)

    def values(self, column: str) -> Iterator[Any]:
        """See `MapSource`."""
        names = stored([column], self.merged)
        for rows in self.dataset.select_columns(names).iter(1000):
            if len(names) == 1:
                yield from rows[column]
            else:
                yield from (first(cells) for cells in zip(*(rows[name] for name in names), strict=True))

    def distinct(self, column: str) -> Iterator[Any]:
        """See `MapSource`."""
        if len(names := stored([column], self.merged)) > 1:
            yield from self.values(column)
        else:
            with explained(self.name):
                yield from distinct(self.dataset, *names)

    def class_names(self, column: str) -> list[str] | None:
        """See `MapSource`."""
        return names_of_classes(self.dataset, column)

    def present(self, columns: Sequence[str]) -> np.ndarray:
        """See `MapSource`."""
        if not columns:
            return np.arange(len(self))
        groups = [stored([column], self.merged) for column in columns]
        names = list(dict.fromkeys(name for group in groups for name in group))
        tables = self.dataset.select_columns(names).with_format("arrow").iter(1000)
        masks = [
            np.logical_and.reduce([np.logical_or.reduce([table[n].is_valid() for n in group]) for group in groups])
            for table in tables
        ]
        return np.flatnonzero(np.concatenate(masks)) if masks else np.arange(0)

    def select(self, columns: Sequence[str]) -> MapSource:
        """See `MapSource`."""
        dataset = self.dataset.select_columns(stored(columns, self.merged))
        some = TableSource(dataset, self.name, self.folders, self.merged)
        some.notes, some.splits, some.files = self.notes, self.splits, self.files
        return some


def open_source(spec: Data) -> Source:
    """Open what `spec.source` names, at `spec.split`, with at most `spec.limit` rows.

    `streaming` concerns tables, shards and Hub data sets; media folders and the toy world are read where they are.

    Raises:
        DataError: nothing there, nothing usable there, or no such split.
    """
    where = os.path.expandvars(spec.source)
    if where == "toy":
        from mmssl.data.toy import ToySource

        return ToySource(spec.split, spec.limit) if spec.limit else ToySource(spec.split)
    path = Path(os.path.expanduser(where))
    if os.path.isdir(path):  # of a name that cannot be one, too
        return _open_folder(spec, path)
    files = expand(where)
    suffixes = {extension(file) for file in files}
    builders = BUILDERS | TEXT | JSON
    if len(suffixes) == 1 and suffixes <= set(builders):
        splits, notes = split_by_name(files, Path(os.path.commonpath([Path(file).parent for file in files])))
        if len(splits) == 1:
            # The file was named outright, so its own name (test.parquet) does not speak against the split asked for.
            splits, notes = {split_names(spec.split)[0]: files}, []
        source = _load(spec, builders[suffixes.pop()], splits, notes)
        if not notes and len(splits) == 1:
            source.splits = ()
        return source
    if files and suffixes <= set(KINDS) and all(Path(file).is_file() for file in files):
        media = [Path(file).absolute() for file in files]
        root = Path(os.path.commonpath([file.parent for file in media]))
        texts = texts_beside(
            root, media, [file for file in (one.with_suffix(".txt") for one in media) if file.is_file()]
        )
        return _open_media(spec, root, media, (), texts)
    if files:
        found = ", ".join(sorted(suffixes - {""}) + ["a name without extension"] * ("" in suffixes))
        raise DataError(f"{where}: expected files of one kind out of {known_extensions()}, found {found}")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", where) or extension(path) in builders:
        unset = re.search(r"\$\{?(\w+)", where)
        hint = f"set {unset[1]}, which the environment lacks" if unset else f"looked from {Path.cwd()}"
        raise DataError(f"{where}: there is no such file or folder ({hint})")
    return _load(spec, where, {})


def _open_folder(spec: Data, root: Path) -> Source:
    files, unreadable = walk(root)
    configuration = find_configuration(root, files, spec.config)
    if configuration is not None:
        used = [Path(file) for own in configuration.splits.values() for file in own]
        notes = [configuration.note, *unreadable]
        return _load(spec, (BUILDERS | TEXT | JSON)[extension(used[0])], configuration.splits, notes)
    if spec.config is not None:
        unreadable.append(f"data.config = {spec.config} is not used: no README.md here declares configurations")
    annotations = find_annotations(root, files)
    if annotations is not None:
        return _open_annotated(spec, annotations, [*unread(files), *unreadable])
    if (tables := describing(files)) and FILE_NAME not in spec.columns.values():
        described = _open_described(spec, root, files, tables, unreadable)
        if described is not None:
            return described
    kinds_of = [extension(file) for file in files]
    for builders in (BUILDERS, dict.fromkeys(KINDS, "media"), TEXT, JSON):
        found = [file for file, kind in zip(files, kinds_of, strict=True) if kind in builders]
        if not found:
            continue
        kinds = {builders[extension(file)] for file in found}
        known, told = found, list[str]()
        if kinds == {"text"}:
            found, told = without_readme(found)
            told += next_to_folders(root, found)
        texts = texts_beside(root, found, files) if kinds == {"media"} else {}
        notes = [*told, *others(files, [*known, *texts.values()]), *unreadable]
        if kinds == {"media"}:
            return _open_media(spec, root, found, notes, texts)
        if len(kinds) > 1:
            several = ", ".join(sorted(kinds))
            some = f"{root}/**/*{found[0].suffix}"
            raise DataError(f"{root} holds tables of several kinds ({several}); name those of one, as in {some}")
        splits, named = split_by_name([str(file) for file in found], root, documents=kinds == {"text"})
        return _load(spec, kinds.pop(), splits, [*named, *notes])
    usable = f"{root} holds no usable file; known are {known_extensions()}"
    raise DataError(". ".join([usable, *others(files, ()), *unreadable]))


def _open_media(
    spec: Data, root: Path, files: Sequence[Path], notes: Sequence[str], texts: Mapping[Path, Path]
) -> Source:
    """One row a file; a clip is both sound and pictures, and `texts` are files of what is written about some."""
    import datasets

    layout = media_layout(root, files)
    files = _of_split(spec, layout.splits)
    table = media_columns(files)
    if all(file in layout.classes for file in files):
        table["label"] = [layout.classes[file] for file in files]
    if texts:
        table["text"] = [read_text(root, texts[file]) if file in texts else None for file in files]
        notes = [f"text is that of .txt files of the same name, of {len(texts)} in all", *notes]
    notes = [*layout.notes, *unpaired(root, files), *notes]
    source = _limited(spec, datasets.Dataset.from_dict(table), {}, notes)
    source.splits, source.files = tuple(layout.splits), files
    return source


def _open_described(
    spec: Data, root: Path, files: Sequence[Path], tables: Sequence[Path], notes: Sequence[str]
) -> Source | None:
    """Files that have a line in one of these tables; None where these do not name files."""
    whole = spec.model_copy(update={"split": "train", "streaming": False, "limit": None, "columns": {}})
    rows = {}
    for table in tables:
        lines = _load(whole, BUILDERS[extension(table)], {"train": [str(table)]})
        if not isinstance(lines, TableSource) or FILE_NAME not in lines.columns:
            return None
        rows[table] = lines.dataset
    media = [file for file in files if file.suffix.lower() in KINDS]
    layout = media_layout(root, media, labeled=any("label" in lines.column_names for lines in rows.values()))
    wanted = _of_split(spec, layout.splits)
    with explained(spec.source):
        dataset, note = joined(rows, media, wanted)
    if all(file in layout.classes for file in wanted):
        paths = zip(*(dataset[kind] for kind in EXTENSIONS if kind in dataset.column_names), strict=True)
        dataset = dataset.add_column("label", [layout.classes[Path(first(cells))] for cells in paths])
    source = _limited(spec, dataset, {}, [note, *layout.notes, *others(files, [*media, *tables]), *notes])
    source.splits, source.files = tuple(layout.splits), wanted
    return source


def _open_annotated(spec: Data, found: Annotations, notes: Sequence[str]) -> Source:
    """Pictures with masks or boxes, a row each."""
    rows = _of_split(spec, found.splits)
    if spec.limit and spec.limit < len(rows):
        rows = [rows[i * len(rows) // spec.limit] for i in range(spec.limit)]
    source = AnnotatedSource(rows, spec.source)
    source.notes, source.splits = (found.note, *notes), tuple(found.splits)
    source.files = [row["image"] for row in rows]
    return source


def _of_split(spec: Data, splits: Mapping[str, Sequence[T]]) -> list[T]:
    """What `spec.split` names, parts such as `train[:80%]` included."""
    import datasets

    check_split(spec.source, spec.split, splits)
    try:
        sizes = {name: len(own) for name, own in splits.items()}
        parts = datasets.ReadInstruction.from_spec(spec.split).to_absolute(sizes)
    except (AssertionError, ValueError) as error:
        raise DataError(f"{spec.source}: split '{spec.split}' cannot be read: {error}") from error
    found = [one for part in parts for one in splits[part.splitname][part.from_ : part.to]]
    if not found:
        raise DataError(f"{spec.source}: split '{spec.split}' holds no rows")
    return found


def _load(spec: Data, builder: str, splits: Mapping[str, Sequence[str]], notes: Sequence[str] = ()) -> Source:
    """Through `datasets.load_dataset`: `builder` is one of its formats, or the name of a data set on the Hub."""
    import datasets

    folders: dict[str, Path] = {}
    merged: Merged = {}
    asked: dict[str, Sequence[str]] = {}
    hub = "no local file or folder, so taken for a data set on the Hub; --data or data.source names another"
    where = f"{spec.source} ({hub})"
    arguments: dict[str, Any] = {"name": spec.config, "split": spec.split}
    if splits:
        del arguments["name"]  # of a data set of the Hub
        check_split(spec.source, spec.split, splits)
        where = spec.source
        # Not the other splits: `datasets` would read them as if they had the columns and classes of the first one.
        asked = {split: splits[split] for split in split_names(spec.split)}
        if builder in ("parquet", "arrow"):
            check_classes((file for own in asked.values() for file in own), where)
        # Names of files may hold brackets, which `datasets` takes for patterns.
        arguments["data_files"] = {split: [escape(file) for file in own] for split, own in asked.items()}
        if "://" not in where:
            parents = [Path(file).parent for own in asked.values() for file in own]
            base = Path(os.path.commonpath(parents)).absolute()
            folders = {spec.columns.get(key, key): base for key in (*EXTENSIONS, "mask")}
    with explained(where):
        if builder == "csv":
            mark = separator(next(iter(asked.values()))[0])
            tables = [file for own in asked.values() for file in own]
            check_cells(tables, mark)
            arguments |= reading(tables, mark)
        if builder == "webdataset":
            shards = next(iter(asked.values()))
            if not spec.streaming and "://" in shards[0]:  # what follows finds them again
                shards = _asked_again(shards, partial(datasets.DownloadManager().download, list(shards)))
            arguments["features"], merged = shard_features(shards)
        take_names()
        addresses = [file for own in asked.values() for file in own if "://" in file]
        load = partial(datasets.load_dataset, builder, streaming=spec.streaming, **arguments)
        dataset = _asked_again(addresses, load)
        blanks = builder == "text"
        if blanks and not spec.streaming:
            dataset = dataset.filter(not_blank, input_columns="text")
        dataset = with_fields(dataset, spec.columns.values(), where)
    source = _limited(spec, dataset, folders, notes, merged, blanks)
    if builder == "csv" and _INDEX in source.columns:
        raise DataError(f"{where}: rows have more cells than the first line has names (as by a comma at their end)")
    source.splits = tuple(splits)
    source.files = [file for own in asked.values() for file in own if "://" not in file]
    return source


def _asked_again(addresses: Sequence[str], ask: Callable[[], T]) -> T:
    """What `datasets` does with files at addresses, again where their server failed."""
    from aiohttp import ClientError

    for attempt in range(1, TRIES + 1):
        try:
            return ask()
        except FileNotFoundError as error:  # which it says of a server that fails as well
            named = [file for file in addresses if file in str(error) or escape(file) in str(error)]
            if not named:
                raise
            missing = max(named, key=len)
            reach(missing)
            wait_after(missing, ConnectionError("it was not found at first"), attempt)
        except ClientError as error:
            wait_after(addresses[0], error, attempt)
    raise AssertionError("the last try returns or raises")


def _limited(
    spec: Data,
    dataset: Dataset | IterableDataset,
    folders: Folders,
    notes: Sequence[str] = (),
    merged: Merged | None = None,
    blanks: bool = False,
) -> Source:
    import datasets

    source: Source
    if isinstance(dataset, datasets.IterableDataset):
        source = StreamSource(dataset, spec.source, folders, merged, spec.limit, blanks)
    else:
        if spec.limit and spec.limit < len(dataset):
            # Spread over the data set, which may be sorted by class.
            dataset = dataset.select(np.arange(spec.limit) * len(dataset) // spec.limit)
        source = TableSource(dataset, spec.source, folders, merged)
    source.notes = tuple(notes)
    return source
