"""What the readers of annotations return, and what they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmssl.data.base import Row
from mmssl.data.files import folders_below, split_of
from mmssl.errors import counted

IMAGES = {"images", "image", "imgs", "img", "pictures", "photos", "jpegimages", "leftimg8bit"}
NOTES = {"annotations", "annotation", "labels", "label", "xmls", "xml", "captions", "caption", "texts", "text", "txt"}

UNLABELED = "unlabeled"
"""The split of pictures that no annotations are about: good for pretraining."""


class Annotations(NamedTuple):
    """What a folder holds.

    Attributes:
        splits: name -> rows, of which there are some.
        note: what was found, a sentence.
    """

    splits: dict[str, list[Row]]
    note: str


def split_among(folders: tuple[str, ...]) -> str:
    """The split that the first of some folders tells that tells one, or `train`."""
    return next(filter(None, map(split_of, folders)), "train")


def stored(file: Path) -> dict[str, str | None]:
    """A file as a cell of a picture that is no name of a class."""
    return {"bytes": None, "path": str(file)}


def shown(root: Path, file: Path) -> str:
    """A file's path below the folder, or outside of it as it is."""
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def beside(root: Path, pictures: Iterable[Path], files: Iterable[Path]) -> dict[Path, Path]:
    """Picture -> the file of its name in the same folder, or in one that differs by `images` and `labels` alone.

    Args:
        root: above all of them.
        pictures: whose files are looked for; those that have none are left out.
        files: with what is written about pictures.
    """
    known = {_place(file, folders): file for file, folders in folders_below(root, files)}
    placed = ((picture, _place(picture, folders)) for picture, folders in folders_below(root, pictures))
    return {picture: known[place] for picture, place in placed if place in known}


def _place(file: Path, folders: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    return tuple(folder for folder in folders if folder.lower() not in IMAGES | NOTES), file.stem


def boxed_rows(root: Path, pictures: Sequence[Path], things: Mapping[Path, Row], kind: str) -> Annotations:
    """Rows of pictures in whose folder one at least has boxes; other pictures, such as masks, are counted.

    Args:
        root: above all of them.
        pictures: all.
        things: picture -> `boxes`, `classes`, `crowd` and perhaps `mask`, of those about which something is written.
        kind: of the annotations, for the note.
    """
    used = {picture.parent for picture in things}
    splits: dict[str, list[Row]] = {}
    unread: Counter[str] = Counter()
    for picture, folders in folders_below(root, [picture for picture in pictures if picture.parent in used]):
        unread.update(folder for folder in folders if folder.lower() not in IMAGES | NOTES and not split_of(folder))
        none = dict.fromkeys(("mask", "boxes", "classes", "crowd"))
        row = {"image": str(picture), **none, **things.get(picture, {})}
        splits.setdefault(split_among(folders), []).append(row)
    rows = sum(map(len, splits.values()))
    told = [f"{kind}: {sum(len(row['boxes']) for row in things.values())} boxes in {len(things)} pictures"]
    told += [f"{counted(rows - len(things), 'picture')} without such a file"] if rows > len(things) else []
    told += [f"{counted(len(pictures) - rows, 'picture')} in other folders left out"] if len(pictures) > rows else []
    told += ["names of folders are no labels"] if len(unread) > 1 else []
    return Annotations(splits, ", ".join(told))
