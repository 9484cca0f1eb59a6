"""PASCAL VOC: `JPEGImages/`, boxes in `Annotations/*.xml`, masks in `SegmentationClass/`, splits in `ImageSets/`.

Its xml files are also written next to pictures, by labelImg, or into folders of other names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mmssl.data.annotated.layout import UNLABELED, Annotations, beside, boxed_rows, shown, stored
from mmssl.data.base import Row
from mmssl.data.files import KINDS, SPLITS
from mmssl.errors import DataError

TRIED = 10  # xml files that are opened to see whether they are VOC's
IMAGES, BOXES, MASKS, SETS = "JPEGImages", "Annotations", "SegmentationClass", "ImageSets"


def read_voc(root: Path, files: Sequence[Path]) -> Annotations | None:
    """Rows of all pictures; None where there is no such folder. Those that no list names are `unlabeled`.

    Args:
        root: above all of them.
        files: all files.

    Raises:
        DataError: for an xml file that is damaged or says no boxes.
    """
    by_folder: dict[Path, dict[str, dict[str, Path]]] = {}
    for file in files:
        kind = ".xml" if file.suffix == ".xml" else KINDS.get(file.suffix.lower())
        if file.parent.name in (IMAGES, BOXES, MASKS) and kind == (".xml" if file.parent.name == BOXES else "image"):
            kinds = by_folder.setdefault(file.parent.parent, {})
            kinds.setdefault(file.parent.name, {})[file.stem] = file
    places = {
        base: kinds for base, kinds in by_folder.items() if IMAGES in kinds and (BOXES in kinds or MASKS in kinds)
    }
    if not places:
        return None
    splits: dict[str, list[Row]] = {}
    boxed = masked = bare = 0
    for base, kinds in places.items():
        listed = _splits(base)
        for stem, picture in kinds[IMAGES].items():
            boxes, mask = kinds.get(BOXES, {}).get(stem), kinds.get(MASKS, {}).get(stem)
            split = listed.get(stem, UNLABELED) if listed else "train"
            boxed, masked = boxed + (boxes is not None), masked + (mask is not None)
            bare += boxes is mask is None
            row: dict[str, Any] = {"image": str(picture), "mask": None if mask is None else stored(mask)}
            row |= dict.fromkeys(("boxes", "classes", "crowd")) if boxes is None else _objects(root, boxes)
            splits.setdefault(split, []).append(row)
    return Annotations(splits, f"PASCAL VOC: {boxed} pictures with boxes, {masked} with masks, {bare} without either")


def read_xml(root: Path, files: Sequence[Path], pictures: Sequence[Path]) -> Annotations | None:
    """Rows of pictures with VOC's xml files in any layout, see `boxed_rows`; None where there are none.

    Args:
        root: above all of them.
        files: all files.
        pictures: those that are pictures.

    Raises:
        DataError: for an xml file that is damaged or says no boxes.
    """
    written = beside(root, pictures, [file for file in files if file.suffix.lower() == ".xml"])
    if not any(_is_voc(file) for file in list(written.values())[:TRIED]):
        return None
    return boxed_rows(
        root, pictures, {picture: _objects(root, file) for picture, file in written.items()}, "xml of VOC"
    )


def _is_voc(file: Path) -> bool:
    try:
        return ElementTree.parse(file).getroot().tag == "annotation"
    except (ElementTree.ParseError, OSError):
        return False


def _splits(base: Path) -> dict[str, str]:
    """Name of a picture -> split, as far as lists say it; `trainval` stands for train where there is no `train`."""
    found: dict[str, str] = {}
    for name, split in {"trainval": "train", **SPLITS}.items():
        for file in sorted((base / SETS).glob(f"*/{name}.txt")):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            found |= {line.split()[0]: split for line in lines if line.strip()}
    return found


def _objects(root: Path, file: Path) -> dict[str, list[Any]]:
    """Boxes, classes and which are difficult; VOC counts pixels from 1, and the last one belongs to the box."""
    boxes, classes, difficult = [], [], []
    try:
        for thing in ElementTree.parse(file).getroot().iter("object"):
            corners = [float(thing.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            name = thing.findtext("name")
            if not all(map(math.isfinite, corners)) or corners[2] < corners[0] or corners[3] < corners[1]:
                raise ValueError(f"xmin, ymin, xmax and ymax are {corners}")
            if not name:
                raise ValueError("an object has no name")
            boxes.append([corners[0] - 1, corners[1] - 1, corners[2], corners[3]])
            classes.append(name.strip())
            difficult.append(thing.findtext("difficult", "0").strip() == "1")
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{shown(root, file)}: no boxes can be read: {error}") from error
    return {"boxes": boxes, "classes": classes, "crowd": difficult}
