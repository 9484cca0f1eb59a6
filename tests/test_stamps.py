"""scripts/stamps.py: what each line trains, and how its cells become rows."""

from __future__ import annotations

import pytest
import stamps

from mmssl import recipe as recipes


@pytest.mark.parametrize("line", stamps.TASKS)
def test_a_line_trains_the_encoders_that_it_compares(line):
    spec = recipes.load(stamps.recipe(line, 1))
    asked = {"audio", "text"} if line.startswith("contrastive") else {"audio", "image", "text"}
    assert (set(spec.encoders), spec.training.seed) == (asked, 1)


def test_seeds_of_a_line_are_one_row_and_pairs_it_lacks_are_empty():
    cells = {
        f"contrastive {seed}": {"audio text": {"audio": [0.2, 0.6 + seed / 10], "text": [0.1, 0.5]}} for seed in (0, 1)
    }
    head, _, row = stamps.table(cells).splitlines()
    assert head.startswith("| learned from | speech to sentence R@1, R@10 | sentence to speech R@1, R@10 |")
    assert row == "| speech and sentences | 20.0, 65.0 ± 7.1 | 10.0, 50.0 |  |  |  |  | 2 |"
