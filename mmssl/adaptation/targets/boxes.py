"""Boxes with a class, any number a picture: lists of [left, top, right, bottom], or `{"bbox", "category"}` of COCO."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmssl.adaptation.average_precision import coco_average_precision
from mmssl.adaptation.metrics import AP, AP50, AP75
from mmssl.adaptation.placed import InPicture, Placed
from mmssl.errors import DataError
from mmssl.media.mask import Frame

Form = Literal["corners", "extents"]

SEEN = 0.25
"""Share of a box that has to be in the square: of what a crop cuts off there is too little left to be found."""
ONLY = "box"
"""The class of all boxes where none is named."""


class PictureBoxes(NamedTuple):
    """Those of a picture.

    Attributes:
        corners: left, top, right, bottom in pixels of the square that the encoder sees, float64 (N, 4).
        classes: names or whole numbers, N of them.
        crowd: which it is neither right nor wrong to find, bool (N,).
        left_out: how many others have no area, are outside of the picture, and are cut away with what the square leaves
            out.
        as_shares: whether there are boxes, and all of them, left out or not, are within the picture's first pixel.
    """

    corners: np.ndarray
    classes: list[Any]
    crowd: np.ndarray
    left_out: tuple[int, int, int]
    as_shares: bool


class Boxes(InPicture):
    """Answers are float32 (M, K, 6): left, top, right, bottom, score, class number of K boxes, -1 where there is none.

    Scores are COCO's: precision averaged over recall, classes and, for AP, over overlaps from 0.5 to 0.95, of the 100
    best boxes a picture.

    Args:
        cells: of all rows.
        classes: column of the class of each box, and of `crowd` those that do not count.
        form: what four numbers are; `corners`, and of a cell with the key `bbox` `extents` (left, top, width and
            height, as COCO writes it), where left out.
    """

    metrics = (AP, AP50, AP75)

    def __init__(self, cells: Sequence[Placed], classes: str = "classes", form: Form | None = None) -> None:
        super().__init__(cells)
        self.column, self.form = classes, form
        self._read: dict[int, PictureBoxes] = {}

    @classmethod
    def recognizes(cls, cells: Sequence[Any]) -> bool:
        """Lists of four numbers each, any number of them, or mappings with `bbox`, one a row or one a box."""
        boxes = [box for cell in cells if isinstance(cell, list) for box in cell]
        lists = all(isinstance(cell, list) for cell in cells) and bool(boxes)
        fours = all(isinstance(box, list) and len(box) == 4 and not isinstance(box[0], str) for box in boxes)
        if lists and all(isinstance(box, Mapping) and "bbox" in box for box in boxes):
            return True
        return (lists and fours) or (
            bool(cells) and all(isinstance(cell, Mapping) and "bbox" in cell for cell in cells)
        )

    def asked(self, *, classes: str, form: Form | None) -> Boxes:
        """The same cells, with other arguments."""
        return Boxes(self.cells, classes, form)

    def boxes(self, labels: Tensor) -> list[PictureBoxes]:
        """Of rows, int64 (N,).

        Raises:
            DataError: for a cell that holds none.
        """
        for number in labels.tolist():
            if number not in self._read:
                cell = self.cells[number]
                (found, classes, crowd), frame = cell.read_with(self.column, "crowd")
                try:
                    self._read[number] = self._placed(found, classes, crowd, frame)
                except DataError as error:
                    raise DataError(f"{cell.where}: {error}") from error
        return [self._read[number] for number in labels.tolist()]

    def _placed(self, cell: Any, classes: Any, crowd: Any, frame: Frame | None) -> PictureBoxes:
        if frame is None:
            raise DataError("batches hold no boxes; give a source or a datasets.Dataset")
        form: Form = self.form or "corners"
        cell, classes, crowd = map(_listed, (cell, classes, crowd))
        if isinstance(cell, list) and cell and all(isinstance(one, Mapping) for one in cell):  # a mapping a box
            cell = {key: [one.get(key) for one in cell] for key in dict.fromkeys(key for one in cell for key in one)}
        if isinstance(cell, Mapping):
            if "bbox" not in cell:
                raise DataError(f"boxes should be under the key bbox, and the keys are {', '.join(map(str, cell))}")
            form = self.form or "extents"
            names = [cell[key] for key in ("category", "categories", "class", "label", "labels") if key in cell]
            cell, classes, crowd = cell["bbox"], names[0] if names else None, cell.get("iscrowd", crowd)
        try:
            corners = np.array(cell, dtype=np.float64).reshape(len(cell), 4)
        except (TypeError, ValueError) as error:
            raise DataError("boxes should be lists of four numbers each, in pixels") from error
        classes = [ONLY] * len(corners) if classes is None else classes
        if isinstance(classes, list | tuple):  # numbers next to an empty cell become floats
            classes = [int(name) if isinstance(name, float) and name.is_integer() else name for name in classes]
        if not isinstance(classes, list) or {type(name) for name in classes} - {str, int}:
            raise DataError(
                f"classes should be a list of names or whole numbers, one for each box, and are {_shown(classes)}"
            )
        crowd = np.array([False] * len(corners) if crowd is None else crowd, dtype=bool).reshape(-1)
        for count, what in ((len(classes), "classes"), (len(crowd), "marks of a crowd")):
            if count != len(corners):
                raise DataError(f"there are {len(corners)} boxes and {count} {what}")
        if form == "extents":
            corners[:, 2:] += corners[:, :2]
        wrong = ~np.isfinite(corners).all(1) | (corners[:, 2:] < corners[:, :2]).any(1)
        if wrong.any():
            way = "left, top, width and height are form: extents" if form == "corners" else "form: corners reads others"
            raise DataError(
                f"box {np.asarray(cell)[wrong][0].tolist()} should be {_FORMS[form]} in pixels, not ending before it "
                f"begins; {way}"
            )
        placed = frame.place(corners)
        cut = placed.clip(0, frame.size)
        seen = _areas(cut) > SEEN * _areas(placed)
        flat = _areas(corners) == 0
        outside = ~flat & (_areas(corners.clip(0, [frame.width, frame.height] * 2)) == 0)
        left_out = (int(flat.sum()), int(outside.sum()), int((~seen & ~flat & ~outside).sum()))
        as_shares = bool(len(corners)) and bool((abs(corners) <= 1).all())
        names = [name for name, kept in zip(classes, seen, strict=True) if kept]
        return PictureBoxes(cut[seen], names, crowd[seen], left_out, as_shares)

    def look(self, labels: Tensor, truth: Tensor) -> list[str]:
        """PictureBoxes that can be read, and some to learn from; the classes are those of all of these rows."""
        found, tested = self.boxes(labels), self.boxes(truth)
        names = {name for boxes in [*found, *tested] for name in boxes.classes}
        if {type(name) for name in names} == {int, str}:
            raise DataError("classes of boxes are names in some rows and numbers in others")
        drawn = [boxes for boxes in [*found, *tested] if boxes.classes or any(boxes.left_out)]
        if drawn and all(boxes.as_shares for boxes in drawn):
            raise DataError(
                f"{self.cells[int(labels[0])].where}: all boxes are within one pixel; they should be in pixels of the "
                "stored picture, so multiply shares by its width and height"
            )
        if not any((~boxes.crowd).any() for boxes in found):
            raise DataError(f"{self.cells[int(labels[0])].where}: none of the {len(labels)} training rows has a box")
        self.names, self.width = tuple(sorted(names)), len(names)
        told = _told_of(found, tested)
        if self.names == (ONLY,):
            told.append(
                f"there is no column '{self.column}', so that all boxes are of one class; the option classes names one"
            )
        return told

    def numbers(self, boxes: PictureBoxes) -> list[int]:
        """Class numbers of the boxes of a picture."""
        return [self.names.index(name) for name in boxes.classes]

    def padded(self, labels: Tensor) -> Tensor:
        """PictureBoxes of rows to learn from, float32 (N, K, 5): corners and class number, -1 where there is none."""
        found = self.boxes(labels)
        most = max(1, max(len(boxes.classes) for boxes in found))
        table = torch.full((len(found), most, 5), -1.0)
        for row, boxes in zip(table, found, strict=True):
            kept = ~boxes.crowd
            numbers = torch.tensor(self.numbers(boxes), dtype=torch.float32)
            row[: kept.sum(), :4] = torch.from_numpy(boxes.corners[kept]).float()
            row[: kept.sum(), 4] = numbers[torch.from_numpy(kept)]
        return table

    def constant(self, labels: Tensor) -> Tensor:
        """Of each class its median box, with its share of all boxes as the score; float32 (classes, 6)."""
        table = self.padded(labels).flatten(0, 1)
        table = table[table[:, 4] >= 0]
        found = [table[table[:, 4] == number] for number in table[:, 4].unique()]
        rows = [
            torch.cat([own[:, :4].median(0).values, own.new_tensor([len(own) / len(table)]), own[0, 4:]])
            for own in found
        ]
        return torch.stack(rows)

    def counts(self, labels: Tensor) -> dict[str, int]:
        """Numbers of boxes and of their classes."""
        found = self.boxes(labels)
        names = {name for boxes in found for name in boxes.classes}
        return {"boxes": sum(len(boxes.classes) for boxes in found), "classes": len(names)}

    def score(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """AP, AP50 and AP75."""
        truth = [(boxes.corners, np.array(self.numbers(boxes), int), boxes.crowd) for boxes in self.boxes(labels)]
        found = [row[row[:, 5] >= 0].double().numpy() for row in answers]
        return dict(zip((AP.name, AP50.name, AP75.name), coco_average_precision(found, truth, self.width), strict=True))


_FORMS = {"corners": "left, top, right, bottom", "extents": "left, top, width, height"}


def _areas(corners: np.ndarray) -> np.ndarray:
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


def _listed(cell: Any) -> Any:
    """What is written there, as a csv holds it, or the cell as it is."""
    if isinstance(cell, str) and cell.strip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell


def _told_of(found: Sequence[PictureBoxes], tested: Sequence[PictureBoxes]) -> list[str]:
    """Which boxes do not count, and which classes only the test rows have."""
    every = [*found, *tested]
    left_out = np.array([boxes.left_out for boxes in every]).sum(0)
    total = int(left_out.sum()) + sum(len(boxes.classes) for boxes in every)
    whys = ("have no area", "are outside of their pictures", "are cut away with what the square leaves out")
    parts = [f"{number} {why}" for number, why in zip(left_out.tolist(), whys, strict=True) if number]
    told = [f"{left_out.sum()} of {total} boxes do not count: {', '.join(parts)}"] if parts else []
    new = {name for boxes in tested for name in boxes.classes} - {name for boxes in found for name in boxes.classes}
    if new:
        told.append(f"boxes of test rows are of classes that no training row has; they count as missed: {_shown(new)}")
    return told


def _shown(names: Any) -> str:
    """The first of them, for a sentence."""
    if not isinstance(names, list | tuple | set):
        return repr(names)
    some = [repr(name) for name in (sorted(names) if isinstance(names, set) else names)[:5]]
    return ", ".join(some) + ", ..." * (len(names) > 5)
