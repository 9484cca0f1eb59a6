"""YOLO's files: `labels/train/a.txt` with a thing a line, for `images/train/a.jpg`, and their names in `data.yaml`.

Darknet's are next to the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mmssl.data.annotated.layout import Annotations, beside, boxed_rows, shown
from mmssl.data.base import Row
from mmssl.errors import DataError
from mmssl.media.image import shown_size
from mmssl.media.outlines import Outlines

SLACK = 0.01  # by which rounding may take a share out of the picture


def read_yolo(root: Path, files: Sequence[Path], pictures: Sequence[Path]) -> Annotations | None:
    """Rows of pictures, see `boxed_rows`; None where less than half of the lines are such, as of captions.

    A line is a class number and the box's center, width and height as shares of the picture, or the corners of an
    outline, or a box with keypoints, which are passed over, where `data.yaml` has `kpt_shape`; an empty file says that
    there is nothing. Where a file tells the names of classes, numbers that are no shares are mistakes, elsewhere they
    are something else. Class numbers of masks are one more, 0 where there is nothing.

    Args:
        root: above all of them.
        files: all files.
        pictures: those that are pictures.

    Raises:
        DataError: for a line that is neither, a class that has no name, or a picture whose size cannot be read.
    """
    written = beside(root, pictures, [file for file in files if file.suffix.lower() == ".txt"])
    lines = {picture: _lines(root, file) for picture, file in written.items()}
    some = [line for own in lines.values() for line in own if line.strip()]
    numbers = [found for line in some if (found := _numbers(line)) is not None]
    if not some or 2 * len(numbers) < len(some):
        return None
    settings = _settings(root, files)
    names, keypoints = _names(root, files, settings), "kpt_shape" in settings
    if names is None and 2 * sum(_are_shares(found) for found in numbers) < len(numbers):
        return None  # landmarks in pixels, features
    things = {
        picture: _things(shown(root, written[picture]), picture, own, names, keypoints)
        for picture, own in lines.items()
    }
    return boxed_rows(root, pictures, things, "txt of YOLO")


def _lines(root: Path, file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{shown(root, file)}: cannot be read: {error}") from error


def _numbers(line: str) -> list[float] | None:
    """Of a line, at least five; None for any other."""
    try:
        found = [float(word) for word in line.split()]
    except ValueError:
        return None
    return found if len(found) >= 5 and all(map(math.isfinite, found)) else None


def _are_shares(numbers: list[float]) -> bool:
    return numbers[0] == int(numbers[0]) and min(numbers) >= -SLACK and max(numbers[1:]) <= 1 + SLACK


def _settings(root: Path, files: Sequence[Path]) -> dict[str, Any]:
    """What `data.yaml`, or a file of another name that has `names`, says."""
    for file in files:
        if file.suffix.lower() in (".yaml", ".yml") and file.parent == root:
            try:
                tree = yaml.safe_load(file.read_bytes())
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise DataError(f"{file.name}: cannot be read: {' '.join(str(error).split())}") from error
            if isinstance(tree, dict) and isinstance(tree.get("names"), list | dict):
                return tree
    return {}


def _names(root: Path, files: Sequence[Path], settings: dict[str, Any]) -> dict[int, str] | None:
    """Class number -> name, of the first file that tells them; None where none does."""
    named = settings.get("names")
    if isinstance(named, list):
        return {number: str(name) for number, name in enumerate(named)}
    if isinstance(named, dict) and all(isinstance(number, int) for number in named):
        return {number: str(name) for number, name in named.items()}
    for file in files:
        if file.name in ("classes.txt", "obj.names", "_darknet.labels"):
            return {number: line.strip() for number, line in enumerate(_lines(root, file)) if line.strip()}
    return None


def _things(where: str, picture: Path, lines: Sequence[str], names: dict[int, str] | None, keypoints: bool) -> Row:
    """Boxes in pixels, classes, and a mask where every thing has an outline."""
    if not any(line.strip() for line in lines):
        return {"boxes": [], "classes": [], "crowd": []}
    try:
        with Image.open(picture) as image:
            width, height = shown_size(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: the size of its picture {picture.name} cannot be read: {error}") from error
    boxes, classes, outlines = [], [], []
    for row, line in enumerate(lines, 1):
        if not line.strip():
            continue
        number, shares = _thing(f"{where}, line {row}: '{line.strip()[:60]}'", line, keypoints)
        if names is not None and number not in names:
            raise DataError(f"{where}, line {row}: class {number} has no name; there are {len(names)}")
        if len(shares) == 4:
            x, y, wide, high = shares
            corners = [x - wide / 2, y - high / 2, x + wide / 2, y + high / 2]
        else:
            corners = [min(shares[::2]), min(shares[1::2]), max(shares[::2]), max(shares[1::2])]
            outlines.append((number + 1, [_pixels(shares, width, height)]))
        boxes.append(_pixels(corners, width, height))
        classes.append(str(number) if names is None else names[number])
    told: dict[str, Any] = {"boxes": boxes, "classes": classes, "crowd": [False] * len(boxes)}
    return told | ({"mask": Outlines(height, width, tuple(outlines))} if len(outlines) == len(boxes) else {})


def _thing(where: str, line: str, keypoints: bool) -> tuple[int, list[float]]:
    """Class number and shares of the picture: center and size of a box, or x and y of three corners at least."""
    found = _numbers(line)
    if found is not None and keypoints:
        found = found[:5]
    if found is None or found[0] != int(found[0]) or len(found) % 2 == 0:
        raise DataError(
            f"{where} should be a class number with center, width and height of a box, or with an outline; keypoints "
            "are passed over where data.yaml has names and kpt_shape"
        )
    if not _are_shares(found):
        raise DataError(f"{where} should be a class number and shares of the picture, from 0 to 1")
    return int(found[0]), found[1:]


def _pixels(shares: Sequence[float], width: int, height: int) -> list[float]:
    """Of x, y, x, y ..."""
    return [share * (height if place % 2 else width) for place, share in enumerate(shares)]
