"""Where there are no labels, a comparison quotes how well such rankings agreed with probes elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import compared
import pytest

import mmssl
from mmssl.comparison.label_free import LABEL_FREE, measured_elsewhere
from mmssl.comparison.plan import Plan
from mmssl.registry import ROOT


def test_what_is_quoted_is_what_the_results_say():
    text = (ROOT.parent / "docs" / "results.md").read_text(encoding="utf-8")
    kept = json.loads((ROOT / "comparison" / "agreements.json").read_text(encoding="utf-8"))
    assert kept == compared.agreements(text)  # else: python scripts/compared.py --table
    assert len(kept) == text.count("- agreement with probes, Kendall's tau")
    assert all(set(one["by"]) == {measure.title for measure in LABEL_FREE} for one in kept)


@pytest.mark.parametrize("label", [None, "kind"])
def test_without_labels_sentence_and_notes_quote_it_and_with_labels_they_do_not(label):
    cell = {"monitors": {"effective_rank": 9.0, "lidar": 3.0, "spectrum_decay": 1.5}}
    if label is not None:
        scores = {"knn": {"pooled": 0.5}}
        cell |= {"scores": scores, "validation": scores, "constant": {"knn": 0.1}}
        cell |= {"rows": {"knn": [80, 20]}, "test": "held out"}
    plan = Plan({"source": "photos"}, label, "image", tasks={"rotation": {}}, probe="knn", shots=(), seeds=(0,))
    found = mmssl.Comparison(plan, Path("here"), {"rotation": [cell]}, {"rotation": [{}]}, {})
    taus = [one.by["RankMe"].tau for one in measured_elsewhere()]
    assert ("on clothes (Fashion-MNIST) and recorded notes" in found.sentence) == (label is None)
    assert ("as labels of a hundred rows would: in 8 comparisons with labels" in found.sentence) == (label is None)
    lines = [note for note in found.notes() if note in map(str, measured_elsewhere())]
    assert len(lines) == (len(taus) if label is None else 0)
    if label is None:
        assert f"{min(taus):+.2f} to {max(taus):+.2f} for RankMe, " in found.sentence
        assert "small ResNet, 18 tasks by logistic, 10 a class: RankMe +0.35 / +0.43, LiDAR -0.32 / -0.43" in lines[0]
