"""Rows of one split that are in another one as well: probes would score what they learned by heart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

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
    read = {name: _look(source.select((column,)), column, rows, images) for name, source in splits.items()}
    equal = {name: one.digests for name, one in read.items()}
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
            pairs = _alike(read[one], read[other])
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


class _Looked(NamedTuple):
    """What is compared of a split.

    Attributes:
        digests: hash of a cell's content -> rows that hold it; cells that cannot be read are left out.
        numbers: rows whose pictures are not flat.
        thumbnails: of these, unit vectors (N, SIDE * SIDE).
    """

    digests: dict[bytes, list[int]]
    numbers: list[int]
    thumbnails: NDArray[np.float32]


def _look(source: MapSource, column: str, rows: int, images: bool) -> _Looked:
    """Every cell is read once: it may be a file, or have to be rendered."""
    digests: dict[bytes, list[int]] = {}
    small: dict[int, NDArray[np.float32]] = {}
    for number in _numbers(source, rows):
        cell = source.row(number)[column]
        if content := _content(cell):
            digests.setdefault(hashlib.blake2b(content, digest_size=16).digest(), []).append(number)
        vector = _thumbnail(cell) if images else None
        if vector is not None:
            small[number] = vector
    thumbnails = np.array(list(small.values()), np.float32).reshape(-1, SIDE * SIDE)
    return _Looked(digests, list(small), thumbnails)


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


def _thumbnail(cell: Any) -> NDArray[np.float32] | None:
    """A unit vector (SIDE * SIDE,); None of a flat picture, and of a broken one, which is said elsewhere."""
    try:
        gray = decode_image(cell, SIDE).float().mean(0).flatten().numpy()
    except DataError:
        return None
    gray = gray - gray.mean()
    return gray / np.linalg.norm(gray) if gray.std() >= FLAT else None


def _alike(one: _Looked, other: _Looked) -> Iterator[tuple[int, int]]:
    """Rows of both whose thumbnails correlate."""
    for a, b in np.argwhere(one.thumbnails @ other.thumbnails.T >= ALIKE).tolist():
        yield one.numbers[a], other.numbers[b]


def _same(
    one: Mapping[bytes, Sequence[int]], other: Mapping[bytes, Sequence[int]], shared: set[bytes], a: int, b: int
) -> bool:
    """Whether two rows are equal, which has been said."""
    return any(a in one[digest] and b in other[digest] for digest in shared)
