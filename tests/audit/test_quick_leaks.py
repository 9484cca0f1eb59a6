"""Planted leaks found in a second or two each, so that an arm that went blind is seen every day.

`tests/audit/test_leaks.py` asks all of them, and the same tasks without them, at the size of the published table.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clip_leaks import BeginsAnew, SeeksOneSide, alignment, brown, led_in, on_files, order, speed
from leaks import (
    BARE,
    LEAKS,
    Ask,
    BlackCorners,
    FromTheStart,
    NumberedTiles,
    ResampledTurns,
    Size,
    WrapsAround,
    by_edges,
    image_recipe,
    on_texts,
    pictures,
)

from mmssl.audit.nulls import CUE, Arm, planted
from mmssl.audit.shortcuts import Finding, small, unseen
from mmssl.audit.shortcuts import finding as finding_of
from mmssl.objectives.transformation.rotation import TURNS


def coarse_colors(seed: int) -> Finding:
    """Quarter turns, from whether colors change more across or down: a small network takes minutes to see that."""
    given = image_recipe("rotation", {"views": {"area": None, "flip": 0.0}}, 24)
    arm, rows = Arm(artifact="resaved 4:2:2"), 48
    inputs = next(unseen(given, small(given, seed), arm, rows, seed))
    colors = inputs["image"].float()[:, :, 0] - inputs["image"].float()[:, :, 1]
    across, down = (colors.diff(dim=dim).abs().mean((-2, -1)) for dim in (-1, -2))
    right = (across > down) == (torch.arange(TURNS) % 2 == 1)
    return finding_of(arm, right.float().mean().item(), 0.5, rows)


QUICK: dict[str, Ask] = {
    "aspect squash": pictures("rotation", planted("squash"), size=Size(32, 100, 16, 192)),
    "black corners": pictures("rotation", kind=BlackCorners, size=Size(32, 60, 16, 128)),
    "watermark": pictures(
        "rotation", planted("watermark"), size=Size(24, 30, 16, 96), views={"area": None, "flip": 0.0}
    ),
    "4:2:2": coarse_colors,
    "resampled rotation": pictures("rotation", kind=ResampledTurns, size=Size(24, 40, 16, 96)),
    "chromatic aberration": pictures("relative_position", planted("red-blue shift"), size=Size(48, 60, 16, 96), **BARE),
    "vignetting": pictures("jigsaw", planted("vignetting"), size=Size(48, 40, 16, 96), tile=10, gap=4),
    "tile edges, by hand": partial(by_edges, rows=16, tile=24, gap=0),
    "codec priming": partial(on_files, given=alignment(), kind=FromTheStart, suffix="avi", steps=100, rows=64),
    "clip wrap-around": partial(on_files, given=alignment(), write=brown, kind=WrapsAround, steps=40, rows=48),
    "position id left in": pictures(
        "jigsaw", Arm("constant"), kind=NumberedTiles, size=Size(48, 30, 16, 64), tile=10, gap=4
    ),
    "topic cue": partial(on_texts, arm=Arm("words", "jsonl", CUE), steps=40, rows=96),
    "frames that begin anew": partial(on_files, given=speed(), kind=BeginsAnew, steps=60, rows=96),
    "seek of one side of a pair": partial(
        on_files, given=alignment(), kind=SeeksOneSide, sought=True, steps=20, rows=32
    ),
    "black lead-in of a pair": partial(on_files, given=alignment(), write=led_in, steps=30, rows=40),
    "black lead-in of an order": partial(on_files, given=order(), write=led_in, steps=30, rows=48),
}


def test_every_leak_has_a_quick_one():
    assert list(QUICK) == [leak.words for leak in LEAKS]


HEARD = {"codec priming", "clip wrap-around", "seek of one side of a pair", "black lead-in of a pair"}
"""Of clips with sound, which take longer to write."""


@pytest.mark.parametrize(
    "words", [pytest.param(words, marks=pytest.mark.long if words in HEARD else ()) for words in QUICK]
)
def test_a_planted_leak_is_found_with_a_small_training(words: str):
    finding = QUICK[words](0)
    assert finding.verdict == "leaks", finding
