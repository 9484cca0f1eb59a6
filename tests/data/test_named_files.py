"""Columns that name files, of which none is there."""

import pytest
from made import png, write, write_csv

from mmssl.data.check import check
from mmssl.data.loader import Loader
from mmssl.errors import DataError
from mmssl.recipe import Data


def test_a_table_whose_files_are_elsewhere_is_refused_before_a_row_is_decoded(tmp_path):
    write(tmp_path / "photos/a.png", png(1))
    table = write_csv(tmp_path / "all.csv", {"file": ["a.png", "b.png"], "text": ["x", "y"]})
    spec = Data(source=str(table), columns={"image": "file"})
    sentence = r"2 files asked that column 'file' names is there.*photos/a.png has that name"
    with pytest.raises(DataError, match=sentence):
        Loader({"": spec}, ["image"], batch_size=2, seed=0)
    assert "photos/a.png has that name" in " ".join(check(spec).traps)
    write(tmp_path / "b.png", png(2))  # one that is there is enough
    assert Loader({"": spec}, ["image"], batch_size=2, seed=0).steps_per_epoch == 1


def test_names_without_an_extension_are_told_what_they_lack(tmp_path):
    write(tmp_path / "train/a1.png", png(1))
    table = write_csv(tmp_path / "train.csv", {"id": ["a1", "a2"], "label": ["x", "y"]})
    sentence = r"'id' names is there.*train/a1.png has that name and an extension: write the whole of it"
    with pytest.raises(DataError, match=sentence):
        Loader({"": Data(source=str(table), columns={"image": "id"})}, ["image"], batch_size=2, seed=0)


def test_a_column_that_was_asked_for_is_not_passed_over(tmp_path):
    write_csv(tmp_path / "all.csv", {"text": ["x", "y"]})
    with pytest.raises(DataError, match="no column 'caption'"):
        check(tmp_path / "all.csv", columns={"text": "caption"})


def test_parts_that_no_row_has_together_are_counted(tmp_path):
    write(tmp_path / "a.png", png(1))
    write_csv(tmp_path / "all.csv", {"image": ["a.png", ""], "label": ["", "x"]})
    with pytest.raises(DataError, match="of 2 rows 1 have image, 1 have label"):
        Loader({"": Data(source=str(tmp_path / "all.csv"))}, ["image", "label"], batch_size=2, seed=0)


def test_texts_where_paths_should_be_are_one_short_sentence(tmp_path):
    table = write_csv(tmp_path / "all.csv", {"image": ["a very long text " * 100] * 3})
    with pytest.raises(DataError, match="none of 3 files asked that column 'image' names is there") as error:
        Loader({"": Data(source=str(table))}, ["image"], batch_size=2, seed=0)
    assert len(str(error.value)) < 600
