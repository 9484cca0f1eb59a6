"""Few labels: so many a class, or a share of all."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mmssl.recipe import Probe
from mmssl.shots import quotas, read_shots, shots_in_words, with_rows


@pytest.mark.parametrize(
    ("given", "read", "words"),
    [
        (10, 10, "10 a class"),
        ("10", 10, "10 a class"),
        ("1%", "1%", "1 % of labels"),
        (" 0.50 % ", "0.5%", "0.5 % of labels"),
        ("100%", "100%", "100 % of labels"),
    ],
)
def test_numbers_are_rows_a_class_and_percentages_shares(given, read, words):
    assert read_shots(given) == read
    assert shots_in_words(read) == words


@pytest.mark.parametrize("given", [0, -1, True, 0.1, "ten", "0%", "101%", "-1%", "nan%", "inf%", "1%%", "1e999%", ""])
def test_what_is_neither_is_refused(given):
    with pytest.raises(ValueError, match="should be rows a class, as 10, or a share of the labeled rows, as 1%"):
        read_shots(given)


@pytest.mark.parametrize(
    ("shots", "sizes", "expected"),
    [
        (5, [50, 3], [5, 3]),
        ("10%", [100, 20, 5], [10, 2, 1]),  # at least one
        ("1%", [149] * 10, [2, 2, 2, 2, 2, 1, 1, 1, 1, 1]),  # 15 rows of 1,490, not the 10 of rounding each
        ("29%", [100], [29]),  # 28.999... in floating point
        ("100%", [7, 1, 0], [7, 1, 0]),
        ("0.1%", [20, 30], [1, 1]),
    ],
)
def test_a_share_of_each_class_adds_up_to_that_of_all(shots, sizes, expected):
    assert quotas(shots, sizes) == expected


def test_a_share_is_told_with_its_rows():
    assert with_rows("ridge, 1 % of labels", [24, 24]) == "ridge, 1 % of labels (24 rows)"
    assert with_rows("ridge, 1 % of labels", [1]) == "ridge, 1 % of labels (1 row)"
    assert with_rows("ridge, 1 % of labels", [1200, 1150]) == "ridge, 1 % of labels (1,150 to 1,200 rows)"
    assert with_rows("ridge, 10 a class", [80]) == "ridge, 10 a class"


def test_a_recipe_may_say_either():
    assert Probe(shots="1 %").shots == "1%"
    assert Probe(shots=5).shots == 5
    with pytest.raises(ValidationError, match="should be rows a class, as 10, or a share of the labeled rows, as 1%"):
        Probe(shots=0)
