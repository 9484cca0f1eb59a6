"""Where rows come from: folders, table files, webdataset shards, the Hub, the toy world; nothing is decoded here.

A row is a dictionary, column -> cell. A cell of a picture, sound or clip stays what was stored (a path, bytes, or the
`{"bytes", "path"}` of Hugging Face data sets) until a worker process decodes it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmssl.data.files import BUILDERS, EXTENSIONS, KINDS, SPLITS, TEXT, check_split, expand, split_by_name, split_names
from mmssl.errors import DataError
from mmssl.recipe import Data

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Row = Mapping[str, Any]
Folders = Mapping[str, Path]


class MapSource:
    """Rows that can be read in any order.

    Attributes:
        name: as in the recipe, for messages.
        columns: names of the columns.
    """

    name: str
    columns: tuple[str, ...]

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} does not say how many rows it has")

    def row(self, index: int) -> Row:
        """Row `index`, undecoded; raises DataError where it cannot be read."""
        raise TypeError(f"{type(self).__name__} has no rows")

    def values(self, column: str) -> Iterator[Any]:
        """One column's cells, in order."""
        return (self.row(index)[column] for index in range(len(self)))

    def present(self, columns: Sequence[str]) -> np.ndarray:
        """Numbers of the rows in which none of the columns is null, int64, ascending."""
        return np.arange(len(self))

    def select(self, columns: Sequence[str]) -> MapSource:
        """The same rows with these columns only, so that reading a row does not touch the others."""
        return self

    @staticmethod
    def from_dataset(dataset: Dataset, name: str = "dataset", folders: Folders | None = None) -> MapSource:
        """A Hugging Face data set as a source.

        Args:
            dataset: pictures, sounds and clips in it are left undecoded.
            name: for messages.
            folders: column -> folder, against which relative paths in that column are resolved.
        """
        return _Table(dataset, name, folders)


class StreamSource:
    """Rows that come in one order only, so that nothing has to be kept on disk.

    Args:
        dataset: a streaming Hugging Face data set; pictures, sounds and clips in it are left undecoded.
        name: as in the recipe, for messages.
        folders: column -> folder, against which relative paths in that column are resolved.
    """

    def __init__(self, dataset: IterableDataset, name: str, folders: Folders | None = None) -> None:
        self.name, self.folders = name, folders or {}
        self.dataset = _undecoded(dataset)
        columns = self.dataset.column_names
        if columns is None:
            with _explained(name):
                columns = list(next(iter(self.dataset), {}))
        self.columns = tuple(columns)

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """All rows after the first `skip`, undecoded, in the order of the shards; the same at every call."""
        with _explained(self.name):
            for row in self.dataset.skip(skip) if skip else self.dataset:
                yield _resolved(row, self.folders)

    def values(self, column: str) -> Iterator[Any]:
        """One column's cells, in order."""
        return (row[column] for row in self.select([column]).rows())

    def count(self) -> int:
        """Number of rows, by reading them all."""
        with _explained(self.name):
            return sum(table.num_rows for table in self.dataset.with_format("arrow").iter(1000))

    def select(self, columns: Sequence[str]) -> StreamSource:
        """The same rows with these columns only."""
        return StreamSource(self.dataset.select_columns(list(columns)), self.name, self.folders)


Source = MapSource | StreamSource


class _Table(MapSource):
    def __init__(self, dataset: Dataset, name: str, folders: Folders | None) -> None:
        self.name, self.folders = name, folders or {}
        self.dataset = _undecoded(dataset)
        self.columns = tuple(dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> Row:
        with _explained(self.name):
            return _resolved(self.dataset[int(index)], self.folders)

    def values(self, column: str) -> Iterator[Any]:
        for rows in self.dataset.select_columns([column]).iter(1000):
            yield from rows[column]

    def present(self, columns: Sequence[str]) -> np.ndarray:
        if not columns:
            return np.arange(len(self))
        tables = self.dataset.select_columns(list(columns)).with_format("arrow").iter(1000)
        masks = [np.logical_and.reduce([table[name].is_valid() for name in columns]) for table in tables]
        return np.flatnonzero(np.concatenate(masks)) if masks else np.arange(0)

    def select(self, columns: Sequence[str]) -> MapSource:
        return _Table(self.dataset.select_columns(list(columns)), self.name, self.folders)


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
    path = Path(where).expanduser()
    if path.is_dir():
        return _open_folder(spec, path)
    files = expand(where)
    suffixes = {Path(file).suffix.lower() for file in files}
    builders = BUILDERS | TEXT
    if len(suffixes) == 1 and suffixes <= set(builders):
        splits = split_by_name(files, Path(os.path.commonpath([Path(file).parent for file in files])))
        if len(splits) == 1:
            # The file was named outright, so its own name (test.parquet) does not speak against the split asked for.
            splits = {split_names(spec.split)[0]: files}
        return _load(spec, builders[suffixes.pop()], splits)
    if files and path.suffix.lower() in KINDS:
        raise DataError(f"{where} is one file; name the folder that holds the files")
    if files:
        found = ", ".join(sorted(suffixes))
        raise DataError(f"{where}: expected files of one kind out of {', '.join(builders)}, found {found or 'none'}")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", where) or path.suffix.lower() in builders:
        unset = re.search(r"\$\{?(\w+)", where)
        hint = f"set {unset[1]}, which the environment lacks" if unset else f"looked from {Path.cwd()}"
        raise DataError(f"{where}: there is no such file or folder ({hint})")
    return _load(spec, where, {})


def _open_folder(spec: Data, root: Path) -> Source:
    every = (Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
    files = sorted(file for file in every if not any(p.startswith(".") for p in file.relative_to(root).parts))
    for builders in (BUILDERS, dict.fromkeys(KINDS, "media"), TEXT):
        found = [file for file in files if file.suffix.lower() in builders]
        if not found:
            continue
        kinds = {builders[file.suffix.lower()] for file in found}
        if kinds == {"media"}:
            return _open_media(spec, root, found)
        if len(kinds) > 1:
            several = ", ".join(sorted(kinds))
            raise DataError(f"{root} holds tables of several kinds ({several}); name some, as in {root}/*.parquet")
        return _load(spec, kinds.pop(), split_by_name([str(file) for file in found], root))
    usable = ", ".join((*BUILDERS, *TEXT, *KINDS))
    raise DataError(f"{root} holds no usable file; known are {usable}")


def _open_media(spec: Data, root: Path, files: Sequence[Path]) -> Source:
    """One row a file; a clip is both sound and pictures. Sub-folders are classes where no file lies above them."""
    import datasets

    # Folders are splits only where all of them are: `train` may also be a class of vehicles.
    tops = {file.relative_to(root).parts[0].lower() for file in files}
    split_by_folder = tops <= set(SPLITS)
    splits: dict[str, list[Path]] = {}
    for file in files:
        split = SPLITS[file.relative_to(root).parts[0].lower()] if split_by_folder else "train"
        splits.setdefault(split, []).append(file)
    check_split(spec.source, spec.split, splits)
    try:
        parts = datasets.ReadInstruction.from_spec(spec.split).to_absolute({k: len(v) for k, v in splits.items()})
    except (AssertionError, ValueError) as error:
        raise DataError(f"{spec.source}: split '{spec.split}' cannot be read: {error}") from error
    files = [file for part in parts for file in splits[part.splitname][part.from_ : part.to]]
    kinds = [KINDS[file.suffix.lower()] for file in files]
    table: dict[str, list[str | None]] = {}
    for column, sources in {"image": {"image"}, "audio": {"audio", "video"}, "video": {"video"}}.items():
        if sources & set(kinds):
            table[column] = [str(file) if kind in sources else None for file, kind in zip(files, kinds, strict=True)]
    folders = [file.relative_to(root).parts[int(split_by_folder) : -1] for file in files]
    if all(folders):
        table["label"] = [folder[0] for folder in folders]
    return _limited(spec, datasets.Dataset.from_dict(table), {})


def _load(spec: Data, builder: str, splits: Mapping[str, Sequence[str]]) -> Source:
    """Through `datasets.load_dataset`: `builder` is one of its formats, or the name of a data set on the Hub."""
    import datasets

    folders: dict[str, Path] = {}
    where = f"{spec.source} (no local file or folder, so taken for a data set on the Hub)"
    arguments: dict[str, Any] = {"name": spec.config, "split": spec.split}
    if splits:
        check_split(spec.source, spec.split, splits)
        where = spec.source
        arguments["data_files"] = dict(splits)
        if "://" not in where:
            parents = [Path(file).parent for name in split_names(spec.split) for file in splits[name]]
            base = Path(os.path.commonpath(parents)).absolute()
            folders = {spec.columns.get(key, key): base for key in EXTENSIONS}
    with _explained(where):
        if builder == "webdataset" and not spec.streaming:
            # Preparing a sound for the cache needs torchcodec; as plain bytes it does not.
            features = datasets.load_dataset(builder, streaming=True, **arguments).features
            arguments["features"] = datasets.Features(
                {name: datasets.Value("binary") if _is_media(value) else value for name, value in features.items()}
            )
        dataset = datasets.load_dataset(builder, streaming=spec.streaming, **arguments)
        if builder == "text":
            dataset = dataset.filter(_not_blank, input_columns="text")
    return _limited(spec, dataset, folders)


def _limited(spec: Data, dataset: Dataset | IterableDataset, folders: Folders) -> Source:
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        return StreamSource(dataset.take(spec.limit) if spec.limit else dataset, spec.source, folders)
    if spec.limit and spec.limit < len(dataset):
        # Spread over the data set, which may be sorted by class.
        dataset = dataset.select(np.arange(spec.limit) * len(dataset) // spec.limit)
    return MapSource.from_dataset(dataset, spec.source, folders)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what reading a data set raises into one sentence about it."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        yield
    except (OSError, ValueError, ImportError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = " ".join(str(cause).split())
        if isinstance(cause, UnicodeDecodeError):
            reason += "; text should be UTF-8: `iconv -f latin1 -t utf-8` converts it, `iconv -c -t utf-8` cleans it"
        elif "surrogate" in reason:
            reason += "; whoever wrote it cut a character in two: in Python, text.encode('utf-8', 'replace').decode()"
        raise DataError(f"{name}: cannot be read: {reason}") from error


def _not_blank(text: str) -> bool:
    return bool(text.strip())


def _is_media(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image | datasets.Audio | datasets.Video)


def _undecoded(dataset: Any) -> Any:
    """Pictures, sounds and clips as their stored bytes and path: decoding is ours, and `datasets` needs torchcodec."""
    import datasets

    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    streaming = isinstance(dataset, datasets.IterableDataset)
    for column, feature in (dataset.features or {}).items():
        if _is_media(feature):
            # On a table the feature's own switch costs nothing; in a stream it would still ask for torchcodec.
            dataset = dataset.cast_column(column, stored if streaming else type(feature)(decode=False))
    return dataset


def _resolved(row: Row, folders: Folders) -> Row:
    found = {c: str(folder / row[c]) for c, folder in folders.items() if isinstance(row.get(c), str)}
    return {**row, **found}
