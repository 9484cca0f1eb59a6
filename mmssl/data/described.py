"""Files that a table next to them describes, a line each, as in folders of `datasets`: `metadata.csv`, `file_name`.

Splits are those of the files' folders, as without a table, and so are classes where the table has no labels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmssl.data.files import BUILDERS, EXTENSIONS, KINDS, extension, parted, some_of
from mmssl.errors import DataError, counted

if TYPE_CHECKING:
    from datasets import Dataset

FILE_NAME = "file_name"
TABLES = (".csv", ".jsonl", ".parquet")


def describing(files: Sequence[Path]) -> list[Path]:
    """The tables that may describe other files; none where there are other tables, or no other files."""
    tables = [file for file in files if extension(file) in BUILDERS]
    media = any(file.suffix.lower() in KINDS for file in files)
    return (
        tables if media and all(parted(file)[0] == "metadata" and extension(file) in TABLES for file in tables) else []
    )


def media_columns(files: Sequence[Path]) -> dict[str, list[str | None]]:
    """Column -> path of each file of that kind, None for another; a clip is both sound and pictures."""
    kinds = [KINDS[file.suffix.lower()] for file in files]
    return {
        column: [str(file) if kind in sources else None for file, kind in zip(files, kinds, strict=True)]
        for column, sources in {"image": {"image"}, "audio": {"audio", "video"}, "video": {"video"}}.items()
        if sources & set(kinds)
    }


def joined(tables: Mapping[Path, Dataset], media: Sequence[Path], files: Sequence[Path]) -> tuple[Dataset, str]:
    """The lines of some files, with a column for each kind of media in place of `file_name`, and a note about it.

    Args:
        tables: path -> lines; each names a file from the folder of its table.
        media: all files that there are.
        files: those that are wanted.

    Raises:
        DataError: where no line is of a wanted file.
    """
    import datasets

    there = {os.path.normpath(file) for file in media}
    wanted = {os.path.normpath(file): file for file in files}
    parts, described, astray = [], dict[Path, None](), 0
    for table, lines in tables.items():
        written = (str(name).replace("\\", "/") for name in lines[FILE_NAME])  # on Windows
        names = [os.path.normpath(table.parent / name) for name in written]
        astray += sum(name not in there for name in names)
        part = lines.select([number for number, name in enumerate(names) if name in wanted])
        found = [wanted[name] for name in names if name in wanted]
        described |= dict.fromkeys(found)
        columns: dict[str, list[Any]] = {**media_columns(found)}
        if "mask" in part.column_names:
            columns["mask"] = [str(table.parent / cell) if isinstance(cell, str) else cell for cell in part["mask"]]
        part = part.remove_columns([name for name in part.column_names if name in columns])
        for name, cells in columns.items():
            part = part.add_column(name, cells)
        part = part.remove_columns(FILE_NAME)  # which may be the only one
        if found:
            parts.append(part)
    named = some_of(list(dict.fromkeys(table.name for table in tables)))
    if not parts:
        table, lines = next(iter(tables.items()))
        raise DataError(
            f"no {FILE_NAME} in {named} is the path from the folder of its table to a file of the split, such as "
            f"{os.path.relpath(files[0], table.parent)}; {table} says {lines[FILE_NAME][0]}"
        )
    kinds = " and ".join(kind for kind in EXTENSIONS if kind in media_columns(list(described)))
    bare = len(files) - len(described)
    left = f"; {counted(bare, 'file has no line and is', 'files have no line and are')} left out" * (bare > 0)
    lost = f"; {counted(astray, 'line names a file that is', 'lines name files that are')} not there" * (astray > 0)
    return datasets.concatenate_datasets(parts), f"{FILE_NAME} of {named} is read as {kinds}{left}{lost}"
