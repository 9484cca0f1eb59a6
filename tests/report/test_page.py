"""The report is one file that holds everything and lets nothing in."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from mmssl import recipe
from mmssl.objectives.base import Chance, Panel
from mmssl.report.figures import draw_history, draw_panels
from mmssl.report.page import write_report

HOSTILE = "<script>alert(1)</script>"


def row(encoder, part, accuracy, spread):
    return {
        "encoder": encoder,
        "part": part,
        "metrics": {"accuracy": accuracy},
        "interval": {"accuracy": [accuracy - 0.1, accuracy + 0.1]},
        "spread": spread,
    }


PROBES = {
    "probe": "knn",
    "target": "classes",
    "label": "shape",
    "encoder": "image",
    "metrics": [{"name": "accuracy", "title": "accuracy", "percent": True}],
    "train_rows": 80,
    "test_rows": 20,
    "counts": {"classes": 4},
    "shots": None,
    "test": "toy, split test",
    "validation": "a fifth of the training rows",
    "seeds": [0, 1, 2],
    "warnings": ["class 'x' is rare"],
    "rows": [
        row("pretrained", "pooled", 0.75, {}),
        row("random", "pooled", 0.625, {"accuracy": 0.02}),
        row("constant", "", 0.3, {}),
    ],
}
SIZES = PROBES | {
    "probe": "ridge",
    "target": "values",
    "label": "size",
    "metrics": [{"name": "r2", "title": "R^2", "percent": False}],
    "rows": [
        {"encoder": "pretrained", "part": "pooled", "metrics": {"r2": 0.5}},
        {"encoder": "constant", "part": "", "metrics": {"r2": -0.01}},
    ],
    "warnings": [HOSTILE],
}


def made(tmp_path, **changes):
    """What a run is to the report."""
    history = [
        {"step": step, "loss": 1.25, "accuracy": 0.5, "lr": 0.1, "samples_per_second": 8.0, "data_wait": 0.25}
        | {"peak_memory_gib": 1.5}
        for step in (10, 20)
    ]
    history[-1] |= {"same_rows/loss": 1.125, "same_rows/accuracy": 0.75, "monitor/image/rank": 7.5}
    history.insert(0, {"step": 0, "loss": 1.5, "accuracy": 0.125, "monitor/image/rank": 12.25})
    chance = Chance(1.3863, {"accuracy": 0.25})
    draw_history(history, chance, tmp_path / "figures" / "history.png")
    draw_panels([Panel("input", [torch.rand(3, 4, 4)])], tmp_path / "figures" / "preview.png")
    (tmp_path / "errors.jsonl").write_text(json.dumps({"id": 3, "error": "truncated"}) + "\n")
    loaded = recipe.load(
        {
            "encoders": {"image": {"model": "timm/test_resnet"}},
            "objective": {"name": "rotation"},
            "data": {"source": f"s3://me:secret@host/{HOSTILE}"},
            "training": {"steps": 20, "batch_size": 16},
        }
    )
    weights = torch.nn.Linear(9, 100)
    weights.spec, weights.dim = {"model": "timm/test_resnet"}, 96
    facts = {
        "directory": tmp_path,
        "recipe": loaded,
        "encoders": {"image": weights},
        "step": 20,
        "history": history,
        "chance": chance,
        "probes": [PROBES, SIZES],
    }
    return SimpleNamespace(**(facts | changes))


def test_it_says_what_the_run_is_and_what_came_out(tmp_path):
    page = write_report(made(tmp_path)).read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for piece in (
        "rotation",
        "20 steps × 16 rows = 320 samples",
        "0.7 min",
        "8 samples/s, data-wait 25 %, 1.5 GiB",
        "by which quarter turn was the image, or the clip, rotated?",
        "untrained at the last step on the rows of step 0 chance",
        "loss 1.5 1.25 1.125 1.386",
        "accuracy 0.125 0.5 0.75 0.25",
        "effective rank spread dead share alignment uniformity image 12.2 → 7.5",
        "Verdict: learned: accuracy 0.5 against 0.25 by guessing and 0.125 untrained (last 2 records, 32 answers, "
        "z = 3.0, 0.75 on the rows of step 0).",
        "knn probe of &#39;shape&#39;: 80 training rows, 20 test rows, 4 classes; test rows: toy, split test",
        "pretrained pooled 75.0 (65.0 – 85.0)",
        "random-initialized pooled 62.5 ± 2.0",
        "constant answer 30.0 (20.0 – 40.0)",
        "+12.5 points",
        "ridge probe of &#39;size&#39;",
        "pretrained pooled 0.5 constant answer -0.01 Margin over the best baseline: +0.510 of R^2",
        "class &#39;x&#39; is rare",
        "timm/test_resnet 1,000 96",
        "1 undecodable rows",
        "batch_size: 16",
        f"mmssl adapt {tmp_path}",
        f"mmssl export {tmp_path}",
    ):
        assert piece in text, piece


def test_it_is_self_contained_and_escapes_what_it_shows(tmp_path):
    page = write_report(made(tmp_path)).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "secret" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page)
    assert not re.search(r"https?://", page)


@pytest.mark.quick(1)
@pytest.mark.parametrize("changes", [{"probes": []}, {"history": []}, {"encoders": {}}], ids=lambda c: next(iter(c)))
def test_it_does_without_what_a_run_lacks(tmp_path, changes):
    assert "</html>" in write_report(made(tmp_path, **changes)).read_text(encoding="utf-8")


def test_a_damaged_figure_is_left_out_and_named(tmp_path):
    run = made(tmp_path)
    whole = (tmp_path / "figures" / "history.png").read_bytes()
    flaws = {
        "no picture": b"text",
        "cut": whole[:-100],
        "overwritten": whole[:60] + bytes(20) + whole[80:],
        "none": b"",
    }
    for name, content in flaws.items():
        (tmp_path / "figures" / f"{name}.png").write_bytes(content)
    (tmp_path / "figures" / "folder.png").mkdir()
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    for name in (*flaws, "folder"):
        assert re.search(rf"Left out: \S*figures/{name}\.png is damaged \(.+\); remove report.html, and --resume", page)


@pytest.mark.long
def test_it_replaces_an_older_report_whole(tmp_path):
    (tmp_path / "report.html").write_text("from before")
    write_report(made(tmp_path))
    assert "from before" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "figures", "errors.jsonl"}
