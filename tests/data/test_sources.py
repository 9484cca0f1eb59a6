"""Every kind of source gives the same rows in the same order, and says in one sentence what is wrong."""

from __future__ import annotations

import pickle

import datasets
import numpy as np
import pytest
from made import png, texts, wav, write, write_arrow, write_csv, write_jsonl, write_parquet, write_shards

from mmssl.data.base import MapSource
from mmssl.data.files import expand
from mmssl.data.sources import TableSource, open_source
from mmssl.data.stream import StreamSource
from mmssl.errors import DataError
from mmssl.recipe import Data

WRITERS = {"parquet": write_parquet, "csv": write_csv, "jsonl": write_jsonl, "arrow": write_arrow}


def rows_of(source):
    if isinstance(source, StreamSource):
        return list(source.rows())
    return [source.row(i) for i in range(len(source))]


@pytest.mark.quick(4)
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_give_their_rows_in_order(tmp_path, kind, streaming):
    for name, first in (("train", 0), ("test", 100)):
        WRITERS[kind](tmp_path / f"{name}.{kind}", texts(40, first))
    for split, first in (("train", 0), ("test", 100)):
        source = open_source(Data(source=str(tmp_path), split=split, streaming=streaming))
        assert isinstance(source, StreamSource) is streaming
        assert source.columns == ("text", "kind")
        assert [row["text"] for row in rows_of(source)] == texts(40, first)["text"]
        assert list(source.values("kind")) == texts(40, first)["kind"]
        assert source.select(["kind"]).columns == ("kind",)
        assert rows_of(source.select(["kind"]))[7] == {"kind": "abc"[(first + 7) % 3]}


def test_a_file_named_outright_is_the_split_asked_for(tmp_path):
    write_parquet(tmp_path / "test.parquet", texts(10))
    assert len(open_source(Data(source=str(tmp_path / "test.parquet")))) == 10
    assert len(open_source(Data(source=str(tmp_path / "*.parquet"), split="train[:30%]"))) == 3
    with pytest.raises(DataError, match="has no split 'train'; it has: test"):
        open_source(Data(source=str(tmp_path)))


def test_shards_of_a_glob_are_one_source_in_order(tmp_path):
    for part in range(3):
        write_parquet(tmp_path / "data" / f"train-{part:05d}-of-00003.parquet", texts(5, 5 * part))
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", texts(4, 100))
    for where in (
        tmp_path,
        tmp_path / "data" / "train-*.parquet",
        tmp_path / "data" / "train-{00000..00002}-of-00003.parquet",
    ):
        assert list(open_source(Data(source=str(where))).values("text")) == texts(15)["text"]
    assert len(open_source(Data(source=str(tmp_path), split="validation"))) == 4


def test_limit_spreads_over_a_table_and_cuts_a_stream(tmp_path):
    write_parquet(tmp_path / "train.parquet", texts(100))
    table = open_source(Data(source=str(tmp_path), limit=10))
    assert list(table.values("text")) == [f"row {n}" for n in range(0, 100, 10)]
    stream = open_source(Data(source=str(tmp_path), limit=10, streaming=True))
    assert list(stream.values("text")) == texts(10)["text"]
    assert len(open_source(Data(source=str(tmp_path), limit=1000))) == 100


def test_rows_with_a_null_are_not_present(tmp_path):
    columns = texts(10) | {"image": [None if n in (2, 5) else {"bytes": png(n), "path": None} for n in range(10)]}
    source = open_source(Data(source=str(write_parquet(tmp_path / "a.parquet", columns))))
    assert source.present(["image", "text"]).tolist() == [0, 1, 3, 4, 6, 7, 8, 9]
    assert source.present(["text"]).tolist() == list(range(10))
    assert source.present([]).tolist() == list(range(10))


def test_pictures_in_a_data_set_stay_undecoded():
    data = datasets.Dataset.from_dict({"image": [png(3), png(4)]}).cast_column("image", datasets.Image())
    source = TableSource(data)
    assert source.row(1)["image"]["bytes"] == png(4)
    assert pickle.loads(pickle.dumps(source)).row(0)["image"]["bytes"] == png(3)


def test_sounds_need_no_torchcodec(tmp_path):
    raw = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    data = datasets.Dataset.from_dict(
        {"audio": [{"bytes": wav(0.5), "path": None}] * 3}, features=datasets.Features({"audio": raw})
    )
    data = data.cast_column("audio", datasets.Audio(decode=False))
    data.info.features["audio"].decode = True
    data.to_parquet(tmp_path / "train.parquet")
    for streaming in (False, True):
        source = open_source(Data(source=str(tmp_path), streaming=streaming))
        assert rows_of(source)[0]["audio"]["bytes"] == wav(0.5)


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_shards(tmp_path, streaming):
    write_shards(tmp_path, shards=2, rows=6)
    for where in (str(tmp_path), str(tmp_path / "*.tar"), str(tmp_path / "part-{000..001}.tar")):
        source = open_source(Data(source=where, streaming=streaming))
        assert {"png", "wav", "txt", "cls"} <= set(source.columns)
        rows = rows_of(source)
        assert [row["txt"] for row in rows] == [f"row {n}" for n in range(12)]
        assert [row["cls"] for row in rows] == [n % 3 for n in range(12)]
        cell = rows[7]["wav"]
        assert (cell["bytes"] if isinstance(cell, dict) else cell) == wav(0.07)


def test_folder_of_pictures_without_classes(tmp_path):
    for n in range(5):
        write(tmp_path / f"{n}.PNG", png(n))
    write(tmp_path / "notes.md", "not a picture")
    write(tmp_path / ".hidden" / "6.png", png(6))
    source = open_source(Data(source=str(tmp_path)))
    assert source.columns == ("image",)
    assert [row["image"] for row in rows_of(source)] == [str(tmp_path / f"{n}.PNG") for n in range(5)]
    assert len(open_source(Data(source=str(tmp_path), split="train[80%:]"))) == 1
    with pytest.raises(DataError, match="has no split 'test'; it has: train"):
        open_source(Data(source=str(tmp_path), split="test"))


def test_folder_of_classes_and_splits(tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        for label in ("cat", "dog"):
            for n in range(count):
                write(tmp_path / split / label / "deeper" / f"{n}.png", png(n))
    for split, count in (("train", 4), ("validation", 2), ("test", 1)):
        source = open_source(Data(source=str(tmp_path), split=split))
        assert list(source.values("label")) == ["cat"] * count + ["dog"] * count


def test_a_class_may_be_called_train(tmp_path):
    for label in ("car", "train"):
        write(tmp_path / label / "0.png", png(0))
    assert list(open_source(Data(source=str(tmp_path))).values("label")) == ["car", "train"]


def test_a_clip_is_sound_and_pictures(tmp_path):
    for name in ("a.png", "b.wav", "c.mp4"):
        write(tmp_path / name, b"")
    source = open_source(Data(source=str(tmp_path)))
    assert source.columns == ("image", "audio", "video")
    assert source.present(["image"]).tolist() == [0]
    assert source.present(["audio"]).tolist() == [1, 2]
    assert source.present(["audio", "video"]).tolist() == [2]
    assert source.row(2)["audio"] == source.row(2)["video"] == str(tmp_path / "c.mp4")


@pytest.mark.parametrize("streaming", [False, True])
def test_text_files_give_a_row_a_line(tmp_path, streaming):
    write(tmp_path / "a.txt", "one\n\n  \ntwo\n")
    write(tmp_path / "deep" / "test_results.txt", "three")
    source = open_source(Data(source=str(tmp_path), streaming=streaming))
    assert list(source.values("text")) == ["one", "two", "three"]
    one = open_source(Data(source=str(tmp_path / "a.txt"), streaming=streaming))
    assert list(one.values("text")) == ["one", "two"]


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_in_a_table_are_relative_to_it(tmp_path, streaming):
    write(tmp_path / "pictures" / "0.png", png(0))
    write_csv(tmp_path / "all.csv", {"file": ["pictures/0.png"], "text": ["pictures/0.png"]})
    source = open_source(Data(source=str(tmp_path / "all.csv"), columns={"image": "file"}, streaming=streaming))
    assert rows_of(source)[0] == {"file": str(tmp_path / "pictures/0.png"), "text": "pictures/0.png"}


def test_toy_world():
    source = open_source(Data(source="toy", limit=5))
    assert isinstance(source, MapSource)
    assert len(source) == 5
    assert len(set(source.values("text"))) > 1
    assert source.select(["image"]).present(["image"]).tolist() == list(range(5))
    with pytest.raises(DataError, match="no split 'tset'"):
        open_source(Data(source="toy", split="tset"))


def test_what_is_wrong_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_csv(tmp_path / "both" / "a.csv", texts(2))
    write_jsonl(tmp_path / "both" / "b.jsonl", texts(2))
    write(tmp_path / "broken.parquet", b"PAR1 no parquet")
    write_parquet(tmp_path / "good" / "train.parquet", texts(4))
    write_csv(tmp_path / "uneven" / "a.csv", texts(4))
    write_csv(tmp_path / "uneven" / "b.csv", texts(4) | {"more": [1, 2, 3, 4]})
    for source, words in {
        "/no/such/folder": "there is no such file or folder",
        "nothing.parquet": "there is no such file or folder",
        "$NO_SUCH_PLACE/emoji": r"there is no such file or folder \(set NO_SUCH_PLACE, which the environment lacks\)",
        "missing/*.tar": "there is no such file or folder",
        "empty": "holds no usable file; known are .parquet",
        "both": r"several kinds \(csv, json\)",
        "both/*": r"expected files of one kind .* found \.csv, \.jsonl",
        "broken.parquet": "broken.parquet: cannot be read: ",
        "uneven": r"uneven: cannot be read: its files differ in columns, b.csv has 1 new columns .*name one file$",
    }.items():
        with pytest.raises(DataError, match=words) as error:
            open_source(Data(source=source))
        assert "\n" not in str(error.value)
    for streaming in (False, True):
        with pytest.raises(DataError, match="has no split 'dev'; it has: train"):
            open_source(Data(source="good", split="dev", streaming=streaming))


def test_other_names_are_taken_for_data_sets_on_the_hub(monkeypatch, tmp_path):
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", texts(3))
    asked = {}
    real = datasets.load_dataset

    def load(path, name=None, **arguments):
        asked.update(path=path, name=name, **arguments)
        return real(str(tmp_path), **arguments)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for streaming in (False, True):
        source = open_source(Data(source="user/set", config="small", split="test", streaming=streaming))
        assert asked == {"path": "user/set", "name": "small", "split": "test", "streaming": streaming}
        assert list(source.values("text")) == texts(3)["text"]
        with pytest.raises(DataError, match=r"[Ss]plit.*test"):
            open_source(Data(source="user/set", split="train", streaming=streaming))

    def fail(path, **arguments):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"taken for a data set on the Hub; --data or data.source .*no network"):
        open_source(Data(source="user/set"))


def test_brace_lists():
    assert expand("s3://b/{008..010}.{tar,x}") == [
        f"s3://b/{n}.{e}" for n in ("008", "009", "010") for e in ("tar", "x")
    ]


def test_values_of_a_table_agree_with_its_rows(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"n": list(range(2500))})
    source = open_source(Data(source=str(tmp_path)))
    assert np.array_equal(list(source.values("n")), [source.row(i)["n"] for i in range(2500)])


@pytest.mark.parametrize("streaming", [False, True])
def test_different_cells_are_found_without_reading_each_as_an_object(tmp_path, streaming):
    columns = {"kind": [*"abca", None] * 50, "n": [*range(5)] * 50, "tags": [[1], [2], [1], [], None] * 50}
    source = open_source(Data(source=str(write_parquet(tmp_path / "a.parquet", columns)), streaming=streaming))
    for column in ("kind", "n"):
        found = list(source.distinct(column))
        assert len(found) == len({*found})
        assert {*found} == {*columns[column]}
    assert next(source.distinct("tags")) == [1]
    write_shards(tmp_path / "shards", shards=2, rows=6)
    shards = open_source(Data(source=str(tmp_path / "shards"), streaming=streaming))
    assert {*shards.distinct("cls")} == {0, 1, 2}
    assert len([*shards.distinct("png")]) == 12  # one of several columns
