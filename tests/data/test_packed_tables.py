"""Tables that are compressed, or named otherwise than by the extension that is theirs."""

import bz2
import gzip
import importlib.util
import json
import lzma

import pytest
from made import texts, write, write_csv, write_jsonl, write_shards

from mmssl.data.files import parted
from mmssl.data.sources import open_source
from mmssl.errors import DataError
from mmssl.recipe import Data

PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def rows(source, streaming=False, **settings):
    source = open_source(Data(source=str(source), streaming=streaming, **settings))
    return list(source.rows()) if streaming else [source.row(i) for i in range(len(source))]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", PACKED)
def test_packed_tables_are_tables(tmp_path, packing, streaming):
    for split, first in (("train", 0), ("test", 10)):
        made = write_jsonl(tmp_path / f"{split}.jsonl", texts(3, first))
        write(tmp_path / f"{split}.jsonl.{packing}", PACKED[packing](made.read_bytes()))
        made.unlink()
    assert [row["text"] for row in rows(tmp_path, streaming, split="test")] == ["row 10", "row 11", "row 12"]
    assert len(rows(tmp_path / f"train.jsonl.{packing}", streaming)) == 3


def test_how_a_packed_csv_parts_its_columns_and_its_codes(tmp_path):
    write(tmp_path / "a.csv.gz", gzip.compress(b"text;label\na;007\nb;7\n"))
    assert [row["label"] for row in rows(tmp_path)] == ["007", "7"]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz"])
def test_packed_shards(tmp_path, name):
    write_shards(tmp_path / "made", 1, 2)
    write(tmp_path / "set" / name, gzip.compress((tmp_path / "made/part-000.tar").read_bytes()))
    assert [row["txt"] for row in rows(tmp_path / "set")] == ["row 0", "row 1"]


def test_json_is_a_table_where_nothing_else_is(tmp_path):
    write(tmp_path / "a.json", json.dumps([{"text": "a"}, {"text": "b"}]))
    assert [row["text"] for row in rows(tmp_path)] == ["a", "b"] == [row["text"] for row in rows(tmp_path / "a.json")]
    write_csv(tmp_path / "b.csv", texts(3))
    assert len(rows(tmp_path)) == 3
    write_jsonl(tmp_path / "more/c.ndjson", texts(2))
    assert len(rows(tmp_path / "more")) == 2


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.txt.xz", "c.tar.gz", "d.csv.gz"])
def test_a_damaged_one_is_named(tmp_path, name):
    write(tmp_path / "set" / name, b"\xfd7zXZ\x00 neither this nor that")
    with pytest.raises(DataError, match=r"set.*cannot be read"):
        open_source(Data(source=str(tmp_path / "set")))


@pytest.mark.skipif(importlib.util.find_spec("zstandard") is not None, reason="zstandard is installed")
def test_what_reads_zstd_is_said(tmp_path):
    write(tmp_path / "a.jsonl.zst", b"(\xb5/\xfd")
    with pytest.raises(DataError, match="pip install zstandard"):
        open_source(Data(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "a.JSONL.GZ": ("a", ".jsonl"),
        "train.v2.csv": ("train.v2", ".csv"),
        "a.png.gz": ("a.png", ".gz"),
        "https://host/a.parquet?download=true": ("a", ".parquet"),
        "here/what?.csv": ("what?", ".csv"),
    }.items(),
)
def test_name_and_extension(name, parts):
    assert parted(name) == parts
