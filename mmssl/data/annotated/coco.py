"""COCO's annotation files: `annotations/instances_train2017.json`, one in the folder of each split, or any other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmssl.data.annotated.layout import UNLABELED, Annotations, shown, without_masks
from mmssl.data.base import Row
from mmssl.data.files import split_in, split_of
from mmssl.errors import DataError, counted
from mmssl.media.outlines import CROWD, Outlines

OTHERS = 64  # json files of other names that are looked into
HEAD = 65536  # bytes of each
LISTS = ("images", "annotations", "categories")
OTHER_KINDS = ("captions", "person_keypoints", "panoptic", "image_info", "stuff")


def read_coco(root: Path, files: Sequence[Path], pictures: Sequence[Path]) -> Annotations | None:
    """Rows of all pictures, of which those that no annotation file lists are `unlabeled`; None where there is no file.

    Class numbers of masks are 1 for the category with the lowest number and so on, 0 where there is nothing, and 255
    where a crowd is.

    Args:
        root: above all of them.
        files: all files.
        pictures: those that are pictures.

    Raises:
        DataError: for a file that is damaged, or lists no picture that is there.
    """
    written = [file for file in files if file.suffix.lower() == ".json"]
    tables = [file for file in written if _may_be_coco(file)] or _of_other_names(written, pictures)
    splits: dict[str, list[Row]] = {}
    named: list[str] = []
    names: list[str] | None = None
    boxes = missing = 0
    astray = ""
    by_name = pictures_by_name(pictures)
    for file in tables:
        tree = load_json(root, file)
        if not isinstance(tree, dict) or not all(isinstance(tree.get(key), list) for key in LISTS):
            continue
        where, split = shown(root, file), split_of_file(root, file)
        table = _Table(tree, where)
        if names is not None and names != table.names:
            raise DataError(f"{where} has other categories than {named[0]}; one network learns those of one list")
        names = table.names
        rows = table.rows(by_name, split)
        boxes, missing = boxes + sum(len(row["classes"]) for row in rows), missing + len(tree["images"]) - len(rows)
        if not rows and tree["images"]:
            astray = f"'{tree['images'][0].get('file_name')}' in {where}"
        if rows:
            splits.setdefault(split, []).extend(rows)
            named.append(where)
    if names is None or (not splits and not missing):
        return None
    if not splits:
        raise DataError(
            f"{root}: none of the {missing} pictures that the json files of COCO list is there; file_name should be "
            f"the end of a path below this folder, unlike {astray}, or the file be moved out of it"
        )
    listed = {row["image"] for rows in splits.values() for row in rows}
    note = f"COCO: {boxes} boxes of {len(names)} categories in {sum(map(len, splits.values()))} pictures"
    left = f"; {counted(missing, 'listed picture')} not there" if missing else ""
    spare = [str(picture) for picture in without_masks(root, pictures) if str(picture) not in listed]
    if spare:
        splits[UNLABELED] = [
            {"image": picture, **dict.fromkeys(("mask", "boxes", "classes", "crowd"))} for picture in spare
        ]
    return Annotations(splits, f"{note}, from {', '.join(named)}{left}")


def _may_be_coco(file: Path) -> bool:
    """By its name alone: a folder may hold a json file a picture."""
    stem = file.stem.lower()
    likely = file.parent.name.lower() in ("annotations", "annotation") or "coco" in stem
    return (likely or stem.startswith("instances")) and not stem.startswith(OTHER_KINDS)


def _of_other_names(written: Sequence[Path], pictures: Sequence[Path]) -> list[Path]:
    """Those that begin like COCO's, such as the `result.json` of a tool, where there are few."""
    stems = {picture.stem for picture in pictures}
    others = [file for file in written if file.stem not in stems and not file.stem.lower().startswith(OTHER_KINDS)]
    return [file for file in others if _begins_like_coco(file)] if len(others) <= OTHERS else []


def _begins_like_coco(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD)
    except OSError:
        return False
    return any(key in head for key in (b'"images"', b'"annotations"', b'"categories"'))


def split_of_file(root: Path, file: Path) -> str:
    """The split that a file's name or its folders tell, or `train`."""
    folders = file.relative_to(root).parts[:-1]
    return split_in(file.stem) or next(filter(None, map(split_of, reversed(folders))), "train")


def load_json(root: Path, file: Path) -> Any:
    """What a file holds.

    Raises:
        DataError: for one that is damaged.
    """
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{shown(root, file)}: cannot be read: {' '.join(str(error).split())}") from error


def pictures_by_name(pictures: Sequence[Path]) -> Callable[[str, str], Path | None]:
    """Of the name that a file lists, and its split: the picture, or None; that of the split's folder comes first."""
    known: dict[str, list[Path]] = {}
    for picture in pictures:
        known.setdefault(picture.name, []).append(picture)

    def by_name(name: str, split: str) -> Path | None:
        wanted = Path(name.replace("\\", "/")).parts  # written on Windows
        found = [file for file in known.get(wanted[-1] if wanted else "", []) if file.parts[-len(wanted) :] == wanted]
        own = [file for file in found if split in map(split_of, file.parts)]
        return next(iter(own or found), None)

    return by_name


class _Table:
    """One file.

    Args:
        tree: what it holds.
        where: its name, for errors.
    """

    def __init__(self, tree: dict[str, Any], where: str) -> None:
        self.where = where
        try:
            self.images = {image["id"]: image for image in tree["images"]}
            categories = sorted(tree["categories"], key=lambda category: category["id"])
            self.names = [str(category["name"]) for category in categories]
            numbers = {category["id"]: number for number, category in enumerate(categories)}
            self.things: dict[Any, list[tuple[int, list[float], Any, bool]]] = {key: [] for key in self.images}
            for thing in tree["annotations"]:
                what = f"{where}: annotation {thing.get('id')}"
                if thing["image_id"] not in self.images:
                    raise DataError(f"{what} is of image {thing['image_id']}, which the file does not list")
                if thing["category_id"] not in numbers:
                    raise DataError(f"{what} is of category {thing['category_id']}, which the file does not list")
                box = [float(value) for value in thing["bbox"]]
                if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
                    raise DataError(f"{what}: bbox {thing['bbox']} should be left, top, width and height in pixels")
                corners = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
                crowd = bool(thing.get("iscrowd", 0))
                outline = thing.get("segmentation") or None
                self.things[thing["image_id"]].append((numbers[thing["category_id"]], corners, outline, crowd))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{where}: no annotations as COCO writes them: {reason}") from error

    def rows(self, by_name: Callable[[str, str], Path | None], split: str) -> list[Row]:
        """Of the listed pictures that are there.

        Args:
            by_name: see `pictures_by_name`.
            split: of the file.
        """
        rows: list[Row] = []
        for key, image in self.images.items():
            found = by_name(str(image.get("file_name", "")), split)
            if found is None:
                continue
            things = self.things[key]
            rows.append(
                {
                    "image": str(found),
                    "mask": self._mask(image, things),
                    "boxes": [corners for _, corners, _, _ in things],
                    "classes": [self.names[number] for number, _, _, _ in things],
                    "crowd": [crowd for _, _, _, crowd in things],
                }
            )
        return rows

    def _mask(self, image: dict[str, Any], things: list[tuple[int, list[float], Any, bool]]) -> Outlines | None:
        """None where a thing has no outline, or there are too many categories for a mask."""
        if any(outline is None for _, _, outline, _ in things) or len(self.names) >= CROWD:
            return None
        if not {"height", "width"} <= image.keys():
            return None
        drawn = tuple((CROWD if crowd else number + 1, outline) for number, _, outline, crowd in things)
        return Outlines(int(image["height"]), int(image["width"]), drawn)
