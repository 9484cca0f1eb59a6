"""What a run says to call next is what its task has trained for."""

from pathlib import Path

import pytest

from mmssl.build import build
from mmssl.catalog import find_recipe
from mmssl.recipe import load
from mmssl.run_directory import Run
from mmssl.runs import next_calls


@pytest.mark.parametrize(
    ("recipe", "probes"),
    [
        ("temporal_alignment_toy", ["offset", "localization"]),
        ("correspondence_toy", ["retrieval", "localization"]),
        ("rotation_toy", ["logistic --layers"]),
    ],
)
def test_a_run_is_asked_for_what_its_task_trains(recipe, probes):
    loaded = load(find_recipe(recipe))
    objective, _ = build(loaded)
    lines = next_calls(Run(Path("runs/it"), loaded, objective, objective.exported), recipe, own_data=True)
    assert [line.partition("--probe ")[2] for line in lines if line.startswith("  mmssl adapt")] == probes
