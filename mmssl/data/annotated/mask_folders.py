"""Folders of pictures and masks: `images/train/a.jpg` and `masks/train/a.png`, `val/img/b.png` and `val/gt/b.png`.

A folder may add a word to the name, `train_images` and `train_masks`, or have none, `train` and `train_masks`; a mask
as well: `masks/a_mask.png`, also next to the picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmssl.data.annotated.layout import IMAGES, Annotations, split_among, stored
from mmssl.data.base import Row
from mmssl.data.files import folders_below, split_of
from mmssl.errors import counted

MASKS = {"masks", "mask", "labels", "label", "annotations", "segmentation", "segmentations", "gt", "segmentationclass"}
MASKS |= {"segmentationclasspng", "gtfine", "groundtruth", "ground_truth"}
_WORDS = re.compile(r"[-_ ]|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_PICTURE = re.compile(r"[-_](image|img|sat|leftimg8bit)$", re.I)
_MASK = re.compile(r"[-_](masks?|seg|segmentation|labels?|gt|groundtruth|gtfine_label(train)?ids|l)$", re.I)
_BESIDE = re.compile(r"[-_]mask$", re.I)
_MORE = re.compile(r"[-_]mask[-_]?\d+$", re.I)  # of one picture, as in a_mask_1

Key = tuple[tuple[str, ...], str]


def read_mask_folders(root: Path, pictures: Sequence[Path]) -> Annotations | None:
    """Rows of pictures whose masks have the same path but for the extension and one folder; None where none has.

    Args:
        root: above all of them.
        pictures: files of pictures and masks.
    """
    images, masks = next(_pairings(root, pictures), ({}, {}))
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
        (len(pictures) - len(images) - len(masks), "file", "of other names or folders left out"),
    ):
        told += [f"{counted(number, one)} {what}"] if number else []
    return Annotations(splits, ", ".join(told))


def unpaired(root: Path, pictures: Sequence[Path]) -> list[str]:
    """A note where folders are named like those of pictures and masks, of which no two have one name."""
    named = {folder for _, folders in folders_below(root, pictures) for folder in folders}
    images, masks = (sorted(folder for folder in named if folder.lower() in names) for names in (IMAGES, MASKS))
    if not images or not masks:
        return []
    return [f"no file in {images[0]} has a mask of its name in {masks[0]}: what is there is read as pictures"]


def _pairings(root: Path, pictures: Sequence[Path]) -> Iterator[tuple[dict[Key, Path], dict[Key, Path]]]:
    """Pictures and masks by keys of which they share some, in the ways in which they may be laid out."""
    if masks := _by_place(root, pictures, MASKS):
        images, named = _by_place(root, pictures, IMAGES), set(masks.values())
        # Of pictures in no folder of a telling name, half the masks at least should be: train/a.jpg, train_masks/a.png.
        others = {(folders, file.stem): file for file, folders in folders_below(root, pictures) if file not in named}
        for files, least in ((images, 1), (others, (len(masks) + 1) // 2)):
            for one, two in ((files, masks), (_without(_PICTURE, files), _without(_MASK, masks))):
                if len(one.keys() & two.keys()) >= least:
                    yield one, two
    yield _in_one_folder(root, pictures)


def _by_place(root: Path, files: Sequence[Path], names: set[str]) -> dict[Key, Path]:
    """Folders without the first that has one of the names, and the file's name without extension -> file.

    The name may be the last word of the folder's, of which the split before it is kept: `train_masks`, `PNGImages`.
    """
    found = {}
    known: dict[tuple[str, ...], tuple[str, ...] | None] = {}
    for file, folders in folders_below(root, files):
        if folders not in known:
            known[folders] = _elsewhere(folders, names)
        if (place := known[folders]) is not None:
            found[place, file.stem] = file
    return found


def _elsewhere(folders: tuple[str, ...], names: set[str]) -> tuple[str, ...] | None:
    for depth, folder in enumerate(folders):
        *before, last = ["", folder] if folder.lower() in names else _WORDS.split(folder)
        if before and last.lower() in names:
            return (*folders[:depth], *(word for word in before if split_of(word)), *folders[depth + 1 :])
    return None


def _without(word: re.Pattern[str], files: dict[Key, Path]) -> dict[Key, Path]:
    """Those whose names end in the word, by the rest of it, the first of equal ones; all where none does."""
    found: dict[Key, Path] = {}
    for (folders, stem), file in files.items():
        if word.search(stem):
            found.setdefault((folders, word.sub("", stem)), file)
    return found or files


def _in_one_folder(root: Path, files: Sequence[Path]) -> tuple[dict[Key, Path], dict[Key, Path]]:
    """Pictures, and masks next to them, where each file that is named like a mask has its picture."""
    if not any(_BESIDE.search(file.stem) for file in files):
        return {}, {}
    placed = {(folders, file.stem): file for file, folders in folders_below(root, files)}
    masks = {(folders, _BESIDE.sub("", stem)): file for (folders, stem), file in placed.items() if _BESIDE.search(stem)}
    images = {}
    for (folders, stem), file in placed.items():
        if not _BESIDE.search(stem) and not _MORE.search(stem):
            short = folders, _PICTURE.sub("", stem)  # a_sat.jpg and a_mask.png
            images[short if short in masks and short not in placed else (folders, stem)] = file
    return (images, masks) if masks.keys() <= images.keys() else ({}, {})
