"""Folders of pictures and masks: `images/train/a.jpg` and `masks/train/a.png`, `val/img/b.png` and `val/gt/b.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmssl.data.annotated.layout import Annotations, split_among, stored
from mmssl.data.base import Row
from mmssl.data.files import folders_below

IMAGES = {"images", "image", "imgs", "img", "pictures", "photos", "jpegimages"}
MASKS = {"masks", "mask", "labels", "label", "annotations", "segmentation", "segmentations", "gt", "segmentationclass"}

Key = tuple[tuple[str, ...], str]


def read_mask_folders(root: Path, pictures: Sequence[Path]) -> Annotations | None:
    """Rows of pictures whose masks have the same path but for the extension and one folder; None where none has.

    Args:
        root: above all of them.
        pictures: files of pictures and masks.
    """
    images, masks = (_by_place(root, pictures, names) for names in (IMAGES, MASKS))
    paired = images.keys() & masks.keys()
    if not paired:
        return None
    splits: dict[str, list[Row]] = {}
    for (folders, stem), file in images.items():
        mask = masks.get((folders, stem))
        row = {"image": str(file), "mask": None if mask is None else stored(mask)}
        splits.setdefault(split_among(folders), []).append(row)
    note = f"pictures and masks of the same name: {len(paired)} pairs"
    spare = {
        "pictures without mask": len(images) - len(paired),
        "masks without picture": len(masks) - len(paired),
        "files in other folders left out": len(pictures) - len(images) - len(masks),
    }
    return Annotations(splits, ", ".join([note, *(f"{number} {what}" for what, number in spare.items() if number)]))


def _by_place(root: Path, files: Sequence[Path], names: set[str]) -> dict[Key, Path]:
    """Folders without the first that has one of the names, and the file's name without extension -> file."""
    found = {}
    for file, folders in folders_below(root, files):
        depth = next((i for i, folder in enumerate(folders) if folder.lower() in names), None)
        if depth is not None:
            found[(*folders[:depth], *folders[depth + 1 :]), file.stem] = file
    return found
