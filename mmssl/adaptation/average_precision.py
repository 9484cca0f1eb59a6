"""Average precision of boxes as COCO defines it, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmssl.errors import RecipeError


def need_evaluation() -> Any:
    """The module that computes it; raises RecipeError where it is not installed."""
    try:
        import faster_coco_eval
    except ImportError as error:
        raise RecipeError("detection is scored by faster-coco-eval: pip install 'mmssl[detection]'") from error
    return faster_coco_eval


def coco_average_precision(
    found: Sequence[np.ndarray], truth: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: int
) -> tuple[float, float, float]:
    """AP averaged over overlaps from 0.5 to 0.95, and AP at 0.5 and at 0.75; 0 where there is no box to find.

    Args:
        found: left, top, right, bottom, score and class number of the boxes of each picture, (K, 6).
        truth: for each picture corners (N, 4), class numbers (N,), and bool (N,), True for those that do not count.
        classes: number of classes.
    """
    coco = need_evaluation()
    annotations: list[dict[str, Any]] = []
    for picture, (corners, numbers, crowd) in enumerate(truth):
        for box, number, crowded in zip(corners.tolist(), numbers.tolist(), crowd.tolist(), strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "iscrowd": int(crowded), **_annotation(picture, box, number)}
            )
    tree = {
        "images": [{"id": picture} for picture in range(len(truth))],
        "categories": [{"id": number, "name": str(number)} for number in range(classes)],
        "annotations": annotations,
    }
    results = [
        {"score": score, **_annotation(picture, box, int(number))}
        for picture, rows in enumerate(found)
        for *box, score, number in rows.tolist()
    ]
    if not any(not thing["iscrowd"] for thing in annotations) or not results:
        return 0.0, 0.0, 0.0
    reference = coco.COCO(tree)
    evaluation = coco.COCOeval_faster(reference, reference.loadRes(results), "bbox", print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    ap, ap50, ap75 = (max(0.0, float(value)) for value in evaluation.stats[:3])
    return ap, ap50, ap75


def _annotation(picture: int, box: Sequence[float], number: int) -> dict[str, Any]:
    left, top, right, bottom = box
    extents = [left, top, right - left, bottom - top]
    return {"image_id": picture, "category_id": number, "bbox": extents, "area": extents[2] * extents[3]}


def _silent(*words: object) -> None:
    """What the library would print is returned."""
