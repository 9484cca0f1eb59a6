"""The measures of localization on the boxes of VGG-SS, whose trivial answers score what they were found to score."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mmssl.adaptation import heat_maps

BOXES = Path(os.environ.get("MMSSL_DATA", ".")) / "vggss.json"
HALF = heat_maps.SIDE**2 - heat_maps.SIDE**2 // 2 - 1  # pixels above the median
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not BOXES.is_file(),
        reason="$MMSSL_DATA/vggss.json is not there: metadata/vggss.json of Localizing-Visual-Sounds-the-Hard-Way",
    ),
]


@pytest.fixture(scope="module")
def truths():
    rows = json.loads(BOXES.read_text("utf-8"))
    assert len(rows) == 5158
    return [heat_maps.draw_boxes(np.array(row["bbox"], dtype=float)) for row in rows]


def scores(heat, truths):
    """cIoU at 0.5 and the area under the success curve of one map for all pictures, in percent."""
    found = heat_maps.highest(heat, HALF)
    return scored([heat_maps.consensus(found, truth) for truth in truths])


def scored(overlaps):
    return 100 * np.mean(np.array(overlaps) >= 0.5), 100 * heat_maps.area_under_success(overlaps)


def test_answers_that_look_at_nothing_score_what_they_do(truths):
    """As counted by other code from the same file; a disc of whole pixels may be one to the side."""
    assert scored([heat_maps.everywhere(truth).half for truth in truths]) == pytest.approx((21.95, 31.25), abs=0.02)
    assert scores(heat_maps.center_disc(), truths) == pytest.approx((34.02, 37.44), abs=0.1)
    prior = np.mean(truths[1::2], axis=0)
    assert scores(heat_maps.without_ties(prior), truths[::2]) == pytest.approx((36.25, 38.21), abs=0.05)


def test_no_map_is_right_about_more_than_half_of_them(truths):
    """A box of less than a quarter of the picture is out of reach of the published rule."""
    rows = json.loads(BOXES.read_text("utf-8"))
    best = [
        heat_maps.agreement(heat_maps.oracle(np.array(row["bbox"], dtype=float)), truth).half
        for row, truth in zip(rows[::20], truths[::20], strict=True)
    ]
    assert best == pytest.approx([min(truth.mean(), 0.5) / max(truth.mean(), 0.5) for truth in truths[::20]], abs=1e-3)
    assert 100 * np.mean([truth.mean() >= 0.25 for truth in truths]) == pytest.approx(50.54, abs=0.05)
