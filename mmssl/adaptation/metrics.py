"""How right answers are: as scikit-learn defines it, unless a metric says where else it is from."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Metric(NamedTuple):
    """A column of the table; more is better unless it is only shown.

    Attributes:
        name: key in a row of the table and in JSON.
        title: what people read.
        percent: whether it is a share in [0, 1] that is printed in percent.
    """

    name: str
    title: str
    percent: bool = True


ACCURACY = Metric("accuracy", "accuracy")
BALANCED_ACCURACY = Metric("balanced_accuracy", "balanced")
TOP5_ACCURACY = Metric("top5_accuracy", "top-5")
MEAN_AVERAGE_PRECISION = Metric("mean_average_precision", "mAP")
INTERPOLATED_PRECISION = Metric("interpolated_average_precision", "mAP, interpolated")
SUBSET_ACCURACY = Metric("subset_accuracy", "all labels right")
R2 = Metric("r2", "R^2", percent=False)
MEAN_ABSOLUTE_ERROR = Metric("mean_absolute_error", "mean |error|", percent=False)
MEAN_IOU = Metric("mean_iou", "mIoU")
PIXEL_ACCURACY = Metric("pixel_accuracy", "pixels")
BOUNDARY_IOU = Metric("boundary_iou", "boundary IoU")
AP = Metric("average_precision", "AP")
AP50 = Metric("average_precision_50", "AP50")
AP75 = Metric("average_precision_75", "AP75")
FRAME_PRECISION = Metric("frame_average_precision", "mAP of frames")
SEGMENT_F1 = Metric("segment_f1", "F1 of 1 s")
MACRO_F1 = Metric("macro_f1", "F1")


def balanced_accuracy(right: Tensor, labels: Tensor) -> float:
    """Recall of each class that `labels` (M,) has, averaged; `right` is bool (M,)."""
    _, classes, count = labels.unique(return_inverse=True, return_counts=True)
    return (torch.bincount(classes, weights=right.double()) / count).mean().item()


def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Average precision of each label that some row of `labels`, bool (M, C), has, averaged; 0 where none has any.

    NaN where a score of such a label is.
    """
    return _mean_over_labels(scores, labels, best=False)


def interpolated_average_precision(scores: Tensor, labels: Tensor) -> float:
    """As `mean_average_precision`, with the precision at a recall being the best at that recall or a higher one.

    That of PASCAL VOC since 2010, and of published VOC07 classification by SVMs; the challenge of 2007 itself averaged
    eleven points of the same curve.

    Args:
        scores: float (M, C).
        labels: bool (M, C).
    """
    return _mean_over_labels(scores, labels, best=True)


def _mean_over_labels(scores: Tensor, labels: Tensor, *, best: bool) -> float:
    found = [
        _average_precision(score, truth, best) for score, truth in zip(scores.T, labels.T, strict=True) if truth.any()
    ]
    return statistics.fmean(found) if found else 0.0


def _average_precision(scores: Tensor, labels: Tensor, best: bool) -> float:
    """Precision where a row that has the label (bool (M,)) is found, or the best from there on, averaged over these."""
    # Settings are chosen by it on few rows, of which scikit-learn, which checks what it is given, needs eight times
    # as long.
    if scores.isnan().any():
        return math.nan
    scores, order = scores.sort(descending=True)
    right = labels[order].double()
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    # Rows of one score are found together, so that they have the precision of the last of them.
    _, number = scores.unique_consecutive(return_inverse=True)
    last = torch.bincount(number).cumsum(0) - 1
    precision = precision[last]
    if best:
        precision = precision.flip(0).cummax(0).values.flip(0)
    return float((precision[number] * right).sum() / right.sum())


def subset_accuracy(found: Tensor, labels: Tensor) -> float:
    """Share of rows of which every label is right, both bool (M, C)."""
    return (found == labels).all(1).double().mean().item()


def r2(found: Tensor, values: Tensor) -> float:
    """Coefficient of determination of (M, K), averaged over the K; below 0 where the mean of `values` does better."""
    found, values = found.double(), values.double()
    residual = (found - values).square().sum(0)
    total = (values - values.mean(0)).square().sum(0)
    exact = (residual == 0).double()
    return torch.where(total > 0, 1 - residual / total, exact).mean().item()


def mean_absolute_error(found: Tensor, values: Tensor) -> float:
    """Of (M, K), in the unit of the values."""
    return (found.double() - values.double()).abs().mean().item()


def confusion(found: Tensor, truth: Tensor, ignored: int) -> Tensor:
    """Pixels of each true class (row) that were found to be of each class (column), int64 (K, K), K = `ignored` + 1.

    Args:
        found: class numbers, uint8 (M, H, W).
        truth: likewise; pixels that are `ignored` do not count.
        ignored: the largest class number.
    """
    counted = truth != ignored
    pairs = truth[counted].long() * (ignored + 1) + found[counted].long()
    return torch.bincount(pairs, minlength=(ignored + 1) ** 2).view(ignored + 1, ignored + 1)


def mean_over_union(intersection: Tensor, union: Tensor) -> float:
    """Intersection over union of each class that has a union, averaged; both int64 (K,). 0 where none has."""
    present = union > 0
    return (intersection[present].double() / union[present]).mean().item() if present.any() else 0.0


def boundary_overlap(found: Tensor, truth: Tensor, ignored: int, ratio: float = 0.02) -> Tensor:
    """Intersection and union of the boundaries of each class, int64 (2, K), for Boundary IoU (Cheng et al. 2021).

    The boundary of a class is what of it is closer than `ratio` diagonals, one pixel at least, to a pixel that is not
    of it or to the edge of the picture.

    Args:
        found: see `confusion`.
        truth: likewise; pixels that are `ignored` do not count.
        ignored: see `confusion`.
        ratio: see above; 0.02 is that of the paper.
    """
    distance = max(1, round(ratio * (truth.shape[1] ** 2 + truth.shape[2] ** 2) ** 0.5))
    counted = truth != ignored
    overlap = torch.zeros(2, ignored + 1, dtype=torch.int64)
    for number in torch.cat([found[counted], truth[counted]]).unique().tolist():
        a, b = (_boundary((maps == number) & counted, distance) for maps in (found, truth))
        overlap[:, number] = torch.stack([(a & b).sum(), (a | b).sum()])
    return overlap


def _boundary(inside: Tensor, distance: int) -> Tensor:
    """What of regions, bool (M, H, W), goes when they are eroded `distance` times by 3 x 3 pixels."""
    outside = F.pad((~inside).float(), (distance,) * 4, value=1.0)
    return inside & (F.max_pool2d(outside, 2 * distance + 1, stride=1) > 0)
