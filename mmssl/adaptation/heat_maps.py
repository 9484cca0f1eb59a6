"""How well a map of where a sound comes from agrees with the boxes of what makes it.

Two rules say which part of a map is the answer. "Top 50 %" is that of the published code (Chen et al. 2021, "Localizing
Visual Sounds the Hard Way", arXiv 2104.02691): the half of all pixels with the highest values, strictly above the
median. A box of less than a quarter of the picture can then not be found by any map. "Equal area" takes as many pixels
as the truth has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import auc
from torch import Tensor

SIDE = 224
"""Pixels of a side on which maps and boxes are compared, as published."""
HALF = 0.5
THRESHOLDS = np.linspace(0, 1, 21)


class Agreement(NamedTuple):
    """Of one map and its truth.

    Attributes:
        equal: cIoU of as many of the highest pixels as the truth has.
        half: cIoU of the published top 50 % of the pixels.
        hit: whether the highest pixel is in the truth.
    """

    equal: float
    half: float
    hit: float


def draw_boxes(boxes: np.ndarray, side: int = SIDE) -> np.ndarray:
    """What boxes (K, 4), left, top, right, bottom as shares of the picture, cover together; bool (side, side).

    Edges are rounded down to whole pixels, as published; a box covers at least one.
    """
    covered = np.zeros((side, side), dtype=bool)
    for left, top, right, bottom in (boxes.clip(0, 1) * side).astype(int):
        left, top = min(left, side - 1), min(top, side - 1)
        covered[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return covered


def resized(heat: Tensor, side: int = SIDE) -> np.ndarray:
    """A map (h, w) at (side, side), bilinear."""
    shown = F.interpolate(heat[None, None].double(), (side, side), mode="bilinear", align_corners=False)
    return shown[0, 0].numpy()


def covered_shares(truth: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Which share of each place of a coarser grid (h, w) is true: the map of one who knows and sees no finer."""
    return F.adaptive_avg_pool2d(torch.from_numpy(truth.astype(float))[None, None], grid)[0, 0]


def highest(heat: np.ndarray, count: int) -> np.ndarray:
    """The `count` highest pixels; fewer where others are as high as the next: a tie decides nothing."""
    if count >= heat.size:
        return np.ones(heat.shape, dtype=bool)
    limit: np.ndarray = heat > np.partition(heat.ravel(), heat.size - count - 1)[heat.size - count - 1]
    return limit


def consensus(found: np.ndarray, truth: np.ndarray) -> float:
    """cIoU: what was found and is true, over what is true or was found; of one set of boxes the IoU."""
    return float((found & truth).sum() / max(1, (found | truth).sum()))


def agreement(heat: np.ndarray, truth: np.ndarray) -> Agreement:
    """Of a map and what is true, both (side, side)."""
    below_median = heat.size - heat.size // 2 - 1  # pixels strictly above the published threshold, without ties
    return Agreement(
        consensus(highest(heat, int(truth.sum())), truth),
        consensus(highest(heat, below_median), truth),
        float(truth.ravel()[heat.argmax()]),
    )


def everywhere(truth: np.ndarray) -> Agreement:
    """Of the whole picture as the answer, and of a pixel at random."""
    share = float(truth.mean())
    return Agreement(share, share, share)


def area_under_success(overlaps: Sequence[float] | np.ndarray) -> float:
    """Area under the share of rows with at least that overlap, over 0, 0.05 ... 1; at 0 it is 1."""
    success = (np.asarray(overlaps)[:, None] >= THRESHOLDS - 1e-9).mean(0)
    return float(auc(THRESHOLDS, success))


def without_ties(heat: np.ndarray) -> np.ndarray:
    """The same order, of equal pixels the one further down and to the right the lower."""
    order = np.arange(heat.size).reshape(heat.shape)
    return heat - 1e-9 * order / heat.size


def center_disc(side: int = SIDE) -> np.ndarray:
    """The higher the closer to the center."""
    offset = np.arange(side) + 0.5 - side / 2
    return without_ties(-np.hypot(offset[:, None], offset) / side)


def oracle(boxes: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The best map there is: 0 in what boxes cover, the lower the farther from it elsewhere."""
    covered = draw_boxes(boxes, side)
    middles = (np.arange(side) + 0.5) / side
    left, top, right, bottom = boxes.T[:, :, None]
    across = np.maximum(np.maximum(left - middles, middles - right), 0)
    down = np.maximum(np.maximum(top - middles, middles - bottom), 0)
    distance = np.hypot(down[:, :, None], across[:, None, :]).min(0)
    return without_ties(np.where(covered, 0.0, -1e-6 - distance))
