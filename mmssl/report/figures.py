"""Pictures of what a task feeds the network, and curves of how the run went."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from mmssl.atomic import replacing
from mmssl.encoders.base import Scale
from mmssl.errors import RecipeError
from mmssl.objectives.base import Chance, Panel
from mmssl.ops.conflicts import COSINE, SHARE
from mmssl.training.monitors import MONITOR

INK, FAINT, LINE, ACCENT, GOOD = "#1f2430", "#8a8f98", "#2f6fb4", "#c8553d", "#2e7d4f"
FRAMES = 6  # of a clip that fit next to each other and are still seen
ROW_HEIGHT = 1.25  # inches
DPI = 140
TICKS = 0.55, 0.3  # inches that the names of bands and of seconds want
CHARTS_WIDE = 7.2
MARGINS = 0.7, 0.1, 0.5, 0.3
"""Inches on the left of each chart, for seven digits, and right, below and above it."""
MONITORS = {
    "effective rank": ("rank",),
    "spread (solid), dead share (dotted)": ("spread", "dead"),
    "alignment (solid), uniformity (dotted)": ("alignment", "uniformity"),
}
"""Title of a chart -> what `mmssl.training.monitors` measures that it shows."""
CONSTANT = "_constant"
"""Ends the name of what the constant answer scores in a probe's first metric."""
STYLE = {
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}


def draw_panels(panels: Sequence[Panel], path: Path | str, *, title: str = "", rows: int = 8) -> Path:
    """Draw what a task sees: one line a sample, one column a panel.

    Spectrograms have their lowest band at the bottom, and those of one sample one range of colors. Of a clip, up to six
    frames are shown, evenly spread and in order. Right answers have a check mark and a solid frame, wrong ones a cross
    and a dashed one.

    Args:
        panels: of `Objective.preview`.
        path: PNG to write; its folder is made if missing.
        title: of the whole picture.
        rows: samples to draw at most.

    Returns:
        `path`.
    """
    rows = min(rows, max(len(panel.cells) for panel in panels))
    banded = [panel.scale.bands if panel.scale else () for panel in panels]
    named = [bool(own) and own != left for own, left in zip(banded, [(), *banded], strict=False)]
    widths = [_width(panel) + TICKS[0] * names for panel, names in zip(panels, named, strict=True)]
    textual = all(isinstance(cell, str) or cell.ndim == 1 for panel in panels for cell in panel.cells)
    height = ROW_HEIGHT * (0.6 if textual else 1.0)
    top, bottom = 0.65 if title else 0.35, TICKS[1] if any(panel.scale for panel in panels) else 0.02
    tall = top + rows * height + bottom
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(sum(widths) + 0.2, tall))
        grid = figure.add_gridspec(
            rows,
            len(panels),
            width_ratios=widths,
            left=0.1 / (sum(widths) + 0.2),
            right=1 - 0.1 / (sum(widths) + 0.2),
            top=1 - top / tall,
            bottom=bottom / tall,
            hspace=0.07,
            wspace=0.05,
        )
        if title:
            figure.text(0.5, 1 - 0.08 / tall, title, ha="center", va="top", fontsize=10, color=FAINT)
        for row in range(rows):
            colors = _colors([panel.cells[row] for panel in panels if panel.scale and row < len(panel.cells)])
            for column, (panel, width) in enumerate(zip(panels, widths, strict=True)):
                axes = figure.add_subplot(grid[row, column])
                axes.set_axis_off()
                if named[column]:
                    place, room = axes.get_position(), TICKS[0] / (sum(widths) + 0.2)
                    axes.set_position((place.x0 + room, place.y0, place.width - room, place.height))
                if row == 0:
                    axes.set_title(panel.title, y=1, fontsize=9, fontweight="bold", pad=6)
                if row >= len(panel.cells):
                    continue
                _draw_cell(axes, panel, row, width, colors)
                if panel.scale:
                    _draw_ticks(axes, panel.scale, seconds=row == len(panel.cells) - 1, bands=named[column])
        return _save(figure, path)


def draw_history(history: Sequence[Mapping[str, Any]], chance: Chance, path: Path | str) -> Path:
    """Draw loss and metrics against chance from step 0 on, probes during training, the learning rate, and the monitors.

    Args:
        history: logged records: `step`, `loss`, `lr`, the metrics that `chance` names, `probe/...`, `monitor/...`.
        chance: of the task at the run's batch size; drawn dashed.
        path: PNG to write; its folder is made if missing.

    Returns:
        `path`.
    """
    metrics = _levels(history, chance)
    monitors = {title: kinds for title, kinds in MONITORS.items() if any(_monitored(history, kind) for kind in kinds)}
    charts = ["loss", *(["metrics"] if metrics else []), "learning rate", *monitors]
    lines = math.ceil(len(charts) / 2)
    with matplotlib.rc_context(STYLE):
        figure, places = _charts(lines, 2.6)
        for axes, chart in zip_longest(places, charts):
            if chart is None:
                axes.set_axis_off()
                continue
            axes.set_title(chart, loc="left", y=1, fontsize=10, fontweight="bold")
            axes.set_xlabel("step")
            axes.grid(axis="y", color="#e9ebee")
            axes.set_axisbelow(True)
            if chart in monitors:
                _draw_monitors(axes, history, monitors[chart])
            elif chart == "loss":
                _curve(axes, history, "loss", LINE, "training")
                if chance.loss is not None:
                    _chance_line(axes, chance.loss, ACCENT, f"chance {chance.loss:.3g}")
                axes.set_ylim(bottom=min([0.0, *(record["loss"] for record in history if "loss" in record)]))
                axes.legend(frameon=False, fontsize=8)
            elif chart == "metrics":
                palette = [matplotlib.colormaps["tab10"](i) for i in range(10)]
                for i, (name, level) in enumerate(metrics.items()):
                    _curve(axes, history, name, palette[i % len(palette)], name.replace("_", " "))
                    _chance_line(axes, level, palette[i % len(palette)])
                axes.set_ylim(-0.02, 1.02)
                axes.legend(frameon=False, fontsize=8)
            else:
                _curve(axes, history, "lr", LINE)
                axes.set_ylim(bottom=0)
        return _save(figure, path)


def draw_conflicts(history: Sequence[Mapping[str, Any]], path: Path | str) -> Path | None:
    """Draw the cosine of each two tasks' gradients, and each task's share of the gradient, where they were measured.

    Args:
        history: logged records, of which some hold `conflict/...` and `gradient_share/...`.
        path: PNG to write; its folder is made if missing.

    Returns:
        `path`, or None where there is nothing to draw.
    """
    measured = {prefix: _under(history, prefix) for prefix in (COSINE, SHARE)}
    if not measured[COSINE]:
        return None
    with matplotlib.rc_context(STYLE):
        figure, places = _charts(1, 2.7)
        titles = {COSINE: "cosine of two tasks' gradients", SHARE: "share of the gradient's norm"}
        for axes, (prefix, title) in zip(places, titles.items(), strict=True):
            axes.set_title(title, loc="left", y=1, fontsize=10, fontweight="bold")
            axes.set_xlabel("step")
            axes.grid(axis="y", color="#e9ebee")
            axes.set_axisbelow(True)
            for i, name in enumerate(measured[prefix]):
                label = name.partition("/")[2].replace("_", " ")
                _curve(axes, history, name, matplotlib.colormaps["tab10"](i % 10), label)
            if prefix == COSINE:
                _chance_line(axes, 0.0, FAINT)
            else:
                axes.set_ylim(0, 1)
            axes.legend(frameon=False, fontsize=8)
        return _save(figure, path)


def _charts(lines: int, tall: float) -> tuple[Figure, Iterable[Axes]]:
    """A figure with two charts a line, and these, line by line.

    The room for labels is given: to lay it out by their sizes takes longer than to draw the figure.

    Args:
        lines: of charts.
        tall: inches of a line.
    """
    width, height = CHARTS_WIDE, lines * tall
    left, right, bottom, top = MARGINS
    figure = Figure(figsize=(width, height))
    places = figure.subplots(
        lines,
        2,
        gridspec_kw={
            "left": left / width,
            "right": 1 - right / width,
            "bottom": bottom / height,
            "top": 1 - top / height,
            "wspace": (left + right) / (width / 2 - left - right),
            "hspace": (bottom + top) / (tall - bottom - top),
        },
    )
    return figure, places.flat


def _monitored(history: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    return [name for name in _under(history, MONITOR) if name.rpartition("/")[2] == kind]


def _whose(name: str) -> str:
    """Network or embeddings that an entry of the monitors is about."""
    return name.partition("/")[2].rpartition("/")[0]


def _draw_monitors(axes: Axes, history: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> None:
    """One color for each network or set of embeddings, one kind of line for each measure."""
    known = list(dict.fromkeys(map(_whose, _under(history, MONITOR))))  # one color each in all charts
    labeled: set[str] = set()
    for kind, line in zip(kinds, ("-", ":"), strict=False):
        for name in _monitored(history, kind):
            whose = _whose(name)
            color = matplotlib.colormaps["tab10"](known.index(whose) % 10)
            _curve(axes, history, name, color, None if whose in labeled else whose, line)
            labeled.add(whose)
    if "uniformity" not in kinds:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _under(history: Sequence[Mapping[str, Any]], prefix: str) -> list[str]:
    return list(dict.fromkeys(name for record in history for name in record if name.startswith(f"{prefix}/")))


def _levels(history: Sequence[Mapping[str, Any]], chance: Chance) -> dict[str, float]:
    """Share among the records -> its chance level; that of a probe is the constant answer's."""
    levels = {name: level for name, level in chance.metrics.items() if not name.endswith("loss")}
    for record in history:
        for name, value in record.items():
            if name.startswith("probe/") and name.endswith(CONSTANT):
                levels[name.removesuffix(CONSTANT)] = value
    return {name: level for name, level in levels.items() if any(name in record for record in history)}


def _curve(
    axes: Axes,
    history: Sequence[Mapping[str, Any]],
    name: str,
    color: Any,
    label: str | None = None,
    line: str = "-",
) -> None:
    points = [(record["step"], record[name]) for record in history if name in record]
    if points:
        dots = "o" * (len(points) < 3)
        axes.plot(*zip(*points, strict=True), line, color=color, label=label, linewidth=1.6, marker=dots)


def _chance_line(axes: Axes, level: float, color: Any, label: str | None = None) -> None:
    axes.axhline(level, color=color, linestyle=(0, (5, 3)), linewidth=1.1, label=label)


def _width(panel: Panel) -> float:
    """Inches that the cells of this column want."""
    if not panel.cells:
        return ROW_HEIGHT
    cell = panel.cells[0]
    if isinstance(cell, str):
        longest = max(len(str(text)) for text in panel.cells)
        return min(max(0.075 * longest + 0.2 + 0.2 * bool(panel.right), 0.09 * len(panel.title) + 0.3, 1.0), 3.0)
    if panel.scale:
        return 2.2
    if cell.ndim == 4:
        return ROW_HEIGHT * min(len(cell), FRAMES) * cell.shape[-1] / cell.shape[-2]
    if cell.ndim in (2, 3):
        return max(ROW_HEIGHT * cell.shape[-1] / cell.shape[-2], 0.09 * len(panel.title) + 0.3)
    return 2.6


def _colors(cells: Sequence[Tensor | str]) -> Normalize:
    """The range that the spectrograms among `cells` share."""
    ends = [end for cell in cells if not isinstance(cell, str) and cell.ndim == 2 for end in cell.aminmax()]
    return Normalize(min(map(float, ends)), max(map(float, ends))) if ends else Normalize()


def _draw_ticks(axes: Axes, scale: Scale, *, seconds: bool, bands: bool) -> None:
    """Seconds below, and of spectrograms three bands in Hz on the left, where asked for."""
    axes.set_axis_on()
    axes.tick_params(length=2, pad=2, labelsize=7)
    left, right = axes.get_xlim()
    axes.set_xticks([left, (left + right) / 2, right] if seconds else [])
    axes.set_yticks([])
    if seconds:
        labels = axes.set_xticklabels(["0", f"{scale.seconds / 2:.3g}", f"{scale.seconds:.3g} s"])
        labels[0].set_horizontalalignment("left")
        labels[-1].set_horizontalalignment("right")
    if bands:
        shown = [round(share * (len(scale.bands) - 1)) for share in (0.1, 0.5, 0.9)]
        axes.set_yticks(shown, [_hertz(scale.bands[i]) for i in shown])


def _hertz(value: float) -> str:
    return f"{value:.2g} Hz" if value < 100 else f"{value:.0f} Hz" if value < 1000 else f"{value / 1000:.2g} kHz"


def _mark(axes: Axes, right: bool) -> None:
    """A check mark and a solid frame, or a cross and a dashed one; the colors only add to that."""
    color = GOOD if right else ACCENT
    axes.add_patch(
        Rectangle(
            (0, 0),
            1,
            1,
            transform=axes.transAxes,
            fill=False,
            edgecolor=color,
            linewidth=2,
            linestyle="-" if right else (0, (4, 3)),
            clip_on=False,
        )
    )
    box = {"facecolor": "white", "edgecolor": color, "boxstyle": "round,pad=0.15", "linewidth": 0.8}
    mark = "✓" if right else "✗"
    axes.text(0.03, 0.96, mark, ha="left", va="top", color=color, fontsize=8, transform=axes.transAxes, bbox=box)


def _draw_cell(axes: Axes, panel: Panel, row: int, width: float, colors: Normalize) -> None:
    cell, right = panel.cells[row], None if panel.right is None else panel.right[row]
    if isinstance(cell, str):
        cell = cell if right is None else f"{'✓' if right else '✗'} {cell}"
        lines = textwrap.wrap(cell, max(int((width - 0.15) / 0.072), 8), max_lines=7, placeholder=" …")
        axes.text(
            0.5,
            0.5,
            "\n".join(lines),
            ha="center",
            va="center",
            fontsize=8.5,
            transform=axes.transAxes,
            parse_math=False,
            color=ACCENT if right is False else INK,
        )
        return
    values = cell.detach().float().cpu()
    if values.ndim == 4:
        chosen = np.linspace(0, len(values) - 1, min(len(values), FRAMES)).round().astype(int)
        strip = np.concatenate([_edged(_pixels(values[i])) for i in chosen], axis=1)
        axes.imshow(strip, interpolation="nearest")
    elif values.ndim == 3:
        axes.imshow(_pixels(values), interpolation="nearest")
    elif values.ndim == 2 and panel.scale is None:
        axes.imshow(values.numpy(), cmap="viridis", interpolation="nearest")
    elif values.ndim == 2:
        axes.imshow(values.numpy(), cmap="magma", origin="lower", aspect="auto", interpolation="nearest", norm=colors)
    else:
        axes.plot(values.numpy(), color=LINE, linewidth=0.5)
        axes.set_ylim(-1.05 * max(1e-6, values.abs().max().item()), 1.05 * max(1e-6, values.abs().max().item()))
        axes.margins(x=0)
    if right is not None:
        _mark(axes, right)


def _pixels(picture: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8; values outside are cut, for they cannot be shown."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _edged(frame: np.ndarray) -> np.ndarray:
    """A white margin on the right, so that frames of a strip can be told apart."""
    return np.pad(frame, ((0, 0), (0, max(1, frame.shape[1] // 32)), (0, 0)), constant_values=255)


def _save(figure: Figure, path: Path | str) -> Path:
    path = Path(path)
    check_kind(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, facecolor="white")
    return path


def check_kind(path: Path) -> None:
    """Raise RecipeError for a name that ends on no kind of picture that can be written."""
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise RecipeError(f"{path}: pictures are written as {', '.join(f'.{kind}' for kind in kinds)}")
