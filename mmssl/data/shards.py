"""Webdataset shards: which parts their samples have, where not every sample has the same ones, and where they begin."""

from __future__ import annotations

import json
import mmap
import os
import tarfile
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from mmssl.data.files import EXTENSIONS
from mmssl.data.ranges import Ranges, fetch

if TYPE_CHECKING:
    from datasets import Features

SAMPLES = 100
AHEAD = 2**22
"""Bytes of a shard that are asked for at once."""
INDICES = ("index.json", "shardindex.json", "sizes.json")
"""Files beside shards that may say how many samples each has."""
BLOCK, FILE, FOLDER = 512, ord("0"), ord("5")
"""Of the tar format: bytes, and kinds of members."""


def shard_features(shards: Sequence[str]) -> tuple[Features, dict[str, list[str]]]:
    """Columns of a set of shards, from the first samples.

    `datasets` refuses shards whose first samples differ in their parts. Here the columns are those of all samples that
    were looked at, and where one of them is a picture (sound, clip), every extension of pictures is a column, so that
    a later `png` or `JPG` among `jpg` is not lost. A column of whole numbers and names, such as `cls`, is one of names.

    Args:
        shards: paths or addresses of tar files; the first that has samples tells.

    Returns:
        Features, media as plain bytes; and column -> the extensions that are one column together.
    """
    import datasets
    import pyarrow as pa

    opened = Shards(shards)
    each = ([one for _, one in islice(opened.samples(number, 0, None), SAMPLES)] for number in range(len(shards)))
    samples = next((found for found in each if found), [])
    for name in {name for sample in samples for name, cell in sample.items() if isinstance(cell, str)}:
        for sample in samples:
            if isinstance(sample.get(name), int):
                sample[name] = str(sample[name])
    tables = [pa.Table.from_pylist([sample]) for sample in samples]
    schema = pa.concat_tables(tables, promote_options="permissive").schema
    features = datasets.Features.from_arrow_schema(schema)
    merged: dict[str, list[str]] = {}
    for extensions in EXTENSIONS.values():
        spelled = [spelling for extension in extensions for spelling in (extension, extension.upper())]
        found = [name for name in features if name.lower() in extensions]
        if found:
            merged[found[0]] = list(dict.fromkeys([*found, *spelled]))
            features |= {name: datasets.Value("binary") for name in merged[found[0]]}
    return features, merged


def take_names() -> None:
    """Have `datasets` read `cls`, and other parts that it takes for whole numbers, as names where they are none.

    It knows one table of decoders, of the whole process, so that a worker has to call this as well.
    """
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    WebDataset.DECODERS.update({part: _number_or_name for part, read in WebDataset.DECODERS.items() if read is int})


def _number_or_name(content: bytes) -> Any:
    try:
        return int(content)
    except ValueError:
        return content.decode().strip()


class Shards:
    """Samples of tar files, and the bytes at which they begin.

    Args:
        files: paths or addresses.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self._indices: dict[str, dict[str, int]] = {}
        self._looking = Lock()

    def places(self, number: int, counts: Callable[[Container[str]], bool]) -> list[int] | None:
        """Where the samples of a file on this machine begin, in bytes; None for one at an address, or a compressed one.

        Args:
            number: of the file.
            counts: whether a sample with these parts is a row.
        """
        from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

        file = self.files[number]
        if "://" in file or not _is_plain(file):
            return None
        found: list[int] = []
        key, start, parts = None, 0, set[str]()
        for offset, name in chain(_members(file), [(0, None)]):
            this, part = (None, "") if name is None or _is_hidden(name) else base_plus_ext(name)
            if this is None and name is not None:
                continue
            if this != key:
                if key is not None and counts(parts):
                    found.append(start)
                key, start, parts = this, offset, set()
            parts.add(str(part))
        return found

    def samples(self, number: int, place: int, end: int | None) -> Iterator[tuple[int | None, dict[str, Any]]]:
        """Samples of a file between two places, or to its end, each with its own place; None in a compressed one."""
        from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

        take_names()
        begins: deque[tuple[str, int | None]] = deque()
        raw = Ranges(self.files[number], place, end)
        # A compressed file can be entered at its beginning only.
        with BufferedReader(raw, AHEAD) as file, tarfile.open(fileobj=file, mode="r|" if place else "r|*") as opened:
            tar: Any = opened

            def members() -> Iterator[tuple[str, Any]]:
                for member in tar:
                    if member.isreg() and not _is_hidden(member.name):
                        key = base_plus_ext(member.name)[0]
                        if key is not None and (not begins or begins[-1][0] != key):
                            begins.append((key, place + member.offset if tar.fileobj.comptype == "tar" else None))
                        yield member.name, tar.extractfile(member)
                    tar.members = []  # it would remember every one

            for sample in WebDataset._get_pipeline_from_tar(self.files[number], members()):
                yield begins.popleft()[1], sample

    def rows_by_index(self, number: int) -> int | None:
        """Samples of a file by the index beside it, webdataset's or open_clip's `sizes.json`; None without one."""
        folder, _, name = self.files[number].rpartition("/")
        with self._looking:
            if folder not in self._indices:
                self._indices[folder] = _index(folder)
        return self._indices[folder].get(name)


def _index(folder: str) -> dict[str, int]:
    """Name of file -> samples."""
    for name in INDICES:
        try:
            content = fetch(f"{folder}/{name}") if "://" in folder else Path(folder, name).read_bytes()
            told = json.loads(content)
        except (OSError, ValueError):
            continue
        if isinstance(told, dict):
            listed = told.get("shardlist")
            pairs = [(one["url"], one["nsamples"]) for one in listed] if isinstance(listed, list) else told.items()
            return {str(file).rpartition("/")[2]: rows for file, rows in pairs if isinstance(rows, int)}
    return {}


def _members(file: str) -> Iterator[tuple[int, str]]:
    """Byte and name of each file in a tar file, by its headers alone."""
    with open(file, "rb") as opened:
        if not os.fstat(opened.fileno()).st_size:
            raise tarfile.ReadError("empty file")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            at, found = 0, []
            while at + BLOCK <= len(content) and content[at]:
                kind, size = content[at + 156], content[at + 124 : at + 136].strip(b" \0")
                if kind not in (0, FILE, FOLDER) or not size.isdigit():
                    break  # long names and sizes, which tarfile knows to read
                if kind != FOLDER:
                    found.append((at, _name(content, at)))
                at += BLOCK + -(-int(size, 8) // BLOCK) * BLOCK
            if at + BLOCK <= len(content) and not content[at]:
                return iter(found)
            if at < len(content) < at + BLOCK:  # of which tarfile says nothing
                raise tarfile.ReadError(f"it breaks off within a header, after {len(content):,} bytes")
    with tarfile.open(file, "r:") as tar:
        return iter([(member.offset, member.name) for member in tar if member.isreg()])


def _name(content: mmap.mmap, at: int) -> str:
    name = content[at : at + 100].partition(b"\0")[0]
    front = content[at + 345 : at + 500].partition(b"\0")[0] if content[at + 257 : at + 263] == b"ustar\0" else b""
    return (front + b"/" + name if front else name).decode("utf-8", "surrogateescape")


def _is_hidden(name: str) -> bool:
    """As `datasets` has it."""
    return os.path.basename(name).startswith((".", "__"))


def _is_plain(file: str) -> bool:
    """Whether a tar file is not compressed."""
    with open(file, "rb") as opened:
        return not opened.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00"))
