"""Figures draw every kind of cell, and curves beside the level of guessing."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.encoders.base import Scale
from mmssl.objectives.base import Chance, Panel
from mmssl.report import figures
from mmssl.report.figures import draw_history, draw_panels

PICTURE = torch.zeros(3, 16, 16)
RED = PICTURE + torch.tensor([1.0, 0.0, 0.0])[:, None, None]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def share(path, color) -> float:
    return float((np.abs(pixels(path).astype(int) - color).max(-1) < 8).mean())


@pytest.mark.quick(5)
@pytest.mark.parametrize(
    "cell",
    [
        torch.rand(3, 16, 16),
        torch.rand(9, 3, 16, 24),
        torch.rand(2, 3, 16, 16),
        torch.rand(8, 8),
        torch.rand(64, 100),
        torch.rand(16_000) - 0.5,
        torch.zeros(100),
        torch.rand(3, 16, 16, dtype=torch.float64, requires_grad=True),
        torch.rand(3, 16, 16, dtype=torch.bfloat16),
        "a line of text that is long enough to be broken into several lines, " * 5,
        "costs $5 or $6, 50 % off, _x_ and \\frac{1}{2",
        "",
    ],
    ids=lambda cell: str(tuple(cell.shape)) if isinstance(cell, torch.Tensor) else cell[:20],
)
def test_every_kind_of_cell_is_drawn(tmp_path, cell):
    path = draw_panels([Panel("input", [cell, cell]), Panel("target", ["x", "y"])], tmp_path / "new" / "panels.png")
    assert pixels(path).shape[0] > 50


def test_pictures_keep_their_colors_and_are_not_stretched(tmp_path):
    path = draw_panels([Panel("input", [RED] * 3)], tmp_path / "red.png")
    red = (np.abs(pixels(path).astype(int) - (255, 0, 0)).max(-1) < 8).nonzero()
    columns, rows = np.ptp(red[1]) + 1, len(np.unique(red[0])) / 3
    assert columns == pytest.approx(rows, rel=0.03)
    assert len(red[0]) == pytest.approx(3 * columns * rows, rel=0.03)


def test_rows_are_samples_and_as_many_as_asked(tmp_path):
    heights = [
        pixels(draw_panels([Panel("a", [RED] * 5), Panel("b", [RED] * 5)], tmp_path / "p.png", rows=rows)).shape[0]
        for rows in (1, 2, 5, 50)
    ]
    assert heights[0] < heights[1] < heights[2] == heights[3]
    assert share(tmp_path / "p.png", (255, 0, 0)) > 0.5


def test_a_shorter_column_leaves_its_cells_empty(tmp_path):
    full = share(draw_panels([Panel("a", [RED] * 2), Panel("b", [RED] * 2)], tmp_path / "f.png"), (255, 0, 0))
    half = share(draw_panels([Panel("a", [RED] * 2), Panel("b", [RED])], tmp_path / "h.png"), (255, 0, 0))
    assert half == pytest.approx(full * 3 / 4, rel=0.05)


def test_frames_of_a_strip_are_in_order_and_evenly_spread(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, values, **_: drawn.append(values))
    clip = torch.arange(21.0)[:, None, None, None].expand(21, 3, 4, 4) / 20
    draw_panels([Panel("video", [clip])], tmp_path / "strip.png")
    (strip,) = drawn
    shown = [strip[0, i * strip.shape[1] // figures.FRAMES, 0] for i in range(figures.FRAMES)]
    assert shown == [round(255 * k / (figures.FRAMES - 1)) for k in range(figures.FRAMES)]


def test_low_bands_of_a_spectrogram_are_at_the_bottom(tmp_path):
    bands = torch.zeros(8, 24)
    bands[0] = 1
    path = draw_panels([Panel("sound", [bands], scale=Scale(0.24, tuple(range(100, 900, 100))))], tmp_path / "s.png")
    picture = pixels(path)
    bright = (picture.astype(int).sum(-1) > 600) & (picture.astype(int).sum(-1) < 760)
    assert bright.nonzero()[0].mean() > picture.shape[0] * 0.6


SOUND = Scale(0.64, tuple(100.0 * 1.08**i for i in range(64)))


def drawn(panels, path, monkeypatch) -> list:
    """The axes of the figure, line by line."""
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure))
    draw_panels(panels, path)
    return kept[0].axes


def test_a_square_spectrogram_is_no_map_and_has_units(tmp_path, monkeypatch):
    """64 bands and 64 frames were once drawn upside down."""
    bands = torch.zeros(64, 64)
    first, second, wave = drawn(
        [
            Panel("input", [bands], scale=SOUND),
            Panel("target", [bands + 5], scale=SOUND),
            Panel("wave", [torch.zeros(99)], scale=Scale(2.0)),
        ],
        tmp_path / "s.png",
        monkeypatch,
    )
    assert first.images[0].origin == second.images[0].origin == "lower"
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 5)
    assert [label.get_text() for label in first.get_yticklabels()] == ["159 Hz", "1.2 kHz", "8 kHz"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["0", "0.32", "0.64 s"]
    assert [label.get_text() for label in wave.get_xticklabels()] == ["0", "1", "2 s"]
    assert not second.get_yticklabels()  # those of the column to the left


def test_right_and_wrong_answers_differ_in_form_and_not_in_color_alone(tmp_path, monkeypatch):
    axes = drawn([Panel("nearest", [RED, RED], [True, False])], tmp_path / "n.png", monkeypatch)
    assert [one.texts[0].get_text() for one in axes] == ["✓", "✗"]
    assert [one.patches[0].get_linestyle() for one in axes] == ["-", (0, (4, 3))]
    axes = drawn([Panel("prediction", ["a cat", "a dog"], [False, True])], tmp_path / "n.png", monkeypatch)
    assert [one.texts[0].get_text() for one in axes] == ["✗ a cat", "✓ a dog"]


def curves(monkeypatch) -> dict[str, list]:
    """What `draw_history` gives to matplotlib: title -> [(label, x, y)], and levels."""
    seen: dict[str, list] = {}
    plot, line = figures._curve, figures._chance_line

    def watched_plot(axes, history, name, *rest):
        seen.setdefault("curves", []).append(name)
        plot(axes, history, name, *rest)

    def watched_line(axes, level, *rest):
        seen.setdefault("levels", []).append(level)
        line(axes, level, *rest)

    monkeypatch.setattr(figures, "_curve", watched_plot)
    monkeypatch.setattr(figures, "_chance_line", watched_line)
    return seen


def test_history_shows_loss_and_metrics_beside_chance(tmp_path, monkeypatch):
    seen = curves(monkeypatch)
    history = [{"step": i, "loss": 2.0 / i, "accuracy": 0.5, "lr": 0.1, "data_wait": 0.3} for i in range(1, 30)]
    history[5] |= {"probe/accuracy": 0.4, "probe/accuracy_constant": 0.2}
    path = draw_history(history, Chance(math.log(4), {"accuracy": 0.25, "turn/loss": 1.0}), tmp_path / "h.png")
    assert path.exists()
    assert seen["curves"] == ["loss", "accuracy", "probe/accuracy", "lr"]
    assert seen["levels"] == [math.log(4), 0.25, 0.2]


@pytest.mark.long
def test_history_shows_what_is_monitored(tmp_path, monkeypatch):
    seen = curves(monkeypatch)
    records = {
        f"monitor/{name}/{kind}": 0.5
        for name in ("image", "turn/embeddings")
        for kind in ("rank", "spread", "dead", "alignment", "uniformity")
    }
    draw_history([{"step": i, "loss": 1.0} | records for i in range(3)], Chance(None), tmp_path / "h.png")
    assert sorted(name for name in seen["curves"] if name.startswith("monitor/")) == sorted(records)


def test_long_numbers_at_charts_have_room(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure))
    history = [{"step": i, "loss": 654321.5 - i, "accuracy": 0.5, "lr": 1.25e-4, "monitor/a/rank": 9.0} for i in (1, 9)]
    draw_history(history, Chance(1.0, {"accuracy": 0.25}), tmp_path / "h.png")
    (figure,) = kept
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert len(boxes) == 4
    for number, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:number])


@pytest.mark.quick(1)
@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 1.0, "lr": 0.1}], [{"step": 1, "loss": -3.0, "lr": 0.0}]])
def test_a_short_history_is_drawn_too(tmp_path, history):
    assert draw_history(history, Chance(1.0), tmp_path / "h.png").exists()
