"""What the names of files say: of which kind they are, and to which split they belong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from glob import glob, has_magic
from pathlib import Path

from mmssl.errors import DataError

EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"),
    "audio": ("wav", "flac", "mp3", "ogg", "oga", "opus", "m4a", "aac", "aiff", "wma"),
    "video": ("mp4", "mkv", "webm", "mov", "avi", "m4v", "mpg", "mpeg", "ogv", "3gp", "flv", "wmv"),
}
KINDS = {f".{extension}": kind for kind, extensions in EXTENSIONS.items() for extension in extensions}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".jsonl": "json", ".tar": "webdataset"}
TEXT = {".txt": "text"}
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def split_names(split: str) -> list[str]:
    """`train[:80%]+test` -> train, test."""
    return re.findall(r"\w+", re.sub(r"\[.*?\]", "", split)) or [split]


def check_split(source: str, split: str, splits: Iterable[str]) -> None:
    """Raise DataError where `split` names one that is not among `splits`."""
    for name in split_names(split):
        if name not in splits:
            raise DataError(f"{source} has no split '{name}'; it has: {', '.join(splits)}")


def split_by_name(files: Sequence[str], root: Path) -> dict[str, list[str]]:
    """Split -> tables: a folder `test`, or a file called `test`, `test_0` or `test-00000-of-00002`; else `train`."""
    splits: dict[str, list[str]] = {}
    for file in files:
        *folders, last = Path(os.path.relpath(file, root)).parts
        names = [*folders, re.sub(r"[-_.]\d[\w-]*$", "", Path(last).stem)]
        split = next((SPLITS[name.lower()] for name in names if name.lower() in SPLITS), "train")
        splits.setdefault(split, []).append(file)
    return splits


def expand(where: str) -> list[str]:
    """Files that a name, a glob or a brace list (`shard-{000..012}.tar`) stands for; addresses stay as they are."""
    brace = re.search(r"\{([^{}]*)\}", where)
    if brace:
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
        options = (
            [f"{number:0{len(bounds[1])}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
            if bounds
            else brace[1].split(",")
        )
        return [file for option in options for file in expand(where[: brace.start()] + option + where[brace.end() :])]
    if "://" in where:
        return [where]
    local = str(Path(where).expanduser())
    if has_magic(local):
        return sorted(glob(local, recursive=True))
    return [local] if Path(local).is_file() else []
