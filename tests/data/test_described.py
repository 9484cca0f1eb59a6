"""Folders with a `metadata.csv`, as the builders of `datasets` for pictures, sounds and clips read them."""

from __future__ import annotations

import datasets
import pytest
from made import png, wav, write, write_csv, write_jsonl, write_parquet

from mmssl.data.sources import open_source
from mmssl.errors import DataError
from mmssl.recipe import Data

WRITERS = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_of_file_names_describes_the_files_next_to_it(tmp_path, kind):
    for number in range(4):
        write(tmp_path / f"{number}.png", png(number))
    columns = {
        "file_name": ["2.png", "0.png", "gone.png", "1.png"],
        "text": list("abcd"),
        "label": ["x", "y", "x", "x"],
    }
    WRITERS[kind](tmp_path / f"metadata.{kind}", columns)
    source = open_source(Data(source=str(tmp_path), streaming=True))
    assert [source.row(n)["text"] for n in range(len(source))] == ["a", "b", "d"]
    assert source.row(1) == {"text": "b", "label": "y", "image": str(tmp_path / "0.png")}
    assert source.notes[0] == (
        f"file_name of metadata.{kind} is read as image; 1 file has no line and is left out; "
        "1 line names a file that is not there"
    )
    named = open_source(Data(source=str(tmp_path), columns={"image": "file_name"}))
    assert (len(named), named.row(0)["file_name"]) == (4, str(tmp_path / "2.png"))


def test_splits_are_those_of_folders_and_classes_where_the_table_has_none(tmp_path):
    feature = datasets.Features({"file_name": datasets.Value("string"), "tone": datasets.ClassLabel(names=["a", "b"])})
    for split in ("train", "test"):
        for name in ("low/0.wav", "high/1.wav"):
            write(tmp_path / split / name, wav(0.1))
        rows = {"file_name": ["low/0.wav", "high/1.wav"], "tone": [0, 1]}
        datasets.Dataset.from_dict(rows, feature).to_parquet(tmp_path / split / "metadata.parquet")
    source = open_source(Data(source=str(tmp_path), split="test"))
    assert source.splits == ("test", "train")
    assert source.row(1) == {"tone": 1, "audio": str(tmp_path / "test" / "high" / "1.wav"), "label": "high"}
    assert source.class_names("tone") == ["a", "b"]
    assert "folders are read as classes: high, low" in source.notes
    assert not any("line" in note for note in source.notes)


def test_a_table_that_names_none_of_the_files_is_one_sentence_and_one_without_names_a_table(tmp_path):
    write(tmp_path / "0.png", png(0))
    write_csv(tmp_path / "metadata.csv", {"file_name": ["a.png"]})
    with pytest.raises(
        DataError, match=r"no file_name in metadata\.csv is the path from the folder .*, such as .*0\.png"
    ):
        open_source(Data(source=str(tmp_path)))
    write_csv(tmp_path / "metadata.csv", {"file_name": [".\\0.png"]})
    assert open_source(Data(source=str(tmp_path))).columns == ("image",)
    write_csv(tmp_path / "metadata.csv", {"name": ["a.png"]})
    assert open_source(Data(source=str(tmp_path))).columns == ("name",)
