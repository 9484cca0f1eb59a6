"""report.html of a comparison: the answer, the table, and the pictures behind it, in one file."""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mmssl.adaptation.features import POOLED
from mmssl.atomic import write_text
from mmssl.comparison.comparison import Comparison, title_of
from mmssl.comparison.label_free import ALPHA_REQ, LABEL_FREE, rank_by, value_of
from mmssl.comparison.neighbors import draw_sheet
from mmssl.comparison.plan import UNTRAINED
from mmssl.report.figures import DPI as PREVIEW_DPI

DPI = 120
MAPS = 6
"""Lines whose features are mapped."""
NAME_HEIGHT, LEGEND_HEIGHT = 0.15, 0.16
"""Inches from name to name next to charts, and below one."""
TITLE_WIDTH = 38
"""Letters of a line above one of three charts."""


def write_page(found: Comparison) -> Path:
    """Write report.html into the comparison's folder; returns its path."""
    template = Environment(
        loader=PackageLoader("mmssl.comparison", "."), autoescape=select_autoescape(default=True)
    ).get_template("page.html.jinja")
    head, lines = found.table()
    page = template.render(
        name=found.out.resolve().name,
        source=found.plan.data["source"],
        sentence=found.sentence,
        head=head,
        lines=lines,
        best=title_of(found.ranked[0]) if found.ranked else "",
        notes=found.notes(),
        figures=list(_figures(found)),
        audits=[audit["text"] for audit in found.audits.values()],
    )
    path = found.out / "report.html"
    write_text(path, page)
    return path


def _figures(found: Comparison) -> Iterator[dict[str, Any]]:
    """Title, what it shows, and pictures: data, width in CSS pixels, and a caption where there are several."""
    if found.measures and UNTRAINED in found.cells:
        yield _figure("Over the untrained network", _gains(found), f"{found.asked}, 95 % intervals, paired by seed")
    if found.measures:
        text = f"{found.asked} at every depth, mean and standard deviation over the seeds; shallow on the left"
        if found.ranked and (sentence := found.depth_sentence(found.ranked[0], found.main)):
            text += f". {sentence}"
        yield _figure("Which depth transfers best", depth_curves(found), text)
    if found.measures and len(found.ranked) > 1:
        told = [f"{measure.title} {one.tau:+.2f}" for measure, one in found.agreements.items()]
        text = f"a point and a line a task, against {found.asked}; how well each ranking agreed with probes here: "
        text += f"Kendall's tau over {len(found.ranked)} tasks: {', '.join(told)}" if told else "too few tasks to say"
        yield _figure("Rankings without labels", label_free_charts(found), text)
    curves = [line for line in found.ranked if found.cells[line][0].get("curve")]
    if curves:
        text = "what each task was trained on, against the level of guessing (dashed) where it is known"
        yield _figure("The pretext tasks", _curves(found, curves), text)
    for line in found.ranked:
        picture = Path(found.cells[line][0].get("run", "")) / "figures" / "preview.png"
        if picture.is_file():
            with Image.open(picture) as drawn:
                width = round(drawn.width * 96 / PREVIEW_DPI)
            data = base64.b64encode(picture.read_bytes()).decode()
            text = "what the task sees, what is asked, what the trained network answers"
            yield {"title": f"Puzzles of {title_of(line)}", "text": text, "pictures": [{"data": data, "width": width}]}
    pictured = [line for line in (*found.ranked[:1], UNTRAINED) if "neighbors" in (found.answers.get(line) or [{}])[0]]
    if pictured:
        what = "middle frame of a clip" if found.plan.modality == "video" else "picture"
        text = (
            f"left a test row ({what}), and next to it the five training rows nearest to it by the cosine of features"
        )
        text += "; framed where the label is that of the test row" if found.measures else ""
        sheets = [_sheet(found, line) for line in pictured]
        yield {"title": "Nearest neighbors", "text": text, "pictures": sheets}
    mapped = [line for line in (*found.ranked, UNTRAINED) if "map" in (found.answers.get(line) or [{}])[0]][:MAPS]
    if mapped:
        kinds = " and ".join(dict.fromkeys(_map_kind(found, line) for line in mapped))
        text = f"training rows by their features ({kinds}), in the color of their class where there are some"
        yield _figure("Maps of the features", _maps(found, mapped), text)
    if found.measures and found.ranked and (confusion := found.confusion(found.ranked[0], found.main)):
        text = f"{title_of(found.ranked[0])} by {found.asked}: of each class (row), the share taken for each other"
        yield _figure("What is taken for what", _confusion(*confusion), text)


def _figure(title: str, figure: Figure, text: str) -> dict[str, Any]:
    kept = io.BytesIO()
    figure.savefig(kept, format="png", dpi=DPI, facecolor="white")
    data = base64.b64encode(kept.getvalue()).decode()
    return {"title": title, "text": text, "pictures": [{"data": data, "width": round(96 * figure.get_figwidth())}]}


def _sheet(found: Comparison, line: str) -> dict[str, Any]:
    answered = found.answers[line][0]
    same = answered["neighbors_same"]
    sheet, kept = draw_sheet(answered["neighbors"], same), io.BytesIO()
    sheet.save(kept, format="png")
    caption = f"{title_of(line)}: {same.sum()} of {same.size} have the same label" if found.measures else title_of(line)
    return {"data": base64.b64encode(kept.getvalue()).decode(), "width": sheet.width, "caption": caption}


def _new(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return figure, axes


def _grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """`count` charts, up to three next to each other, each so many inches high."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, every = _new(9, height * rows, rows, columns)
    for axes in every[count:]:
        axes.set_axis_off()
    return figure, every


def _gains(found: Comparison) -> Figure:
    lines = [line for line in found.plan.lines if line in found.cells and line != UNTRAINED]
    gains = {line: found.difference(line, UNTRAINED, found.main) for line in lines}
    lines.sort(key=lambda line: gains[line].mean)
    figure, (axes,) = _new(7.2, 0.8 + 0.32 * len(lines))
    scale = 100 if found.percent else 1
    for place, line in enumerate(lines):
        gain = gains[line]
        color = "#1b6ca8" if line in found.ranked else "#8a8f98"
        finite = [value for value in (gain.low, gain.high) if math.isfinite(value)]
        if len(finite) == 2:
            axes.plot([scale * gain.low, scale * gain.high], [place, place], color=color, linewidth=2)
        axes.plot(
            [scale * gain.mean], [place], "o", color=color, markersize=6, fillstyle="full" if gain.told else "none"
        )
    axes.axvline(0, color="#b03a2e", linestyle=(0, (5, 3)), linewidth=1)
    axes.set_yticks(range(len(lines)), [title_of(line) for line in lines])
    axes.set_xlabel("points over the untrained network" if found.percent else "over the untrained network", fontsize=8)
    return figure


def depth_curves(found: Comparison) -> Figure:
    """Score of the main measure by depth, mean and standard deviation over the seeds, a curve a line of the table."""
    lines = [line for line in (*found.ranked, UNTRAINED, "supervised") if line in found.cells]
    figure, (axes,) = _new(7.2, 4 + LEGEND_HEIGHT * math.ceil(len(lines) / 2))
    scale, names = 100 if found.percent else 1, list[str]()
    for line in lines:
        depths = [depth for depth in found.cells[line][0]["scores"][found.main] if depth != POOLED] + [POOLED]
        names = depths if len(depths) > len(names) else names
        values = [[scale * value for value in found.values(line, found.main, depth)] for depth in depths]
        means = [statistics.fmean(own) for own in values]
        errors = [statistics.stdev(own) if len(own) > 1 else 0 for own in values]
        task = line in found.ranked
        axes.errorbar(
            range(len(depths)),
            means,
            errors,
            label=title_of(line),
            color=_color(found, line),
            capsize=2,
            linestyle="-" if task else "--",
        )
    axes.set_xticks(
        range(len(names)), ["pooled" if name == POOLED else name for name in names], rotation=30, ha="right"
    )
    axes.set_ylabel(f"{found.main}{', %' if found.percent else ''}", fontsize=8)
    figure.legend(fontsize=7, ncols=2, frameon=False, loc="outside lower center")
    return figure


def label_free_charts(found: Comparison) -> Figure:
    """The score of each task against each ranking without labels: a line a task through all charts, to its name."""
    shown = [measure for measure in LABEL_FREE if rank_by(found.cells, found.ranked, measure)]
    scale = 100 if found.percent else 1
    scores = {line: scale * statistics.fmean(found.values(line, found.main)) for line in found.ranked}
    ascending = sorted(scores, key=lambda line: scores[line])
    height = max(2.6, 0.8 + NAME_HEIGHT * len(ascending))
    figure, (*every, names) = _new(9, height, 1, len(shown) + 1)
    room = max(max(scores.values()) - min(scores.values()), 1e-3 * scale)
    low, high = min(scores.values()) - 0.1 * room, max(scores.values()) + 0.1 * room
    for axes, measure in zip(every, shown, strict=True):
        for line, score in scores.items():
            axes.axhline(score, color=_color(found, line), alpha=0.4, linewidth=0.7)
            value = value_of(found.cells, line, measure)
            if value is not None:
                axes.plot([value], [score], "o", color=_color(found, line), markersize=5)
        if measure is ALPHA_REQ:
            axes.axvline(1, color="#b03a2e", linestyle=(0, (5, 3)), linewidth=1)
        axes.margins(x=0.2)
        axes.set_ylim(low, high)
        axes.set_xlabel(measure.title, fontsize=8)
    every[0].set_ylabel(f"{found.main}{', %' if found.percent else ''}", fontsize=8)
    names.set(xlim=(0, 1), ylim=(low, high))
    names.set_axis_off()
    gap = NAME_HEIGHT / (height - 0.6) * (high - low)  # the rest is below the axes
    for line, at in zip(ascending, apart([scores[line] for line in ascending], gap, low, high), strict=True):
        names.plot([0, 0.12], [scores[line], at], color=_color(found, line), linewidth=0.7, clip_on=False)
        names.text(0.14, at, title_of(line), fontsize=7, verticalalignment="center")
    return figure


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places as near to those wanted as can be, each `gap` above the one before, from `low` to `high`.

    Args:
        wanted: ascending.
        gap: between two places at least.
        low: none is below.
        high: none is above, unless there is too little room.
    """
    from scipy.optimize import isotonic_regression

    steps = gap * np.arange(len(wanted))
    free = isotonic_regression(np.asarray(wanted) - steps).x
    return list((free.clip(low, max(low, high - steps[-1])) + steps).tolist())


def _color(found: Comparison, line: str) -> Any:
    """The same in every chart: of a task its own, of baselines black and gray."""
    if line in found.ranked:
        return mpl.colormaps["tab20"](found.ranked.index(line) % 20)
    return "black" if line == UNTRAINED else "#8a8f98"


def _map_kind(found: Comparison, line: str) -> str:
    return str(found.answers[line][0].get("map_kind", "PCA"))


def _curves(found: Comparison, lines: list[str]) -> Figure:
    figure, every = _grid(len(lines), 2.3)
    for axes, line in zip(every, lines, strict=False):
        levels = found.cells[line][0]["chance"]
        key = next((name for name in levels if name.rpartition("/")[2] != "loss"), "loss")
        for cell in found.cells[line]:
            points = [(record["step"], record[key]) for record in cell["curve"] if key in record]
            axes.plot(*zip(*points, strict=True), linewidth=1.2)
        if key in levels:
            axes.axhline(levels[key], color="#b03a2e", linestyle=(0, (5, 3)), linewidth=1)
        axes.set_title(fill(f"{title_of(line)}: {key}", TITLE_WIDTH), fontsize=9)
    return figure


def _maps(found: Comparison, lines: list[str]) -> Figure:
    figure, every = _grid(len(lines), 3)
    for axes, line in zip(every, lines, strict=False):
        answered = found.answers[line][0]
        places = answered["map"]
        classes = answered.get("map_class", np.zeros(len(places), np.int32))
        axes.scatter(places[:, 0], places[:, 1], c=classes % 20, cmap="tab20", s=5, linewidths=0)
        axes.set_title(fill(f"{title_of(line)} ({_map_kind(found, line)})", TITLE_WIDTH), fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def _confusion(shares: np.ndarray, names: list[str]) -> Figure:
    side = min(9.0, 2.5 + 0.35 * len(names))
    figure, (axes,) = _new(side, side)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= 12:
        for (row, column), share in np.ndenumerate(shares):
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xlabel("taken for", fontsize=8)
    return figure
