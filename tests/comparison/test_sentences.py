"""What a comparison says of cells that are there: its sentence, its notes, and the line of a cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import mmssl
from mmssl.comparison.cells import progress_of
from mmssl.comparison.measure import Cell
from mmssl.comparison.plan import Plan


def test_the_most_labels_choose_the_depth_of_the_fewest():
    measures = ["knn", "logistic, 4 a class", "logistic, 40 % of labels"]
    few = {key: {"stem": 0.9, "pooled": 0.1} for key in measures} | {measures[2]: {"stem": 0.2, "pooled": 0.8}}
    cell = {"scores": few, "validation": few}
    plan = Plan({"source": "toy"}, "shape", "image", tasks={"rotation": {}}, shots=(4, "40%"))
    found = mmssl.Comparison(plan, Path("here"), {"rotation": [cell]}, {}, {})
    assert [found.depth("rotation", measure) for measure in measures] == ["stem", "pooled", "pooled"]


def test_a_share_is_told_with_its_rows_and_seeds():
    scores = {"ridge, 1 % of labels": {"pooled": 0.5}}
    cell = {"scores": scores, "validation": scores, "drawn": {"ridge, 1 % of labels": [24]}}
    plan = Plan({"source": "toy"}, "shape", "image", tasks={"rotation": {}}, probe="ridge", shots=("1%",), seeds=(0,))
    found = mmssl.Comparison(plan, Path("here"), {"rotation": [cell]}, {"rotation": [{}]}, {})
    assert found.sentence.startswith("rotation, last: 50.0 % by ridge, 1 % of labels (24 rows, 1 seed), ")


def test_one_seed_of_values_has_no_interval():
    scores = {"ridge": {"pooled": 0.5}}
    cell = {"scores": scores, "validation": scores, "metric": {"percent": False}, "monitors": {"effective_rank": 1.0}}
    cell["constant"] = {"ridge": 0.6}
    cells = {"rotation": [cell], "untrained": [cell | {"scores": {"ridge": {"pooled": 0.25}}}]}
    plan = Plan({"source": "toy"}, "position", "image", tasks={"rotation": {}}, probe="ridge", shots=(), seeds=(0,))
    found = mmssl.Comparison(plan, Path("here"), cells, {key: [{}] for key in cells}, {})
    assert "(+0.250, one seed tells no spread)" in found.sentence
    assert "inf" not in found.sentence
    assert found.sentence.endswith("Next: the same with a larger --budget or more --seeds, and another --out")
    of_runs = replace(found, plan=replace(plan, tasks={}, runs={"rotation": ["runs/rotation"]}))
    assert of_runs.sentence.endswith("Next: the same with longer runs or more seeds of each, and another --out")
    assert found._gain("rotation") == "+0.250"
    assert "It is not above the answer that looks at nothing, 0.600." in found.sentence


def test_what_is_above_the_untrained_network_is_tuned_or_exported_next():
    def cell(value):
        scores = {"ridge": {"pooled": value}}
        own = {"scores": scores, "validation": scores, "metric": {"percent": False}, "run": "there"}
        own["constant"] = {"ridge": 0.0}
        return own | {"monitors": {"effective_rank": 1.0}}

    cells = {"rotation": [cell(0.5), cell(0.51), cell(0.5)], "untrained": [cell(0.2), cell(0.21), cell(0.2)]}
    plan = Plan({"source": "my rows"}, "position", "image", tasks={"rotation": {}}, probe="ridge", shots=())
    found = mmssl.Comparison(plan, Path("here"), cells, {key: [{}] * 3 for key in cells}, {})
    tuned = "mmssl adapt there --data 'my rows' --label position --probe finetune --save tuned"
    assert found.sentence.endswith(f"Next: {tuned}, or mmssl export there --to exported")
    assert "looks at nothing" not in found.sentence


def test_what_is_printed_of_a_cell_is_its_last_depth_and_not_the_best_on_test_rows():
    found = {"scores": {"knn": {"stem": 0.9, "pooled": 0.4}}, "metric": {"percent": True}, "minutes": 2.0}
    assert progress_of(Cell("simclr", 0), found) == "simclr, seed 0: knn 40.0 % (2.0 min)"
    assert progress_of(Cell("simclr", 0), found | {"metric": {"percent": False}}) == (
        "simclr, seed 0: knn 0.400 (2.0 min)"
    )


@pytest.mark.parametrize(
    ("test", "seen"), [("a fifth of photos, split train, held out", True), ("held out, split test", False)]
)
def test_notes_of_one_seed_tell_no_spread_and_of_own_test_rows_that_no_task_saw_them(test, seen):
    scores = {"knn": {"pooled": 0.5}}
    cell = {"scores": scores, "validation": scores, "rows": {"knn": [80, 20]}, "test": test}
    cell["monitors"] = {"effective_rank": 1.0, "spectrum_decay": 1.0}
    plan = Plan({"source": "photos"}, "label", "image", tasks={"rotation": {}}, probe="knn", shots=(), seeds=(0,))
    found = mmssl.Comparison(plan, Path("here"), {"rotation": [cell]}, {"rotation": [{}]}, {})
    notes = found.notes()
    assert ("the tasks saw the test rows, without labels: name other rows with test (--test)" in notes) == seen
    assert "standard deviation" not in " ".join(notes)
    assert any(note.endswith("95 % intervals over test rows, for one seed tells no spread") for note in notes)
    several = replace(found, plan=replace(plan, seeds=(0, 1)), cells={"rotation": [cell, cell]}).notes()
    assert any(note.startswith("± one standard deviation over seeds 0, 1; best depths") for note in several)
