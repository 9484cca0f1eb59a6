"""Tables in parts as one parquet file, npz archive, csv or json file; a part at a time in memory."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmssl.errors import DataError

if TYPE_CHECKING:
    import pyarrow


def write_parquet(parts: Sequence[Path], target: Path) -> None:
    """A row group a part."""
    import pyarrow.parquet

    schema = _schema(parts)
    with pyarrow.parquet.ParquetWriter(target, schema) as writer:
        for part in parts:
            writer.write_table(pyarrow.parquet.read_table(part).cast(schema))


def write_npz(parts: Sequence[Path], target: Path) -> None:
    """An array a column, without objects: `numpy.load` reads it with `allow_pickle=False`.

    Numbers with gaps are floats with NaN, texts are padded to one length, and what else a cell may hold is JSON.
    """
    import pyarrow.parquet

    schema = _schema(parts)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for field in schema:

            def columns(name: str = field.name) -> Iterator[pyarrow.ChunkedArray]:
                for part in parts:
                    yield pyarrow.parquet.read_table(part, columns=[name])[name].cast(schema.field(name).type)

            gaps = any(column.null_count for column in columns())
            convert = _converter(field.type, gaps)
            dtype, shape, rows = np.dtype(bool), (), 0
            for column in columns():
                array = convert(column)
                dtype = array.dtype if rows == 0 else np.promote_types(dtype, array.dtype)
                shape, rows = array.shape[1:], rows + len(array)
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, *shape)}
            with archive.open(f"{field.name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, header)
                for column in columns():
                    file.write(np.ascontiguousarray(convert(column), dtype=dtype).tobytes())


def write_csv(parts: Sequence[Path], target: Path) -> None:
    """A line a row under the names of the columns; empty where a cell is missing, JSON where it holds several."""
    import pyarrow.parquet

    schema = _schema(parts)
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(schema.names)
        for part in parts:
            table = pyarrow.parquet.read_table(part).cast(schema)
            writer.writerows(zip(*map(_texts, table.columns), strict=True))


def write_json(parts: Sequence[Path], target: Path) -> None:
    """A list of objects, one a row."""
    import pyarrow.parquet

    schema = _schema(parts)
    with target.open("w", encoding="utf-8") as file:
        file.write("[")
        for number, part in enumerate(parts):
            rows = pyarrow.parquet.read_table(part).cast(schema).to_pylist()
            lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
            file.write(",\n" * (number > 0) + ",\n".join(lines))
        file.write("]\n")


def _texts(column: pyarrow.ChunkedArray) -> list[Any]:
    cells: list[Any] = column.to_pylist()
    if str(column.type) == "float":  # 0.1 of single precision is no 0.10000000149011612
        return [None if cell is None else str(np.float32(cell)) for cell in cells]
    return [cell if isinstance(cell, int | float) else _text(cell) for cell in cells]


def _converter(kind: pyarrow.DataType, gaps: bool) -> Any:
    """A column of a part -> an array without objects."""
    import pyarrow.types as types

    if types.is_fixed_size_list(kind):
        return lambda column: np.concatenate(
            [np.asarray(chunk.flatten()).reshape(len(chunk), kind.list_size) for chunk in column.chunks]
        )
    if types.is_floating(kind) or (types.is_integer(kind) and gaps):
        return lambda column: column.cast("float64" if types.is_integer(kind) else kind).to_numpy()
    if (types.is_integer(kind) or types.is_boolean(kind)) and not gaps:
        return lambda column: column.to_numpy()
    return lambda column: np.array([_text(cell) for cell in column.to_pylist()], dtype=np.str_)


def _text(cell: Any) -> str:
    return "" if cell is None else cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str)


def _schema(parts: Sequence[Path]) -> pyarrow.Schema:
    """Types that hold the cells of every part: one without a cell of some column cannot tell its type."""
    import pyarrow.parquet

    try:
        return pyarrow.unify_schemas(
            [pyarrow.parquet.read_schema(part) for part in parts], promote_options="permissive"
        )
    except (pyarrow.ArrowTypeError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"a column holds cells of several kinds: {error}") from error


FORMATS = {".csv": write_csv, ".parquet": write_parquet, ".json": write_json, ".npz": write_npz}
