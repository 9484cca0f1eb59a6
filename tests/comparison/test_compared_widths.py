"""The page of a comparison fits a telephone: nothing is wider than the screen but what can be moved on its own."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import BROWSER, MISSING, scroll_width
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import mmssl
from mmssl.comparison.page import _curves, _maps, depth_curves, write_page
from mmssl.comparison.plan import RAW, SUPERVISED, UNTRAINED, Plan

LONG = "a_task_of_a_rather_long_name_that_has_no_place_to_be_broken_at"
SCORES = {"rotation": 0.6, "masked_autoencoder": 0.5, LONG: 0.55, UNTRAINED: 0.4, RAW: 0.45, SUPERVISED: 0.8}
MEASURES = ("knn", "logistic, 10 a class", "logistic, 10 % of labels")
DEPTHS = ("act1", "layer1", "layer2", "layer3", "pooled")
CLASSES = 12
ROWS = 60


def made(folder: Path, label: str | None = "category") -> mmssl.Comparison:
    """What a comparison of pictures is to its page, with everything that it can show."""
    random = np.random.default_rng(0)
    (folder / "figures").mkdir(parents=True)
    Image.new("RGB", (1500, 300), "gray").save(folder / "figures" / "preview.png")
    cells: dict[str, list[dict[str, Any]]] = {}
    answers: dict[str, list[dict[str, np.ndarray]]] = {}
    for line, base in SCORES.items():
        for _ in range(1 if line == RAW else 2):
            depths = DEPTHS[-1:] if line == RAW else DEPTHS
            scores = {
                one: {depth: float(base + 0.02 * random.normal()) for depth in depths}
                for one in (MEASURES if label else ())
            }
            cell: dict[str, Any] = {
                "monitors": {"effective_rank": 100 * base, "lidar": 9.0, "spectrum_decay": 2 - base}
            }
            if label:
                cell |= {"scores": scores, "validation": scores, "constant": dict.fromkeys(MEASURES, 0.1)}
                cell |= {"rows": {key: [5000, ROWS] for key in MEASURES}, "test": "emoji, split test"}
                cell |= {"metric": {"percent": True}, "drawn": {MEASURES[2]: [512]}}
            if line not in (UNTRAINED, RAW):
                cell["cost"] = {"samples": 102400, "seconds": 90.0, "memory_gib": 1.5}
            if line not in (UNTRAINED, RAW, SUPERVISED):
                curve = [{"step": step, "loss": 2 / (1 + step), "accuracy": step / 40} for step in range(0, 40, 4)]
                cell |= {"lr": 1e-3, "verdict": [{"outcome": "learned"}], "chance": {"loss": 1.4, "accuracy": 0.25}}
                cell |= {"curve": curve, "run": str(folder)}
            truth = random.integers(0, CLASSES, ROWS).astype(np.int32)
            answer: dict[str, np.ndarray] = {"map": random.normal(size=(ROWS, 2)).astype(np.float32)}
            if label:
                said = {f"{one}|{depth}": truth for one in MEASURES for depth in depths}
                names = np.array([f"class number {number}" for number in range(CLASSES)])
                answer |= {**said, "truth": truth, "names": names, "map_class": truth}
            answer["neighbors"] = random.integers(0, 255, (6, 6, 48, 48, 3), dtype=np.uint8)
            answer["neighbors_same"] = random.integers(0, 2, (6, 5)).astype(bool)
            cells.setdefault(line, []).append(cell)
            answers.setdefault(line, []).append(answer)
    tasks = {line: {"training": {"steps": 400}} for line in SCORES if line not in (UNTRAINED, RAW, SUPERVISED)}
    text = f"audit of rotation\n{' '.join(f'column{number:3d}' for number in range(40))}"
    audits = {"rotation": {"verdict": "leaks", "sentence": "rotation can be answered from files", "text": text}}
    source = {"source": "/a/folder/of/a/rather/long/name/that/has/no/place/to/be/broken/at/rows.parquet"}
    plan = Plan(source, label, "image", tasks=tasks, shots=(10, "10%"), seeds=(0, 1))
    return mmssl.Comparison(plan, folder, cells, answers, audits)


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason=MISSING)
@pytest.mark.parametrize("label", ["category", None])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_of_a_comparison_does_not_scroll_sideways(tmp_path, width, label):
    page = write_page(made(tmp_path / "compared", label)).read_text(encoding="utf-8")
    assert scroll_width(page, width, tmp_path) == width


@pytest.mark.long
def test_tables_charts_and_audits_stand_in_what_can_be_moved(tmp_path):
    """What can be told without a browser."""
    page = write_page(made(tmp_path / "compared")).read_text(encoding="utf-8")
    assert 'name="viewport" content="width=device-width' in page
    for tag in ("<table", "<img", "<pre"):
        before = page.split(tag)[:-1]
        assert before
        assert all(re.search(r'<div class="wide"[^>]*>$', part) for part in before), tag
    assert (
        "left: 0; background: #fff; white-space: normal; min-width: min(12rem, 30vw)" in page
    )  # numbers are seen, too
    assert '<span class="option">--budget</span>' in page  # and not broken after its first hyphen


@pytest.mark.long
@pytest.mark.parametrize("draw", [_maps, _curves])
def test_titles_of_charts_do_not_run_into_each_other(tmp_path, draw):
    found = made(tmp_path / "compared")
    figure = draw(found, found.ranked)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [axes.title.get_window_extent(renderer) for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.long
def test_the_legend_of_depths_is_below_the_curves(tmp_path):
    figure = depth_curves(made(tmp_path / "compared"))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    assert figure.legends[0].get_window_extent(renderer).y1 <= figure.axes[0].get_window_extent(renderer).y0
