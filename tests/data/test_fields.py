"""Columns that hold several values a row: each is read by its name, and where none is named they are listed."""

from __future__ import annotations

import datasets
import pytest
from made import Letters, png

from mmssl.data.check import check
from mmssl.data.loader import read
from mmssl.data.sources import open_source
from mmssl.errors import DataError
from mmssl.recipe import Data

ROWS = {
    "caption": [{"raw": "x", "en": f"row {n}"} for n in range(24)],
    "picture": [{"data": png(n), "at": {"side": n}} for n in range(24)],
}


@pytest.fixture
def path(tmp_path):
    datasets.Dataset.from_dict(ROWS).to_parquet(tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def test_a_field_of_a_column_is_a_column_where_it_is_named(path):
    columns = {"text": "caption.en", "image": "picture.data", "label": "picture.at.side"}
    spec = Data(source=path, columns=columns, limit=2)
    source = open_source(spec)
    assert source.columns == ("caption", "picture", "caption.en", "picture.data", "picture.at.side")
    assert [source.row(n)["caption.en"] for n in range(len(source))] == ["row 0", "row 12"]
    (batch,) = read(spec, ("text", "image"), label="picture.at.side", tokenizers={"text": Letters()})
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 12]
    assert batch["label"].tolist() == [0, 1]


def test_the_check_lists_fields_of_columns_that_nothing_is_taken_from(path):
    assert check(path).notes[0] == (
        "column 'caption' holds several values a row, each of which can be named: caption.raw, caption.en"
    )
    assert check(path, columns={"text": "caption.en"}).facts["text"] == ["2 to 2 words, median 2"]


def test_fields_are_listed_where_none_or_another_is_named(path):
    with pytest.raises(DataError, match=r"column 'caption' has no field 'fr'; it has: caption\.raw, caption\.en"):
        open_source(Data(source=path, columns={"text": "caption.fr"}))
    with pytest.raises(DataError, match=r"'caption\.en' is a field of a column, which a stream does not read"):
        open_source(Data(source=path, columns={"text": "caption.en"}, streaming=True))
    for key, column, said in (
        (
            "text",
            "caption",
            r"it holds dict; name one of its fields with data\.columns\.text: caption\.raw, caption\.en",
        ),
        ("image", "picture", r"cannot read image from dict of data, at, of which COLUMN\.FIELD names one"),
    ):
        spec = Data(source=path, columns={key: column}, max_bad=0)
        with pytest.raises(DataError, match=said):
            next(read(spec, (key,), tokenizers={"text": Letters()}))
