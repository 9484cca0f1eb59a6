"""Folders of pictures with annotations beside them: masks of the same name, json of COCO, xml of VOC, txt of YOLO.

Their rows have the columns `image` and, as far as the annotations say it, `mask`, `boxes` ([left, top, right, bottom]
in pixels), `classes` (names, one a box), `crowd` (bools: which boxes are of groups or of difficult things, which it is
neither right nor wrong to find), `text` (captions) and `label` (the folder, where those are classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.data.annotated.captions import read_captions
from mmssl.data.annotated.coco import read_coco
from mmssl.data.annotated.layout import Annotations, with_classes
from mmssl.data.annotated.mask_folders import read_mask_folders
from mmssl.data.annotated.voc import read_voc, read_xml
from mmssl.data.annotated.yolo import read_yolo
from mmssl.data.base import MapSource, Row
from mmssl.data.files import KINDS


class AnnotatedSource(MapSource):
    """Rows that are in memory, but for their pictures.

    Args:
        rows: column -> cell; all have the same columns.
        name: as in the recipe, for messages.
        columns: names of those that are seen; all where left out.
    """

    def __init__(self, rows: Sequence[Row], name: str, columns: Sequence[str] | None = None) -> None:
        self.rows, self.name = rows, name
        self.columns = tuple(rows[0] if columns is None else columns)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        """See `MapSource`."""
        return {column: self.rows[index][column] for column in self.columns}

    def present(self, columns: Sequence[str]) -> np.ndarray:
        """See `MapSource`."""
        return np.flatnonzero([all(row[column] is not None for column in columns) for row in self.rows])

    def __getstate__(self) -> dict[str, Any]:
        """For workers, which are sent the columns that they read and not all outlines of a data set."""
        return self.__dict__ | {"rows": [self.row(i) for i in range(len(self))]}

    def select(self, columns: Sequence[str]) -> AnnotatedSource:
        """See `MapSource`."""
        some = AnnotatedSource(self.rows, self.name, columns)
        some.notes, some.splits, some.files = self.notes, self.splits, self.files
        return some


def find_annotations(root: Path, files: Sequence[Path]) -> Annotations | None:
    """What the annotations in a folder say, or None where there are none.

    Args:
        root: the folder.
        files: all that are below it, sorted.

    Raises:
        DataError: for annotations that cannot be read.
    """
    pictures = [file for file in files if KINDS.get(file.suffix.lower()) == "image"]
    if not pictures:
        return None
    found = read_voc(root, files)
    for read in (read_coco, read_xml, read_yolo):
        found = found or read(root, files, pictures)
    found = read_captions(root, files, pictures, found or read_mask_folders(root, pictures))
    return None if found is None else with_classes(root, found)
