"""What the names of files and folders say: of which kind they are, to which split they belong, of which class they are.

Nothing is read but names. What is taken differently from what a user may think (files left out, splits that are not
read) comes back as notes, one sentence each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from glob import escape, glob, has_magic
from pathlib import Path
from typing import NamedTuple, TypeVar

from mmssl.errors import DataError

T = TypeVar("T")

EXTENSIONS = {
    "image": (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "bmp", "dib", "gif", "tif", "tiff", "avif"),
        *("jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm", "tga", "psd"),
    ),
    "audio": ("wav", "flac", "mp3", "ogg", "oga", "opus", "m4a", "aac", "aiff", "wma"),
    "video": ("mp4", "mkv", "webm", "mov", "avi", "m4v", "mpg", "mpeg", "ogv", "3gp", "flv", "wmv"),
}
KINDS = {f".{extension}": kind for kind, extensions in EXTENSIONS.items() for extension in extensions}
BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".tar": "webdataset",
}
MOST_FILES = 1_000_000
TEXT = {".txt": "text"}
JSON = {".json": "json"}
"""Of rows only where nothing else is: beside other files it says something about them."""
PACKED = (".gz", ".bz2", ".xz", ".zst")
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
    "holdout": "test",
    "trainval": "trainval",  # train, where there is no other
}
_SPLIT = re.compile(rf"({'|'.join(sorted(SPLITS, key=len, reverse=True))})[-_.]?\d*", re.IGNORECASE)
# The word of a split anywhere in a name: my.train.small, trainA, Test Set.
_WORD = re.compile(rf"(?<![A-Za-z])(?i:({'|'.join(sorted(SPLITS, key=len, reverse=True))}))(?=(?i:set)|[^a-z]|$)")
# Also with the hash that the Hub puts after it: train-00000-of-00001-4f1b2c3d.
_SHARD = re.compile(r"[-_.]\d+(-of-\d+)?(-[0-9a-f]{6,})?$")


class Layout(NamedTuple):
    """Files of each split.

    Attributes:
        splits: name -> files.
        classes: file -> name of its class, by its folder; empty where folders are no classes.
        notes: what a user may not expect.
    """

    splits: dict[str, list[Path]]
    classes: dict[Path, str]
    notes: list[str]


def parted(file: str | Path) -> tuple[str, str]:
    """A file's name and its extension in small letters, as what it is when unpacked: `a.jsonl.gz` is `.jsonl`.

    Of an address what follows a question mark is no part of the name. Pictures, sounds, clips, parquet and arrow are
    packed already and are not unpacked.
    """
    path = file if isinstance(file, Path) else Path(re.sub(r"[?#].*", "", file) if "://" in file else file)
    suffix = path.suffix.lower()
    if suffix in PACKED:
        inner = Path(path.stem)
        if inner.suffix.lower() in {*BUILDERS, *TEXT, *JSON} - {".parquet", ".arrow"}:
            return inner.stem, inner.suffix.lower()
    return path.stem, ".tar" if suffix == ".tgz" else suffix


def extension(file: str | Path) -> str:
    """See `parted`, of which this is the quicker half: folders may hold millions of files."""
    suffix = file.suffix.lower() if isinstance(file, Path) else ""
    return parted(file)[1] if not suffix or suffix in PACKED or suffix == ".tgz" else suffix


def known_extensions() -> str:
    """What can be read, in a few words."""
    words = {"image": "pictures", "audio": "sounds", "video": "clips"}
    kinds = (f"{words[kind]} ({', '.join(f'.{one}' for one in own[:3])} ...)" for kind, own in EXTENSIONS.items())
    return ", ".join((*BUILDERS, *TEXT, *JSON, *kinds))


def split_names(split: str) -> list[str]:
    """`train[:80%]+test` -> train, test."""
    return re.findall(r"\w+", re.sub(r"\[.*?\]", "", split)) or [split]


def check_split(source: str, split: str, splits: Iterable[str]) -> None:
    """Raise DataError where `split` names one that is not among `splits`."""
    for name in split_names(split):
        if name not in splits:
            raise DataError(f"{source} has no split '{name}'; it has: {', '.join(splits)}")


def split_of(name: str) -> str | None:
    """The split that a whole name stands for, such as `val` or `train2017`; None for any other name."""
    found = _SPLIT.fullmatch(name)
    return SPLITS[found[1].lower()] if found else None


def split_in(stem: str) -> str | None:
    """The split that a table's name tells: the whole of it, or its first or last word.

    Words are parted by `_`, `-` and `.`, numbers of shards are passed over: `emoji_train`, `captions_val2017` and
    `test-00000-of-00002` tell one, `photo of a train` tells none.
    """
    name = _SHARD.sub("", stem)
    words = re.split(r"[-_.]", name)
    return split_of(stem) or split_of(name) or split_of(words[-1]) or split_of(words[0])


def splits_alike(names: Iterable[str]) -> dict[str, str]:
    """The splits of names that are equal but for its word: `seg_train` and `seg_test`, `trainA` and `testA`.

    `test_tube` and `train_station` are not.
    """
    told: dict[tuple[str, ...], dict[str, str]] = {}
    for name in sorted(names):
        words = _WORD.split(_SHARD.sub("", name))
        if len(words) == 3:  # before, the word, after
            told.setdefault((words[0], words[2]), {})[name] = SPLITS[words[1].lower()]
    alike = [splits for splits in told.values() if len(set(splits.values())) > 1]
    return {name: split for splits in alike for name, split in splits.items()}


def folders_below(root: Path, files: Iterable[Path]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Each file, and the folders that it is in below the root; worked out once for each of these."""
    known: dict[str, tuple[str, ...]] = {}
    for file in files:
        folder = str(file).rpartition(os.sep)[0] or os.path.dirname(file)
        if folder not in known:
            known[folder] = Path(folder).relative_to(root).parts
        yield file, known[folder]


def split_by_name(files: Sequence[str], root: Path, documents: bool = False) -> tuple[dict[str, list[str]], list[str]]:
    """Split -> tables, by the folders that they are in and by their own names; `train` where nothing is told.

    Args:
        files: tables of one kind.
        root: folder above all of them.
        documents: whether they are texts with titles of their own, of which a word is a split only where titles name
            two splits or more.

    Returns:
        The splits, and notes where a file was taken for another split than `train`, or folders for no classes.
    """
    parts = {file: (*Path(os.path.relpath(file, root)).parts[:-1], parted(file)[0]) for file in files}
    alike = splits_alike({part for own in parts.values() for part in own})
    told: dict[str, str | None] = {}
    whole: set[str] = set()
    for file, (*folders, stem) in parts.items():
        exact = next(filter(None, map(split_of, [*folders, _SHARD.sub("", stem), stem])), None)
        told[file] = exact or split_in(stem) or next(filter(None, map(alike.get, parts[file])), None)
        if exact:
            whole.add(file)
    if documents and len({split for split in told.values() if split}) < 2:
        told = {file: split if file in whole else None for file, split in told.items()}
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(told[file] or "train", []).append(file)
    splits = _settled(splits)
    notes = [_which(splits, root)] if set(splits) != {"train"} else []
    silent = [os.path.relpath(file, root) for file in files if told[file] is None]
    if "train" in told.values() and silent:
        notes.append(f"read as train as well, though no name says so: {some_of(silent)}")
    classes = sorted({own[-2] for own in parts.values() if len(own) > 1 and not split_of(own[-2])})
    if documents and len(classes) > 1:
        notes.append(
            f"a line is a row, and folders of texts are read as no classes: {some_of(classes)}; a table with columns "
            "text and label has them"
        )
    return splits, notes


def media_layout(root: Path, files: Sequence[Path], labeled: bool = False) -> Layout:
    """Splits and classes of pictures, sounds or clips, by their folders.

    Folders are splits where two of one level name different ones (`train2017`, `val2017`) or differ in that word alone
    (`seg_train`, `seg_test`): then the others are splits of their own, such as `unlabeled`, and files outside of them
    are left out. One alone is a split where it is the only folder, else a class: `train` may be one of vehicles. Names
    that hold more (`train-clean-100`, `dev-clean`) are splits where all do. The next folder is the class, where each
    file has one, unless a table has labels.
    """
    folders = dict(folders_below(root, files))
    depth, naming = _split_depth(list(folders.values()))
    notes: list[str] = []
    splits: dict[str, list[Path]] = {}
    if depth is None:
        splits["train"] = list(files)
        rest = _inside(folders, 1)
        notes += _untaken(files)
    else:
        stray = [file for file in files if len(folders[file]) <= depth]
        placed = {file: parts for file, parts in folders.items() if len(parts) > depth}
        for file, parts in placed.items():
            splits.setdefault(naming(parts[depth]) or re.sub(r"\W+", "_", parts[depth]), []).append(file)
        above = _inside({file: parts[:depth] for file, parts in placed.items()}, 0)
        # A split's folder in itself, as in seg_test/seg_test/cat, is no class.
        twice = all(parts[depth + 1 : depth + 2] == parts[depth : depth + 1] for parts in placed.values())
        rest = {file: above[file] + parts[depth + 1 + twice :] for file, parts in placed.items()}
        splits = _settled(splits)
        if stray:
            notes.append(f"left out, for they are in no split's folder: {some_of([f.name for f in stray])}")
    classes = {file: parts[0] for file, parts in rest.items() if parts and not labeled}
    unlabeled = [split for split, own in splits.items() if not any(file in classes for file in own)]
    bare = [file for split, own in splits.items() if split not in unlabeled for file in own if file not in classes]
    if classes and bare:
        notes.append(
            f"folders are taken for no classes, since some files are in none: {some_of([f.name for f in bare])}"
        )
        classes = {}
    if classes:
        below = sorted({parts[1] for parts in rest.values() if len(parts) > 1})
        deeper = f"; those below them are not: {some_of(below)}" if below else ""
        names = sorted(set(classes.values()))
        alone = [name for name in names if split_of(name)]
        classed = f"; {alone[0]} is no split, since no folder with it names another one" if alone else ""
        notes.append(f"folders are read as classes: {some_of(names)}{deeper}{classed}")
    if set(splits) != {"train"}:
        notes.append(_which(splits, root))
    return Layout(splits, classes, notes)


def _settled(splits: dict[str, list[T]]) -> dict[str, list[T]]:
    """`trainval` as the split that is trained on, unless there is a `train`, which it would repeat."""
    if "trainval" in splits and "train" not in splits:
        return {"train" if name == "trainval" else name: own for name, own in splits.items()}
    return splits


def _split_depth(folders: Sequence[tuple[str, ...]]) -> tuple[int | None, Callable[[str], str | None]]:
    """How many folders are above those that are splits, None where none are; and what tells a split by its name."""
    for depth in range(max(map(len, folders), default=0)):
        names = {parts[depth] if len(parts) > depth else "" for parts in folders}
        for naming in (split_of, split_in, splits_alike(names).get):
            told = {naming(name) for name in names}
            # Below one folder the others are splits of their own, where words are not only at an end (test_tube).
            others_may = len({parts[:depth] for parts in folders}) == 1 and naming is not split_in
            if len(told - {None}) >= 2 and (others_may or None not in told):
                return depth, naming
        if depth == 0 and None not in map(split_of, names):
            return depth, split_of
    return None, split_of


def _inside(folders: Mapping[Path, tuple[str, ...]], least: int) -> dict[Path, tuple[str, ...]]:
    """Without folders that hold all the files, such as `data`, of which each keeps `least`."""
    found = dict(folders)
    while all(len(parts) > least for parts in found.values()) and len({parts[0] for parts in found.values()}) == 1:
        found = {file: parts[1:] for file, parts in found.items()}
    return found


def _untaken(files: Sequence[Path]) -> list[str]:
    """A note where all files of media are named for splits, which folders alone are."""
    splits: dict[str, list[str]] = {}
    for file in files:
        split = split_in(file.stem)
        if split is None:
            return []
        splits.setdefault(split, []).append(file.name)
    if len(splits) < 2:
        return []
    named = "; ".join(f"{split}: {some_of(names)}" for split, names in sorted(splits.items()))
    return [f"all files are in train, though their names tell splits ({named}); a folder for each makes them splits"]


def _which(splits: dict[str, list[str]] | dict[str, list[Path]], root: Path) -> str:
    """Which file or folder went where, by as much of its path as tells one split from another."""
    paths = {split: [Path(os.path.relpath(file, root)).parts for file in own] for split, own in splits.items()}
    starts: dict[str, list[str]] = {}
    for depth in range(1, max(len(parts) for own in paths.values() for parts in own) + 1):
        starts = {split: list(dict.fromkeys("/".join(p[:depth]) for p in own)) for split, own in paths.items()}
        if len({start for own in starts.values() for start in own}) == sum(map(len, starts.values())):
            break
    return f"splits by name: {'; '.join(f'{split}: {some_of(own)}' for split, own in starts.items())}"


def some_of(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def expand(where: str) -> list[str]:
    """Files that a name, a glob or a brace list (`shard-{000..012}.tar`) stands for; addresses stay as they are.

    A name that is a file stands for itself, whatever characters it holds.
    """
    return list(_expand(where))


def _expand(where: str) -> Iterator[str]:
    local = str(Path(os.path.expanduser(where)))
    if "://" not in where and os.path.isfile(local):
        yield local
        return
    brace = re.search(r"\{([^{}]*)\}", where)
    if brace:
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
        if bounds and int(bounds[2]) - int(bounds[1]) > MOST_FILES:
            raise DataError(f"{where}: {brace[0]} names more than {MOST_FILES:,} files")
        options = (
            [f"{number:0{len(bounds[1])}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
            if bounds
            else brace[1].split(",")
        )
        for option in options:
            yield from _expand(where[: brace.start()] + option + where[brace.end() :])
    elif "://" in where:
        yield where
    elif has_magic(local):
        # Brackets in the name of a folder that is there are no pattern.
        folder = next(parent for parent in Path(local).parents if os.path.isdir(parent))
        yield from sorted(glob(os.path.join(escape(str(folder)), os.path.relpath(local, folder)), recursive=True))
