"""What is said of files that are not read, or not as rows."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmssl.data.files import BUILDERS, JSON, KINDS, TEXT, extension, some_of, split_in

_ABOUT = re.compile(r"readme|licen[cs]e|copying|notice|changelog|citation|authors|credits", re.IGNORECASE)


def others(files: Iterable[Path], used: Iterable[Path]) -> list[str]:
    """Notes on files that are of no kind known here, or not of the kind that was taken; none where there are none.

    Those that may be taken to say something about the others are told: tables that name splits, a text of the name of
    each picture, pictures that a table may name.
    """
    used = list(used)
    left = sorted(set(files) - set(used))
    media = [file for file in left if file.suffix.lower() in KINDS] if used else []
    rest = sorted({*left} - {*media})
    notes = []
    if media:
        notes.append(f"files of other kinds are read where a column of the table names them: {_kinds(media)}")
    if rest:
        notes.append(f"files of other kinds are left out: {_kinds(rest)}")
    if used and used[0].suffix.lower() in KINDS:
        telling = [file for file in rest if extension(file) in {*TEXT, *JSON, ".xml"}]
        if len({split_in(file.stem) for file in telling} - {None}) > 1:
            lists = some_of([file.name for file in telling if split_in(file.stem)])
            notes.append(f"lists of splits are not read ({lists}); a folder for each split makes them splits")
        named = {file.with_suffix("") for file in used} if telling else set()
        beside = [file.name for file in telling if file.with_suffix("") in named]
        if beside:
            notes.append(
                f"nothing is read from {some_of(beside)}, of the names of files that are read; packed together, as in "
                "tar --sort=name -cf pairs.tar, they are columns of one row"
            )
    return notes


def unread(files: Sequence[Path]) -> list[str]:
    """Notes on tables and lists of splits in a folder of annotated pictures, of which neither is read."""
    named = {file.stem for file in files if file.suffix.lower() in KINDS}
    tables = [file.name for file in files if extension(file) in BUILDERS]
    lists = [file for file in files if extension(file) in TEXT and file.stem not in named and split_in(file.stem)]
    lists = [file for file in lists if "ImageSets" not in file.parts]  # which VOC reads
    notes = [f"tables are not read next to annotations: {some_of(sorted({*tables}))}"] if tables else []
    if len({split_in(file.stem) for file in lists}) > 1:
        notes.append(
            f"lists of splits are not read ({some_of([file.name for file in lists])}); a folder for each split makes "
            "them splits"
        )
    return notes


def without_readme(texts: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The texts of a folder that are not about the others, as by their names a README or LICENSE is, and a note."""
    told = [file for file in texts if _ABOUT.fullmatch(file.stem)]
    if not told or len(told) == len(texts):
        return list(texts), []
    names = some_of(sorted({file.name for file in told}))
    return [file for file in texts if file not in told], [
        f"left out, for by their names they are about the others: {names}"
    ]


def next_to_folders(root: Path, texts: Sequence[Path]) -> list[str]:
    """A note on the few texts that lie next to folders which hold most of the others, such as lists of addresses."""
    holding = Counter(file.parent for file in texts)
    above = {parent for folder in holding for parent in folder.parents}
    stray = [file for file in texts if file.parent in above]
    if not stray or 2 * len(stray) > len(texts):
        return []
    names = some_of([os.path.relpath(file, root) for file in stray])
    pattern = os.path.join(root, *["*"] * (max(len(file.relative_to(root).parts) for file in texts) - 1), "*.txt")
    return [f"read as rows, though they lie next to the folders of the others: {names}; {pattern} leaves them out"]


def _kinds(files: Iterable[Path]) -> str:
    found = Counter(file.suffix.lower() or file.name for file in files)
    more = f" and {len(found) - 6} more kinds" if len(found) > 6 else ""
    return ", ".join(f"{number} {kind}" for kind, number in found.most_common(6)) + more
