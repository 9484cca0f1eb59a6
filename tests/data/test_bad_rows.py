"""How rows that cannot be decoded are counted, and when they stop a run."""

from __future__ import annotations

import pytest

from mmssl.data.decoding import Failures
from mmssl.errors import DataError
from mmssl.recipe import Data


def test_a_batch_that_is_read_again_counts_once():
    failures = Failures(Data(source="rows", max_bad=0.0))
    for _ in range(2):  # as the first one, after the last step and for the preview
        failures.add(1, range(15), [(3, "broken")])
    assert (failures.seen, failures.different) == (15, 1)
    with pytest.raises(DataError, match="rows: 1 of 30 rows cannot be decoded"):
        failures.add(2, range(15, 30), [])


@pytest.mark.parametrize(("allowed", "bad", "told"), [(0.01, 3, "0.1"), (0.01, 29, "0.97"), (0.1, 30, None)])
def test_a_row_counts_once_however_often_it_is_read_and_a_share_that_is_enough_is_told(allowed, bad, told):
    """1 of 30 is within chance of 1 %, and is so in every epoch; 3 of 30 are not, in the first or in a later one."""
    failures = Failures(Data(source="rows", max_bad=allowed), "x", rows=30, key="data.x.max_bad")
    for epoch in range(1, 101):
        failures.add(epoch, range(30), [(0, "broken")])
    with pytest.raises(DataError) as error:
        failures.add(101, range(30), [(row, "broken") for row in range(bad)])
    if told is None:
        assert str(error.value).startswith("rows: none of 30 rows can be decoded: row 0: broken; row 1: broken")
        assert "max_bad" not in str(error.value)
        return
    assert f"{bad} of 30 rows cannot be decoded, more than data.x.max_bad = {allowed}" in str(error.value)
    assert str(error.value).endswith(f"or raise data.x.max_bad to {told} (--set data.x.max_bad={told})")
    Failures(Data(source="rows", max_bad=float(told))).add(1, range(30), [(n, "") for n in range(bad)])


def test_a_source_of_few_rows_is_judged_once_an_epoch_was_seen():
    failures = Failures(Data(source="rows"), rows=8)
    failures.add(1, range(4), [(0, "broken"), (1, "broken")])
    with pytest.raises(DataError, match="rows: 2 of 8 rows cannot be decoded"):
        failures.add(2, range(4, 8), [])
