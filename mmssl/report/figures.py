"""Pictures of what a task feeds the network, and curves of how the run went."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mmssl.objectives.base import Chance, Panel
from mmssl.ops.conflicts import COSINE, SHARE

INK, FAINT, LINE, ACCENT = "#1f2430", "#8a8f98", "#2f6fb4", "#c8553d"
FRAMES = 6  # of a clip that fit next to each other and are still seen
ROW_HEIGHT = 1.25  # inches
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

    A square (H, W) cell is drawn as a map, any other as a spectrogram with its lowest band at the bottom. Of a clip,
    up to six frames are shown, evenly spread and in order.

    Args:
        panels: of `Objective.preview`.
        path: PNG to write; its folder is made if missing.
        title: of the whole picture.
        rows: samples to draw at most.

    Returns:
        `path`.
    """
    rows = min(rows, max(len(panel.cells) for panel in panels))
    widths = [_width(panel) for panel in panels]
    textual = all(isinstance(cell, str) or cell.ndim == 1 for panel in panels for cell in panel.cells)
    height = ROW_HEIGHT * (0.6 if textual else 1.0)
    top = 0.65 if title else 0.35
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(sum(widths) + 0.2, rows * height + top))
        grid = figure.add_gridspec(
            rows,
            len(panels),
            width_ratios=widths,
            left=0.1 / (sum(widths) + 0.2),
            right=1 - 0.1 / (sum(widths) + 0.2),
            top=1 - top / (rows * height + top),
            bottom=0.01,
            hspace=0.07,
            wspace=0.05,
        )
        if title:
            figure.text(0.5, 1 - 0.08 / (rows * height + top), title, ha="center", va="top", fontsize=10, color=FAINT)
        for column, (panel, width) in enumerate(zip(panels, widths, strict=True)):
            for row in range(rows):
                axes = figure.add_subplot(grid[row, column])
                axes.set_axis_off()
                if row == 0:
                    axes.set_title(panel.title, fontsize=9, fontweight="bold", pad=6)
                if row < len(panel.cells):
                    _draw_cell(axes, panel.cells[row], width)
        return _save(figure, path)


def draw_history(history: Sequence[Mapping[str, Any]], chance: Chance, path: Path | str) -> Path:
    """Draw loss and metrics against chance, probes during training, and the learning rate.

    Args:
        history: logged records: `step`, `loss`, `lr`, the metrics that `chance` names, `probe/...`.
        chance: of the task at the run's batch size; drawn dashed.
        path: PNG to write; its folder is made if missing.

    Returns:
        `path`.
    """
    metrics = _levels(history, chance)
    charts = ["loss", *(["metrics"] if metrics else []), "learning rate"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(charts), 2.7), layout="constrained")
        for axes, chart in zip(np.atleast_1d(figure.subplots(1, len(charts))), charts, strict=True):
            axes.set_title(chart, loc="left", fontsize=10, fontweight="bold")
            axes.set_xlabel("step")
            axes.grid(axis="y", color="#e9ebee")
            axes.set_axisbelow(True)
            if chart == "loss":
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
        figure = Figure(figsize=(7.2, 2.7), layout="constrained")
        titles = {COSINE: "cosine of two tasks' gradients", SHARE: "share of the gradient's norm"}
        for axes, (prefix, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
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


def _curve(axes: Axes, history: Sequence[Mapping[str, Any]], name: str, color: Any, label: str | None = None) -> None:
    points = [(record["step"], record[name]) for record in history if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.6, marker="o" * (len(points) < 3))


def _chance_line(axes: Axes, level: float, color: Any, label: str | None = None) -> None:
    axes.axhline(level, color=color, linestyle=(0, (5, 3)), linewidth=1.1, label=label)


def _width(panel: Panel) -> float:
    """Inches that the cells of this column want."""
    if not panel.cells:
        return ROW_HEIGHT
    cell = panel.cells[0]
    if isinstance(cell, str):
        longest = max(len(str(text)) for text in panel.cells)
        return min(max(0.075 * longest + 0.2, 0.09 * len(panel.title) + 0.3, 1.0), 3.0)
    if cell.ndim == 4:
        return ROW_HEIGHT * min(len(cell), FRAMES) * cell.shape[-1] / cell.shape[-2]
    if cell.ndim == 3 or (cell.ndim == 2 and cell.shape[0] == cell.shape[1]):
        return max(ROW_HEIGHT * cell.shape[-1] / cell.shape[-2], 0.09 * len(panel.title) + 0.3)
    return 2.6


def _draw_cell(axes: Axes, cell: Tensor | str, width: float) -> None:
    if isinstance(cell, str):
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
        )
        return
    values = cell.detach().float().cpu()
    if values.ndim == 4:
        chosen = np.linspace(0, len(values) - 1, min(len(values), FRAMES)).round().astype(int)
        strip = np.concatenate([_edged(_pixels(values[i])) for i in chosen], axis=1)
        axes.imshow(strip, interpolation="nearest")
    elif values.ndim == 3:
        axes.imshow(_pixels(values), interpolation="nearest")
    elif values.ndim == 2 and values.shape[0] == values.shape[1]:
        axes.imshow(values.numpy(), cmap="viridis", interpolation="nearest")
    elif values.ndim == 2:
        axes.imshow(values.numpy(), cmap="magma", origin="lower", aspect="auto", interpolation="nearest")
    else:
        axes.plot(values.numpy(), color=LINE, linewidth=0.5)
        axes.set_ylim(-1.05 * max(1e-6, values.abs().max().item()), 1.05 * max(1e-6, values.abs().max().item()))
        axes.margins(x=0)


def _pixels(picture: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8; values outside are cut, for they cannot be shown."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _edged(frame: np.ndarray) -> np.ndarray:
    """A white margin on the right, so that frames of a strip can be told apart."""
    return np.pad(frame, ((0, 0), (0, max(1, frame.shape[1] // 32)), (0, 0)), constant_values=255)


def _save(figure: Figure, path: Path | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, facecolor="white")
    return path
