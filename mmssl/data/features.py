"""What a Hugging Face data set says of its columns: which hold media, and what their classes are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mmssl.errors import DataError


def undecoded(dataset: Any) -> Any:
    """Pictures, sounds and clips as their stored bytes and path: decoding is ours, and `datasets` needs torchcodec."""
    import datasets

    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    streaming = isinstance(dataset, datasets.IterableDataset)
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            # On a table the feature's own switch costs nothing; in a stream it would still ask for torchcodec.
            dataset = dataset.cast_column(column, stored if streaming else type(feature)(decode=False))
    return dataset


def with_fields(dataset: Any, names: Iterable[str], source: str) -> Any:
    """A data set with a column for each name such as `caption.en`, a field of the column `caption`.

    Args:
        dataset: of `datasets`.
        names: of columns that are asked for; those that are there, or in no column, are left to whoever reads them.
        source: for the error.

    Raises:
        DataError: for a field that is not there, and for any of a stream.
    """
    import datasets

    there = dataset.column_names or ()
    for name in dict.fromkeys(names):
        column = name.partition(".")[0]
        if name in there or column not in there:
            continue
        if isinstance(dataset, datasets.IterableDataset):
            raise DataError(f"{source}: '{name}' is a field of a column, which a stream does not read; download it")
        fields = dataset.select_columns([column]).flatten()
        if name not in fields.column_names:
            has = ", ".join(fields.column_names)
            raise DataError(f"{source}: column '{column}' has no field '{name.partition('.')[2]}'; it has: {has}")
        dataset = datasets.concatenate_datasets([dataset, fields.select_columns([name])], axis=1)
    return dataset


def names_of_classes(dataset: Any, column: str) -> list[str] | None:
    """Names of the classes whose numbers a column holds, one or a list a row; None where the data set says none."""
    return _names((dataset.features or {}).get(column))


def name_of(cell: Any, names: Sequence[str]) -> Any:
    """The name of a class by its number, None for -1; the names of a list of them."""
    if isinstance(cell, list):
        return [name for name in (name_of(item, names) for item in cell) if name is not None]
    return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else None


def _names(feature: Any) -> list[str] | None:
    names: list[str] | None = getattr(getattr(feature, "feature", feature), "names", None)
    return names


def check_classes(files: Iterable[str], source: str) -> None:
    """Raise DataError where parquet or arrow files of one split number the classes of a column differently.

    `datasets` takes the names of the first file for all of them. Files at addresses are not looked at.
    """
    first: dict[str, tuple[list[str], str]] = {}
    for file in files:
        for column, names in _stored_classes(file).items():
            known, other = first.setdefault(column, (names, file))
            if known != names:
                orders = f"{', '.join(known[:5])} and {', '.join(names[:5])}"
                raise DataError(
                    f"{source}: {other} and {file} number the classes of '{column}' differently ({orders}); write "
                    "their names as strings, or name one of the files"
                )


def _stored_classes(file: str) -> dict[str, list[str]]:
    """Column -> names of its classes, as `datasets` wrote them into a file."""
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    if "://" in file:
        return {}
    try:
        if file.lower().endswith(".parquet"):
            schema = parquet.read_schema(file)
        else:
            with pa.memory_map(file) as mapped:
                schema = pa.ipc.open_stream(mapped).schema
        features = datasets.Features.from_arrow_schema(schema)
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return {}  # what cannot be read is told where it is read
    return {column: names for column, feature in features.items() if (names := _names(feature)) is not None}
