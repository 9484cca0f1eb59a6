"""The class of every pixel: pictures of class numbers, of which 255 is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmssl.adaptation.metrics import (
    BOUNDARY_IOU,
    MEAN_IOU,
    PIXEL_ACCURACY,
    boundary_overlap,
    confusion,
    mean_over_union,
)
from mmssl.adaptation.placed import InPicture, Placed
from mmssl.errors import DataError
from mmssl.media.image import open_image
from mmssl.media.mask import IGNORED, decode_mask
from mmssl.media.outlines import Outlines

KEPT_BYTES = 2**28
"""Most bytes of decoded masks that are kept; others are decoded whenever they are asked for."""
NUMBERS = IGNORED + 1
ASKED = 8
"""Cells of bytes, of which one at least is a picture where they are masks."""
TOGETHER = 64  # rows that are looked at at a time


class Masks(InPicture):
    """Answers are class numbers, uint8 (M, H, W) in the square that the encoder sees, or (M, 1, 1): one for all pixels.

    Intersections and unions are summed over all pixels of all rows and then divided, as in PASCAL VOC; classes that
    neither the truth nor an answer has do not count, and pixels whose true class is 255 neither.

    Args:
        cells: of all rows.
        boundary: score Boundary IoU as well (Cheng et al. 2021).
    """

    def __init__(self, cells: Sequence[Placed], boundary: bool = False) -> None:
        super().__init__(cells)
        self.boundary = boundary
        self.metrics = (MEAN_IOU, PIXEL_ACCURACY, *([BOUNDARY_IOU] if boundary else []))
        self._kept: dict[int, Tensor] = {}
        self._room = KEPT_BYTES

    def scored(self, *, boundary: bool) -> Masks:
        """The same cells, with Boundary IoU or without."""
        return Masks(self.cells, boundary)

    @classmethod
    def recognizes(cls, cells: Sequence[Any]) -> bool:
        """Pictures: files, bytes, arrays of two dimensions, images of PIL or outlines."""
        some = [cell for cell in cells if isinstance(cell, bytes)][:ASKED]
        return bool(cells) and all(map(_may_be_picture, cells)) and (not some or any(map(_opens, some)))

    def masks(self, labels: Tensor) -> Tensor:
        """Class numbers of rows, uint8 (N, H, W).

        Raises:
            DataError: for a cell that holds none, or another number of pixels than others.
        """
        found = [self._mask(number) for number in labels.tolist()]
        if len({mask.shape for mask in found}) > 1:
            raise DataError("masks have different sizes, and rows of one batch have one")
        return torch.stack(found)

    def _mask(self, number: int) -> Tensor:
        if number in self._kept:
            return self._kept[number]
        cell = self.cells[number]
        try:
            mask = decode_mask(*cell.read())
        except DataError as error:
            raise DataError(f"{cell.where}: {error}") from error
        if mask.nbytes <= self._room:
            self._room -= mask.nbytes
            self._kept[number] = mask
        return mask

    def look(self, labels: Tensor, truth: Tensor) -> list[str]:
        """Masks that can be read, of two classes at least in the training rows."""
        classes = self.classes(labels)
        tested = self.classes(truth)
        if len(classes) < 2:
            only = f"class {int(classes[0])}" if len(classes) else "no class"
            raise DataError(
                f"{self.cells[int(labels[0])].where}: all pixels of the {len(labels)} training rows are of {only}; 255 "
                "says that a pixel has none, and the foreground of a mask of two classes is 1"
            )
        if not len(tested):
            raise DataError(
                f"{self.cells[int(truth[0])].where}: no pixel of the {len(truth)} test rows has a class; 255 says that "
                "a pixel has none"
            )
        new = tested[~torch.isin(tested, classes)].tolist()
        if not new:
            return []
        shown = ", ".join(map(str, new[:5])) + ", ..." * (len(new) > 5)
        return [f"pixels of test rows are of classes that no training row has; they count as wrong: {shown}"]

    def pixels(self, labels: Tensor) -> Tensor:
        """Number of pixels of each class number, int64 (256,); those of 255 do not count."""
        total = torch.zeros(NUMBERS, dtype=torch.int64)
        for masks in self._parts(labels):
            total += torch.bincount(masks.flatten().long(), minlength=NUMBERS)
        total[IGNORED] = 0
        return total

    def classes(self, labels: Tensor) -> Tensor:
        """Class numbers that rows have, int64 (C,), ascending."""
        return self.pixels(labels).nonzero().flatten()

    def _parts(self, labels: Tensor) -> Iterator[Tensor]:
        """Masks of all rows, some at a time."""
        return (self.masks(part) for part in labels.split(TOGETHER))

    def constant(self, labels: Tensor) -> Tensor:
        """The class of most pixels, everywhere."""
        return self.pixels(labels).argmax().to(torch.uint8).view(1, 1)

    def counts(self, labels: Tensor) -> dict[str, int]:
        """Number of classes."""
        return {"classes": len(self.classes(labels))}

    def score(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """Mean intersection over union, share of right pixels and, where asked for, Boundary IoU."""
        table = torch.zeros(NUMBERS, NUMBERS, dtype=torch.int64)
        overlap = torch.zeros(2, NUMBERS, dtype=torch.int64)
        for found, part in zip(answers.split(TOGETHER), labels.split(TOGETHER), strict=True):
            truth = self.masks(part)
            found = found.expand_as(truth)
            table += confusion(found, truth, IGNORED)
            if self.boundary:
                overlap += boundary_overlap(found, truth, IGNORED)
        union = table.sum(0) + table.sum(1) - table.diag()
        scores = {
            MEAN_IOU.name: mean_over_union(table.diag(), union),
            PIXEL_ACCURACY.name: table.diag().sum().item() / max(1, int(table.sum())),
        }
        return scores | ({BOUNDARY_IOU.name: mean_over_union(*overlap)} if self.boundary else {})


def _opens(cell: bytes) -> bool:
    try:
        open_image(cell)
    except DataError:
        return False
    return True


def _may_be_picture(cell: Any) -> bool:
    if isinstance(cell, Outlines):
        return True
    if isinstance(cell, Mapping):
        return {"bytes", "path"} <= cell.keys()
    return isinstance(cell, bytes | Image.Image) or (isinstance(cell, np.ndarray) and cell.ndim == 2)
