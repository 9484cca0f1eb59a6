"""What the readers of annotations return, and what they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmssl.data.base import Row
from mmssl.data.files import folders_below, media_layout, some_of, split_of, splits_alike
from mmssl.errors import counted

IMAGES = {"images", "image", "imgs", "img", "pictures", "photos", "jpegimages", "leftimg8bit"}
MEDIA = IMAGES | {"audio", "audios", "sounds", "wav", "wavs", "clips", "video", "videos"}
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
    """Picture, sound or clip -> the file of its name in its folder, or where `labels` stands in place of `images`.

    Args:
        root: above all of them.
        pictures: whose files are looked for; those that have none are left out.
        files: with what is written about pictures.
    """
    known = {_place(file, folders): file for file, folders in folders_below(root, files)}
    if not known:
        return {}
    placed = ((picture, _place(picture, folders)) for picture, folders in folders_below(root, pictures))
    return {picture: known[place] for picture, place in placed if place in known}


def _place(file: Path, folders: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    return tuple(folder for folder in folders if folder.lower() not in MEDIA | NOTES), file.stem


def without_masks(root: Path, pictures: Iterable[Path]) -> list[Path]:
    """Those that are not in a folder of masks, as COCO names them: `panoptic_train2017`, `stuffthingmaps`."""
    return [
        picture
        for picture, folders in folders_below(root, pictures)
        if not any(folder.lower().startswith(("panoptic", "stuffthingmaps")) for folder in folders)
    ]


def with_classes(root: Path, found: Annotations) -> Annotations:
    """With the column `label`, where folders of pictures are classes, several of them, as without annotations."""
    pictures = [Path(row["image"]) for rows in found.splits.values() for row in rows]
    classes = media_layout(root, pictures).classes
    names = sorted(set(classes.values()))
    if len(names) < 2 or len(classes) < len(pictures):
        return found
    splits: dict[str, list[Row]] = {
        split: [{**row, "label": classes[Path(row["image"])]} for row in rows] for split, rows in found.splits.items()
    }
    return Annotations(splits, f"{found.note}; folders are read as classes: {some_of(names)}")


def boxed_rows(root: Path, pictures: Sequence[Path], things: Mapping[Path, Row], kind: str) -> Annotations:
    """Rows of pictures in whose folder one at least has boxes; other pictures, such as masks, are counted.

    Args:
        root: above all of them.
        pictures: all.
        things: picture -> `boxes`, `classes`, `crowd` and perhaps `mask`, of those about which something is written.
        kind: of the annotations, for the note.
    """
    used = {picture.parent for picture in things}
    alike = splits_alike({folder for _, folders in folders_below(root, things) for folder in folders})
    splits: dict[str, list[Row]] = {}
    for picture, folders in folders_below(root, [picture for picture in pictures if picture.parent in used]):
        none = dict.fromkeys(("mask", "boxes", "classes", "crowd"))
        row = {"image": str(picture), **none, **things.get(picture, {})}
        split = next(filter(None, map(alike.get, folders)), None) or split_among(folders)
        splits.setdefault(split, []).append(row)
    rows = sum(map(len, splits.values()))
    boxes = sum(len(row["boxes"]) for row in things.values())
    told = [f"{kind}: {counted(boxes, 'box', 'boxes')} in {counted(len(things), 'picture')}"]
    told += [f"{counted(rows - len(things), 'picture')} without such a file"] if rows > len(things) else []
    told += [f"{counted(len(pictures) - rows, 'picture')} in other folders left out"] if len(pictures) > rows else []
    return Annotations(splits, ", ".join(told))
