"""What the readers of annotations return, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmssl.data.base import Row
from mmssl.data.files import split_of

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
