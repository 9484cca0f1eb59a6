"""Outlines and run lengths of COCO's annotation files as masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mmssl.errors import DataError

CROWD = 255


class Outlines(NamedTuple):
    """What stands in a picture, by its outline.

    Attributes:
        height: of the picture in pixels.
        width: likewise.
        things: class number and `segmentation` of each, as COCO writes it: a list of polygons, or run lengths, a list
            of numbers or a string; `CROWD` in place of the number where the class of each pixel is not known.
    """

    height: int
    width: int
    things: tuple[tuple[int, Any], ...]

    def draw(self) -> np.ndarray:
        """Class numbers, uint8 (height, width), 0 where there is nothing; smaller things are in front.

        Raises:
            DataError: for an outline that cannot be read, or where faster-coco-eval, which draws it, is missing.
        """
        try:
            from faster_coco_eval.core import mask as runs
        except ImportError as error:
            raise DataError("outlines of COCO are drawn by faster-coco-eval: pip install 'mmssl[detection]'") from error
        covered: list[tuple[int, np.ndarray]] = []
        for number, outline in self.things:
            try:
                covered.append((number, runs.decode(_runs(runs, outline, self.height, self.width)).astype(bool)))
            except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
                raise DataError(f"an outline cannot be read: {' '.join(str(error).split())}") from error
            if covered[-1][1].shape != (self.height, self.width):
                raise DataError(
                    f"an outline is of {covered[-1][1].shape[::-1]} pixels, its picture of {(self.width, self.height)}"
                )
        drawn = np.zeros((self.height, self.width), np.uint8)
        for number, inside in sorted(covered, key=lambda thing: -int(thing[1].sum())):
            drawn[inside] = number
        return drawn


def _runs(runs: Any, outline: Any, height: int, width: int) -> Any:
    """As the library's compressed run lengths."""
    if isinstance(outline, Mapping):
        compressed = isinstance(outline["counts"], str | bytes)
        return dict(outline) if compressed else runs.frPyObjects(dict(outline), height, width)
    if not isinstance(outline, list) or not all(isinstance(one, list) and len(one) >= 6 for one in outline):
        raise ValueError("expected a list of polygons of three points at least, or run lengths")
    return runs.merge(runs.frPyObjects(outline, height, width))
