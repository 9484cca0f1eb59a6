"""Texts of pictures, sounds and clips: COCO's captions, and files of the same name, `a.jpg` and `a.txt`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmssl.data.annotated.coco import load_json, pictures_by_name, split_of_file
from mmssl.data.annotated.layout import UNLABELED, Annotations, beside, shown, without_masks
from mmssl.data.base import Row
from mmssl.errors import DataError, counted


def read_captions(
    root: Path, files: Sequence[Path], pictures: Sequence[Path], found: Annotations | None
) -> Annotations | None:
    """Rows of pictures with the list of their captions as `text`, of `annotations/captions_train2017.json`.

    Pictures that no file lists are `unlabeled`. What else was found has a column more.

    Args:
        root: above all of them.
        files: all files.
        pictures: those that are pictures.
        found: by the other annotations of the folder; returned as it is where there are no captions.

    Raises:
        DataError: for a file that is damaged, or lists no picture that is there.
    """
    named = [file for file in files if file.suffix.lower() == ".json" and file.stem.lower().startswith("captions")]
    if not named:
        return found
    by_name = pictures_by_name(pictures)
    splits: dict[str, dict[str, list[str]]] = {}
    missing = 0
    for file in named:
        split, where = split_of_file(root, file), shown(root, file)
        tree = load_json(root, file)
        ours = isinstance(tree, dict) and {"images", "annotations"} <= tree.keys()
        if not ours and file.parent.name.lower() != "annotations":
            continue  # of some other form, as of Flickr
        try:
            names = {image["id"]: str(image["file_name"]) for image in tree["images"]}
            told = [(names[one["image_id"]], str(one["caption"]).strip()) for one in tree["annotations"]]
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{where}: no captions as COCO writes them: {reason}") from error
        there = {name: by_name(name, split) for name in dict.fromkeys(name for name, _ in told)}
        missing += sum(picture is None for picture in there.values())
        for name, text in told:
            if there[name] is not None:
                splits.setdefault(split, {}).setdefault(str(there[name]), []).append(text)
    if not splits and not missing:
        return found
    if not splits:
        raise DataError(f"{root}: none of the {missing} pictures that the captions of COCO are of is there")
    texts = {picture: own for split in splits.values() for picture, own in split.items()}
    note = f"captions of COCO: {sum(map(len, texts.values()))} of {counted(len(texts), 'picture')}"
    note += f"; {counted(missing, 'picture')} with captions not there" if missing else ""
    if found is not None:
        more: dict[str, list[Row]] = {
            split: [{**row, "text": texts.get(str(row["image"]))} for row in rows]
            for split, rows in found.splits.items()
        }
        return Annotations(more, f"{found.note}; {note}")
    rows: dict[str, list[Row]] = {
        split: [{"image": picture, "text": text} for picture, text in own.items()] for split, own in splits.items()
    }
    if spare := [str(picture) for picture in without_masks(root, pictures) if str(picture) not in texts]:
        rows[UNLABELED] = [{"image": picture, "text": None} for picture in spare]
    return Annotations(rows, note)


def texts_beside(root: Path, media: Sequence[Path], files: Sequence[Path]) -> dict[Path, Path]:
    """Picture, sound or clip -> the .txt file of its name; empty where less than half of them have one."""
    found = beside(root, media, [file for file in files if file.suffix.lower() == ".txt"])
    return found if 2 * len(found) >= len(media) else {}


def read_text(root: Path, file: Path) -> str | None:
    """What a file says, without blanks around it; None where that is nothing.

    Raises:
        DataError: for a file that cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{shown(root, file)}: cannot be read as UTF-8, as which it should be saved: {error}"
        ) from error
