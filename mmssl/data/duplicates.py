"""Rows of one split that are in another one as well: probes would score what they learned by heart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.data.base import MapSource
from mmssl.errors import DataError
from mmssl.media.image import decode_image

ROWS = 2000
"""Of each split that are compared, spread over it."""
SIDE, ALIKE, FLAT = 16, 0.998, 2.0
"""Gray thumbnails of so many pixels that correlate like that are one picture, saved, scaled or lit anew; those that
vary by fewer gray levels tell nothing."""


def across_splits(splits: Mapping[str, MapSource], column: str, *, images: bool, rows: int = ROWS) -> list[str]:
    """What two splits share, a sentence each.

    Args:
        splits: name -> its rows.
        column: that is compared.
        images: whether it holds pictures, of which nearly equal ones are found as well: by the correlation of their
            thumbnails, in place of bits of it as in difference hashing.
        rows: of each split at most.
    """
    read = {name: source.select((column,)) for name, source in splits.items()}
    equal = {name: _digests(source, column, rows) for name, source in read.items()}
    small = {name: _thumbnails(source, column, rows) for name, source in read.items()} if images else {}
    found = []
    for one, other in combinations(splits, 2):
        total = len(splits[other])
        of = f"of {total:,} rows" if total <= rows else f"of {rows:,} rows looked at"
        shared = equal[one].keys() & equal[other].keys()
        if shared:
            count, first = sum(len(equal[other][digest]) for digest in shared), min(shared)
            found.append(
                f"{other} shares {count} {of} with {one}: {column} of row {equal[other][first][0]} is that of row "
                f"{equal[one][first][0]}"
            )
        if images:
            pairs = _alike(small[one], small[other])
            near = {b: a for a, b in pairs if not _same(equal[one], equal[other], shared, a, b)}
            if near:
                last, first_row = next(iter(near.items()))
                found.append(
                    f"{other} shares {len(near)} {of} with {one} but for how they are saved, scaled or lit: row {last} "
                    f"looks like row {first_row}"
                )
    return found


def _numbers(source: MapSource, rows: int) -> Sequence[int]:
    size = len(source)
    return range(size) if size <= rows else [i * size // rows for i in range(rows)]


def _cells(source: MapSource, column: str, rows: int) -> Iterator[tuple[int, Any]]:
    for number in _numbers(source, rows):
        yield number, source.row(number)[column]


def _digests(source: MapSource, column: str, rows: int) -> dict[bytes, list[int]]:
    """Hash of a cell's content -> rows that hold it; cells that cannot be read are left out."""
    found: dict[bytes, list[int]] = {}
    for number, cell in _cells(source, column, rows):
        content = _content(cell)
        if content:
            found.setdefault(hashlib.blake2b(content, digest_size=16).digest(), []).append(number)
    return found


def _content(cell: Any) -> bytes:
    if isinstance(cell, Mapping):
        return _content(cell.get("bytes") or cell.get("path"))
    if isinstance(cell, np.ndarray):
        return cell.tobytes()
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str | Path):
        return b""
    with suppress(OSError):
        if os.path.isfile(cell):  # no pipe, which would never end
            return Path(cell).read_bytes()
    return str(cell).encode("utf-8", "surrogateescape")


def _thumbnails(source: MapSource, column: str, rows: int) -> tuple[list[int], NDArray[np.float32]]:
    """Numbers of the rows whose pictures are not flat, and these as unit vectors (N, SIDE * SIDE)."""
    numbers: list[int] = []
    vectors = []
    for number, cell in _cells(source, column, rows):
        try:
            gray = decode_image(cell, SIDE).float().mean(0).flatten().numpy()
        except DataError:
            continue  # a broken row is said elsewhere
        gray = gray - gray.mean()
        if gray.std() >= FLAT:
            numbers.append(number)
            vectors.append(gray / np.linalg.norm(gray))
    return numbers, np.array(vectors, np.float32).reshape(-1, SIDE * SIDE)


def _alike(
    one: tuple[list[int], NDArray[np.float32]], other: tuple[list[int], NDArray[np.float32]]
) -> Iterator[tuple[int, int]]:
    """Rows of both whose thumbnails correlate."""
    for a, b in np.argwhere(one[1] @ other[1].T >= ALIKE).tolist():
        yield one[0][a], other[0][b]


def _same(
    one: Mapping[bytes, Sequence[int]], other: Mapping[bytes, Sequence[int]], shared: set[bytes], a: int, b: int
) -> bool:
    """Whether two rows are equal, which has been said."""
    return any(a in one[digest] and b in other[digest] for digest in shared)
