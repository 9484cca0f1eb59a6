"""What a column of labels is read as, and what is said where it may be meant otherwise."""

import pytest

from mmssl.adaptation.readings import doubts, read_lists


@pytest.mark.parametrize(
    ("cells", "lists"),
    [
        (['["a", "b"]', "[]"], [["a", "b"], []]),
        (["['a', 'b']", " ['b']"], [["a", "b"], ["b"]]),  # as pandas writes them
        (["[0.5, 1]", "[2, 3]"], [[0.5, 1], [2, 3]]),
        (["[a]", '["b"]'], None),  # a name
        (["[__import__('os')]", "[]"], None),  # no code is run
        (["[" * 9000, "[]"], None),
        (["a", "b"], None),
        ([["a"], ["b"]], None),
    ],
)
def test_lists_that_are_written_as_text_are_lists(cells, lists):
    found, notes = read_lists(cells, "y", marks=True)
    assert found == (cells if lists is None else lists)
    assert notes == ([] if lists is None else ["'y' holds lists that are written as text, and is read as lists"])


@pytest.mark.parametrize(
    ("cells", "marks"),
    [
        ([[1, 0, 1], [0, 1, 0]], [[True, False, True], [False, True, False]]),
        ([[1, 1], [0, 1]], [[True, True], [False, True]]),
        ([[1.0, 0.0], [0.0, 1.0]], [[True, False], [False, True]]),
        (["[1, 0, 0]", "[0, 0, 1]"], [[True, False, False], [False, False, True]]),
        ([[1, 0], [0, 1]], None),  # two labels, each once
        ([[0, 1], [1]], None),
        ([[0, 1, 2], [0, 0, 1]], None),
        ([[0.5, 1.0], [0.0, 1.0]], None),
        ([[0], [1]], None),
        ([], None),
    ],
)
def test_zeros_and_ones_mark_labels_by_their_places(cells, marks):
    found, notes = read_lists(cells, "y", marks=True)
    assert found == (cells if marks is None else marks)
    assert all(type(mark) is bool for cell in found for mark in cell) or marks is None
    assert ("read as marks of labels 0 to" in "".join(notes)) == (marks is not None)


def test_zeros_and_ones_are_numbers_where_values_are_asked_for():
    cells = [[1, 0, 1], [0, 1, 0]]
    assert read_lists(cells, "y", marks=False) == (cells, [])


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (["cat", "Cat ", "dog"], "differ in spaces or capitals alone, read as classes of their own: 'cat' and 'Cat '"),
        (["a  b", "a b"], "'a  b' and 'a b'"),
        (["a", "nan", "None", "nan"], "'y' holds 'nan', 'None' in 3 rows"),
        (["a;b", "a", "b"], "names such as 'a;b', read as one class each"),
        (["a, b", "b, c"], "names such as 'a, b'"),
        (["shirt, red", "shoe"], None),
        (["cat", "dog"], None),
        ([0, 1, -1, -1], "'y' holds -1 in 2 rows, read as a class like others"),
        ([-1, 1], None),
        ([True, False], None),
        ([0.5, 1.0], None),
    ],
)
def test_what_may_be_meant_otherwise_is_said(cells, told):
    found = doubts(cells, "y")
    assert len(found) == (told is not None)
    assert told is None or told in found[0]
