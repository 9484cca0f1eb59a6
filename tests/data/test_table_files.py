"""Tables and shards as people write them: marks, cells and rows that are too many or missing."""

from __future__ import annotations

import io
import tarfile

import datasets
import pytest
import torch
from made import Letters, png, texts, write, write_csv, write_parquet

from mmssl.data.csv_files import reading
from mmssl.data.loader import Loader, read
from mmssl.data.sources import open_source
from mmssl.data.stored import explained
from mmssl.data.stream import StreamSource
from mmssl.errors import DataError
from mmssl.recipe import Data


def shard(path, samples):
    with tarfile.open(path, "w") as file:
        for key, parts in samples.items():
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


@pytest.mark.quick(1)
@pytest.mark.parametrize("streaming", [False, True])
def test_shards_whose_samples_differ_in_their_parts(tmp_path, streaming):
    samples = {f"{n:03d}": {"jpg": png(n), "txt": f"row {n}".encode()} for n in range(130)}
    samples["001"] = {"png": png(1), "txt": b"row 1"}  # among the first
    samples["004"] = {"JPG": png(4), "txt": b"row 4"}
    samples["121"] = {"JPEG": png(121), "txt": b"row 121"}
    samples["120"] = {"webp": png(120), "txt": b"row 120"}  # where nobody looks for columns
    del samples["002"]["txt"]
    samples["003"] = {"txt": b"row 3"}
    shard(tmp_path / "a.tar", samples)
    spec = Data(source=str(tmp_path), streaming=streaming, max_bad=0)
    source = open_source(spec)
    assert "png" not in source.columns
    cells = {"image": list(source.values("jpg")), "text": list(source.values("txt"))}
    assert [n for n, cell in enumerate(cells["image"]) if cell != png(n)] == [3]
    assert [n for n, cell in enumerate(cells["text"]) if cell != f"row {n}"] == [2]
    batches = list(read(spec, ("image", "text"), tokenizers={"text": Letters()}, batch_size=50))
    assert sum(len(batch["id"]) for batch in batches) == 128
    loader = Loader({"": spec}, ("image", "text"), batch_size=32, seed=0, tokenizers={"text": Letters()})
    assert len(list(loader.batches(0, 8))) == 8


@pytest.mark.quick(1)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("cells", "found"), [(["cat", "dog"], ["cat", "dog"]), (["7", "dog\n"], ["7", "dog"])])
def test_classes_of_shards_may_be_names(tmp_path, streaming, cells, found):
    shard(tmp_path / "a.tar", {f"{n:03d}": {"png": png(n), "cls": cells[n % 2].encode()} for n in range(120)})
    spec = Data(source=str(tmp_path), streaming=streaming, max_bad=0)
    assert list(open_source(spec).values("cls")) == found * 60
    batches = list(Loader({"": spec}, ("image", "label"), batch_size=30, seed=0).batches(0, 4))
    assert torch.cat([batch["label"] for batch in batches]).unique().tolist() == [0, 1]


def test_a_stream_leaves_out_rows_that_lack_a_part_and_goes_on_the_same(tmp_path):
    rows = texts(60)
    rows["text"] = [None if n % 3 == 0 else text for n, text in enumerate(rows["text"])]
    write_parquet(tmp_path / "train.parquet", rows)
    spec = Data(source=str(tmp_path), streaming=True, max_bad=0, shuffle_buffer=10)
    source = open_source(spec)
    assert isinstance(source, StreamSource)
    assert source.present(["text"]).count() == 40
    assert [row["text"] for row in source.present(["text"]).rows()][3:5] == ["row 5", "row 7"]
    loader = Loader({"": spec}, ("text",), batch_size=8, seed=0, tokenizers={"text": Letters()})
    whole = [batch["text"].tolist() for batch in loader.batches(0, 10)]
    assert [batch["text"].tolist() for batch in loader.batches(4, 10)] == whole[4:]


@pytest.mark.parametrize(("mark", "name"), [(";", "a.csv"), ("\t", "a.tsv"), (",", "a.csv"), ("\t", "a.csv")])
def test_how_a_csv_parts_its_columns_is_read_from_its_head(tmp_path, mark, name):
    text = "one" if mark == "," else "one, two"
    write(tmp_path / name, f"text{mark}kind\n{text}{mark}a\n")
    assert open_source(Data(source=str(tmp_path))).row(0) == {"text": text, "kind": "a"}
    assert list(open_source(Data(source=str(tmp_path / name), streaming=True)).rows()) == [{"text": text, "kind": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.tsv", "caption, english\tkind\nhello\ta\n", ("caption, english", "kind")),
        ("a.csv", "text (free, short);kind\nhello, there;a\nbye;b\n", ("text (free, short)", "kind")),
        ("a.csv", '"text, free";"kind"\n"hello, there";a\n', ("text, free", "kind")),
        ("a.csv", 'text,kind\n"one; two\nlines; more",a\n', ("text", "kind")),
        ("a.csv", '\ufeff"a;b","c"\n1,2\n', ("a;b", "c")),
        ("a.csv", "text\nonly one\n", ("text",)),
    ],
)
def test_a_mark_inside_of_a_name_parts_no_columns(tmp_path, name, content, columns):
    write(tmp_path / name, content)
    assert open_source(Data(source=str(tmp_path))).columns == columns


@pytest.mark.parametrize("streaming", [False, True])
def test_cells_without_a_name_shift_no_columns(tmp_path, streaming):
    write(tmp_path / "a.csv", "text,kind\nhello,a,\nbye,b,\n")
    with pytest.raises(DataError, match=r"a\.csv: rows have more cells than the first line has names"):
        open_source(Data(source=str(tmp_path / "a.csv"), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_shard_that_is_cut_short_is_one_sentence(tmp_path, streaming):
    shard(tmp_path / "a.tar", {str(n): {"png": png(n), "txt": b"word"} for n in range(3)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match="unexpected end of data"):
        open_source(Data(source=str(tmp_path / "a.tar"), streaming=streaming))


@pytest.mark.parametrize("name", ["a.csv", "b.csv", "a.jsonl", "b.jsonl", "a.parquet", "a.tar"])
def test_a_file_without_rows_is_said_to_be_one(tmp_path, name):
    if name == "a.parquet":
        datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / name)
    elif name == "a.tar":
        shard(tmp_path / name, {})
    else:
        write(tmp_path / name, {"a.csv": "text,label\n", "b.csv": "", "a.jsonl": "\n", "b.jsonl": ""}[name])
    with pytest.raises(DataError, match=rf"{name} holds no rows$"):
        open_source(Data(source=str(tmp_path / name)))


@pytest.mark.parametrize("streaming", [False, True])
def test_codes_that_begin_with_a_zero_are_no_numbers(tmp_path, streaming):
    columns = {"code": ["7", "007", "", "12"], "day": ["2020-01-05", "2020-02-07", "2021-03-01", "2021-04-01"]}
    write_csv(tmp_path / "all.csv", columns | {"share": ["0.5", "0.25", "1", "2"], "number": ["0", "10", "20", "3"]})
    source = open_source(Data(source=str(tmp_path / "all.csv"), streaming=streaming))
    rows = list(source.rows()) if streaming else [source.row(i) for i in range(4)]
    assert [row["code"] for row in rows] == ["7", "007", None, "12"]
    assert [row["number"] for row in rows] == [0, 10, 20, 3]
    assert [row["share"] for row in rows] == [0.5, 0.25, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_in_one_file_and_names_in_another_are_names(tmp_path, streaming):
    write_csv(tmp_path / "a.csv", {"text": ["a", "b"], "label": [1, 2], "size": [1, 2]})
    write_csv(tmp_path / "b.csv", {"text": ["c"], "label": ["x"], "size": [3]})
    source = open_source(Data(source=str(tmp_path), streaming=streaming))
    rows = list(source.rows()) if streaming else [source.row(i) for i in range(3)]
    assert [row["label"] for row in rows] == ["1", "2", "x"]
    assert [row["size"] for row in rows] == [1, 2, 3]


def test_names_after_many_numbers_are_names(tmp_path, monkeypatch):
    monkeypatch.setattr("mmssl.data.csv_files.PART", 2)
    write_csv(tmp_path / "a.csv", {"text": ["a", "b", "c"], "label": [1, 2, "x"]})
    assert list(reading([str(tmp_path / "a.csv")], ",")["converters"]) == ["label"]


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_one_row_are_read_by_the_names_of_their_columns(tmp_path, streaming):
    write_csv(tmp_path / "a.csv", {"text": ["a"], "label": ["x"]})
    write_csv(tmp_path / "b.csv", {"label": ["y"], "text": ["b"]})
    write_csv(tmp_path / "c.csv", {"label": ["z", "z"], "text": ["c", "d"]})
    source = open_source(Data(source=str(tmp_path), streaming=streaming))
    rows = list(source.rows()) if streaming else [source.row(i) for i in range(4)]
    assert [row["text"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["label"] for row in rows] == ["x", "y", "z", "z"]


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_files_among_others_are_named(tmp_path, streaming):
    write_csv(tmp_path / "a.csv", {"text": ["a"]})
    write(tmp_path / "b.csv", "")
    write(tmp_path / "c.csv", "\n")
    with pytest.raises(DataError, match=r"b\.csv, .*c\.csv: empty, without the line of names .* or bring it back$"):
        open_source(Data(source=str(tmp_path), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "first", "second", "sentence"),
    [
        ("csv", "text\na\n", "text\na,1\n", "b.csv: rows have more cells"),
        ("csv", "text,kind\na,b\n", "name\nc\n", "its files differ in columns|some of its files have no column"),
        ("jsonl", '{"text": "a"}\n', '{"text": "b\n', "b.jsonl: cannot be read: .*each line should be an object"),
        ("parquet", {"text": ["a"]}, {"text": ["a"], "kind": ["b"]}, "b.parquet: .*its columns are text, kind"),
        ("parquet", {"text": ["a"]}, {"text": [{"en": "a"}]}, "b.parquet: cannot be read: Couldn't cast"),
        ("parquet", {"text": ["a"]}, "PAR1", "b.parquet: cannot be read"),
    ],
)
def test_which_of_several_files_cannot_be_read(tmp_path, name, first, second, sentence, streaming):
    for letter, content in (("a", first), ("b", second)):
        path = tmp_path / f"{letter}.{name}"
        write_parquet(path, content) if isinstance(content, dict) else write(path, content)
    with pytest.raises(DataError, match=sentence):
        list(open_source(Data(source=str(tmp_path), streaming=streaming)).values("text"))


def test_the_member_of_a_shard_that_cannot_be_read_is_named(tmp_path):
    shard(tmp_path / "a.tar", {str(n): {"png": png(n), "json": b"{}" if n else b"{broken"} for n in range(2)})
    with pytest.raises(DataError, match=r"0\.json: cannot be read"):
        open_source(Data(source=str(tmp_path / "a.tar")))


READER = """
def anyhow(it):
    raise ValueError("odd")
"""


def test_the_file_that_was_read_is_told_whatever_its_reader_calls_it(tmp_path):
    reader = {"__name__": "datasets.packaged_modules.other"}
    exec(READER, reader)
    with pytest.raises(DataError, match=r"^several: b\.csv: cannot be read: odd$"), explained("several"):
        reader["anyhow"](str(write(tmp_path / "b.csv", "text\na\n")))
