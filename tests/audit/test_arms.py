"""What an audit asks of every task in every modality, and why it asks nothing."""

from __future__ import annotations

from pathlib import Path

import arms
import pytest
from recipe_files import TOYS
from tables import RESULTS


@pytest.mark.quick(4)
@pytest.mark.parametrize("path", sorted(TOYS), ids=lambda path: path.stem)
def test_no_task_is_asked_nothing_without_a_reason_and_the_table_says_so(path: Path):
    asked = arms.asked(path)
    assert (asked.null == "none") == bool(asked.why)
    written = RESULTS.read_text("utf-8").partition("<!-- arms -->")[2].partition("<!-- /arms -->")[0]
    (line,) = [line for line in written.splitlines() if f"`{path.stem.removesuffix('_toy')}`" in line]
    assert line.startswith(arms.cells(asked))
