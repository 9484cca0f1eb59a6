"""Charts of a comparison's page, as they are drawn."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import mmssl
from mmssl.comparison.page import apart, label_free_charts
from mmssl.comparison.plan import Plan

NAMES = [f"{word}_of_the_{number}th_view" for number, word in enumerate(["rotation", "masked_autoencoder"] * 10)]


def comparison(scores: list[float]) -> mmssl.Comparison:
    """A task for each score, by one seed."""
    cells = {}
    for name, score in zip(NAMES, scores, strict=False):
        told = {"knn": {"pooled": score}}
        monitors = {"effective_rank": 10 * score, "lidar": 3 - score, "spectrum_decay": 0.5 + score}
        cells[name] = [{"scores": told, "validation": told, "metric": {"percent": True}, "monitors": monitors}]
    tasks: dict[str, dict] = {name: {} for name in cells}
    plan = Plan({"source": "toy"}, "shape", "image", tasks=tasks, probe="knn", shots=(), seeds=(0,))
    return mmssl.Comparison(plan, Path("here"), cells, {name: [{}] for name in cells}, {})


@pytest.mark.parametrize(
    "scores", [[0.5] * 20, [0.3 + i / 1000 for i in range(20)], [0.2, 0.9], [0.9] * 18 + [0.1] * 2]
)
def test_names_of_many_tasks_are_next_to_each_other(scores: list[float]) -> None:
    figure = label_free_charts(comparison(random.Random(0).sample(scores, len(scores))))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    names = [text for text in figure.axes[-1].findobj(Text) if text.get_text() in {n.replace("_", " ") for n in NAMES}]
    assert len(names) == len(scores)
    boxes = sorted((name.get_window_extent(renderer) for name in names), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
    assert boxes[0].y0 >= 0
    assert boxes[-1].y1 <= figure.bbox.height
    assert max(box.x1 for box in boxes) <= figure.bbox.width


def test_places_that_are_apart_stay_and_others_make_room() -> None:
    assert apart([1.0, 3.0], 1.0, 0.0, 4.0) == [1.0, 3.0]
    assert apart([2.0, 2.0, 2.0], 1.0, 0.0, 4.0) == [1.0, 2.0, 3.0]
    assert apart([2.0, 2.0, 2.0], 1.0, 0.0, 2.5) == [0.5, 1.5, 2.5]
    assert apart([-1.0, 0.5], 1.0, 0.0, 4.0) == [0.0, 1.0]
