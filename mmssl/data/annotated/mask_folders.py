"""Folders of pictures and masks: `images/train/a.jpg` and `masks/train/a.png`, `val/img/b.png` and `val/gt/b.png`.

A mask may add a word to the name: `masks/a_mask.png`, also next to the picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mmssl.data.annotated.layout import IMAGES, Annotations, split_among, stored
from mmssl.data.base import Row
from mmssl.data.files import folders_below
from mmssl.errors import counted

MASKS = {"masks", "mask", "labels", "label", "annotations", "segmentation", "segmentations", "gt", "segmentationclass"}
MASKS |= {"gtfine", "groundtruth", "ground_truth"}
_PICTURE = re.compile(r"[-_](image|img|sat|leftimg8bit)$", re.I)
_MASK = re.compile(r"[-_](masks?|seg|segmentation|labels?|gt|groundtruth|gtfine_labelids)$", re.I)
_BESIDE = re.compile(r"[-_]mask$", re.I)

Key = tuple[tuple[str, ...], str]


def read_mask_folders(root: Path, pictures: Sequence[Path]) -> Annotations | None:
    """Rows of pictures whose masks have the same path but for the extension and one folder; None where none has.

    Args:
        root: above all of them.
        pictures: files of pictures and masks.
    """
    images, masks = (_by_place(root, pictures, names) for names in (IMAGES, MASKS))
    if not images.keys() & masks.keys():  # names that differ by a word
        images, masks = _without(_PICTURE, images), _without(_MASK, masks)
    if not images.keys() & masks.keys():
        images, masks = _in_one_folder(root, pictures)
    paired = images.keys() & masks.keys()
    if not paired:
        return None
    splits: dict[str, list[Row]] = {}
    for (folders, stem), file in images.items():
        mask = masks.get((folders, stem))
        row = {"image": str(file), "mask": None if mask is None else stored(mask)}
        splits.setdefault(split_among(folders), []).append(row)
    told = [f"pictures and masks of the same name: {counted(len(paired), 'pair')}"]
    for number, one, what in (
        (len(images) - len(paired), "picture", "without mask"),
        (len(masks) - len(paired), "mask", "without picture"),
        (len(pictures) - len(images) - len(masks), "file", "in other folders left out"),
    ):
        told += [f"{counted(number, one)} {what}"] if number else []
    return Annotations(splits, ", ".join(told))


def _by_place(root: Path, files: Sequence[Path], names: set[str]) -> dict[Key, Path]:
    """Folders without the first that has one of the names, and the file's name without extension -> file."""
    found = {}
    for file, folders in folders_below(root, files):
        depth = next((i for i, folder in enumerate(folders) if folder.lower() in names), None)
        if depth is not None:
            found[(*folders[:depth], *folders[depth + 1 :]), file.stem] = file
    return found


def _without(word: re.Pattern[str], files: dict[Key, Path]) -> dict[Key, Path]:
    """Those whose names end in the word, by the rest of it; all as they are where none does."""
    return {
        (folders, word.sub("", stem)): file for (folders, stem), file in files.items() if word.search(stem)
    } or files


def _in_one_folder(root: Path, files: Sequence[Path]) -> tuple[dict[Key, Path], dict[Key, Path]]:
    """Pictures, and masks next to them, where each file that is named like a mask has its picture."""
    placed = {(folders, file.stem): file for file, folders in folders_below(root, files)}
    masks = {(folders, _BESIDE.sub("", stem)): file for (folders, stem), file in placed.items() if _BESIDE.search(stem)}
    if not masks.keys() <= placed.keys():
        return {}, {}
    return {key: file for key, file in placed.items() if not _BESIDE.search(key[1])}, masks
