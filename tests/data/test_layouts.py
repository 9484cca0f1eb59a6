"""Files and folders as people have them: splits, classes and what is left out are told by names, and said."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from made import Letters, png, texts, wav, write, write_csv, write_jsonl, write_parquet

from mmssl.data.files import EXTENSIONS, media_layout, split_in, walk
from mmssl.data.loader import Loader, read
from mmssl.data.sources import StreamSource, open_source
from mmssl.errors import DataError
from mmssl.recipe import Data

TABLES = {
    "emoji_train": "train",
    "emoji_test": "test",
    "flickr_val": "validation",
    "captions_train2017": "train",
    "val2017_captions": "validation",
    "eval": "validation",
    "Train": "train",
    "test-00000-of-00002": "test",
    "train-00000-of-00001-4f1b2c3d": "train",
    "cc.dev": "validation",
    "a_valid_003": "validation",
    "training": "train",
    "testing-set": "test",
    # No word of its own, or not at an end.
    "photo of a train": None,
    "latest": None,
    "trainer_notes": None,
    "contest_2020": None,
    "all_test_cases_merged": None,
    "evaluate": None,
}


@pytest.mark.parametrize("stem", TABLES)
def test_the_name_of_a_table_tells_its_split(stem):
    assert split_in(stem) == TABLES[stem]


@pytest.mark.parametrize(
    ("names", "writer"),
    [
        (("emoji_train.parquet", "emoji_test.parquet"), write_parquet),
        (("flickr_train.jsonl", "flickr_val.jsonl"), write_jsonl),
        (("captions_train2017.csv", "captions_val2017.csv"), write_csv),
        (("train.jsonl", "eval.jsonl"), write_jsonl),
        (("train/a.parquet", "dev/a.parquet"), write_parquet),
        (("my.train.small.csv", "my.test.small.csv"), write_csv),
        (("2021_train_v2.csv", "2021_test_v2.csv"), write_csv),
        (("trainset.jsonl", "testset.jsonl"), write_jsonl),
        (("trainval.csv", "test.csv"), write_csv),
        (("cats_train.csv", "cats_holdout.csv"), write_csv),
        (("sub_train_a/x.csv", "sub_test_a/x.csv"), write_csv),
    ],
)
def test_rows_of_another_split_are_not_trained_on(tmp_path, names, writer):
    for n, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        writer(tmp_path / name, texts(5, 100 * n))
    source = open_source(Data(source=str(tmp_path)))
    assert list(source.values("text")) == texts(5)["text"]
    assert any(names[1].partition("/")[0] in note for note in source.notes)
    other = "test" if "test" in names[1] or "holdout" in names[1] else "validation"
    assert list(open_source(Data(source=str(tmp_path), split=other)).values("text")) == texts(5, 100)["text"]


def classes(path, names, labels):
    features = datasets.Features({"label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict({"label": labels}, features=features).to_parquet(path)


def test_each_split_has_its_own_columns_and_numbers_of_classes(tmp_path):
    classes(tmp_path / "train.parquet", ["cat", "dog"], [0, 1])
    classes(tmp_path / "test.parquet", ["dog", "cat"], [0, 1])
    write_parquet(tmp_path / "unlabeled_val.parquet", texts(3))
    test = open_source(Data(source=str(tmp_path), split="test"))
    assert test.class_names("label") == ["dog", "cat"]
    assert open_source(Data(source=str(tmp_path))).class_names("label") == ["cat", "dog"]
    assert open_source(Data(source=str(tmp_path), split="validation")).columns == ("text", "kind")


def test_files_of_one_split_that_number_classes_differently_are_refused(tmp_path):
    classes(tmp_path / "a.parquet", ["cat", "dog"], [0, 1])
    classes(tmp_path / "b.parquet", ["dog", "cat"], [0, 1])
    with pytest.raises(DataError, match=r"a.parquet and .*b.parquet number the classes of 'label' differently"):
        open_source(Data(source=str(tmp_path)))


def test_titles_of_documents_are_splits_only_where_several_are(tmp_path):
    write(tmp_path / "the_last_test.txt", "one")
    write(tmp_path / "another.txt", "two")
    assert sorted(open_source(Data(source=str(tmp_path))).values("text")) == ["one", "two"]
    write(tmp_path / "wiki_train.txt", "three")
    write(tmp_path / "wiki_test.txt", "four")
    assert sorted(open_source(Data(source=str(tmp_path))).values("text")) == ["three", "two"]


def layout(tmp_path, *names):
    for name in names:
        write(tmp_path / name, png(0))
    found = media_layout(tmp_path, walk(tmp_path)[0])
    splits = {split: [str(f.relative_to(tmp_path)) for f in files] for split, files in found.splits.items()}
    return splits, {str(f.relative_to(tmp_path)): name for f, name in found.classes.items()}, " ".join(found.notes)


def test_folders_of_splits_with_years(tmp_path):
    splits, classes, notes = layout(tmp_path, "train2017/0.jpg", "val2017/1.jpg", "test2017/2.jpg")
    assert splits == {"train": ["train2017/0.jpg"], "validation": ["val2017/1.jpg"], "test": ["test2017/2.jpg"]}
    assert classes == {}
    assert "validation: val2017" in notes


def test_an_unlabeled_split_beside_labeled_ones(tmp_path):
    splits, classes, _ = layout(tmp_path, "train/cat/0.png", "test/dog/1.png", "unlabeled/2.png")
    assert splits["unlabeled"] == ["unlabeled/2.png"]
    assert classes == {"train/cat/0.png": "cat", "test/dog/1.png": "dog"}
    assert "label" not in open_source(Data(source=str(tmp_path), split="unlabeled")).columns
    assert list(open_source(Data(source=str(tmp_path), split="test")).values("label")) == ["dog"]


def test_a_stray_file_is_named_and_left_out(tmp_path):
    splits, classes, notes = layout(tmp_path, "train/cat/0.png", "test/dog/1.png", "overview.png")
    assert splits == {"train": ["train/cat/0.png"], "test": ["test/dog/1.png"]}
    assert set(classes.values()) == {"cat", "dog"}
    assert "overview.png" in notes


@pytest.mark.parametrize(
    ("names", "splits", "classes"),
    [
        (("data/train/a/0.png", "data/val/a/1.png"), {"train", "validation"}, {"a"}),
        (("images/train/0.png", "images/val/1.png"), {"train", "validation"}, set()),
        (("bottle/train/0.png", "bottle/test/1.png", "cup/train/2.png"), {"train", "test"}, {"bottle", "cup"}),
        (
            ("train-clean-100/s/0.png", "dev-clean/s/1.png", "test-other/s/2.png"),
            {"train", "validation", "test"},
            {"s"},
        ),
        (("train/0.png", "train_extra/1.png", "val/2.png"), {"train", "train_extra", "validation"}, set()),
        (("Train/a/0.png", "TEST/a/1.png"), {"train", "test"}, {"a"}),
        (("car/0.png", "train/1.png"), {"train"}, {"car", "train"}),
        (("trainval/cat/0.png", "test/cat/1.png"), {"train", "test"}, {"cat"}),
        (("train/cat/0.png", "holdout/cat/1.png"), {"train", "test"}, {"cat"}),
        # What repeats another split is one of its own.
        (("train/0.png", "val/1.png", "trainval/2.png"), {"train", "validation", "trainval"}, set()),
        (("test_tube/0.png", "beaker/1.png"), {"train"}, {"test_tube", "beaker"}),
        (("photo of a train.jpg", "a test.jpg"), {"train"}, set()),
        (("train/cat/0.png", "train/dog/1.png"), {"train"}, {"cat", "dog"}),
        # Names that differ in the word of the split alone, wherever it is.
        (("trainA/0.png", "trainB/1.png", "testA/2.png", "testB/3.png"), {"train", "test"}, set()),
        (("Training Set/a/0.png", "Test Set/a/1.png"), {"train", "test"}, {"a"}),
        (("trainset/a/0.png", "testset/a/1.png"), {"train", "test"}, {"a"}),
        (
            ("seg_train/seg_train/a/0.png", "seg_test/seg_test/a/1.png", "seg_pred/seg_pred/2.png"),
            {"train", "test", "seg_pred"},
            {"a"},
        ),
        (("training_set/training_set/a/0.png", "test_set/test_set/a/1.png"), {"train", "test"}, {"a"}),
        (("zip/seg_train/0.png", "zip/seg_test/1.png", "zip/seg_pred/2.png"), {"train", "test", "seg_pred"}, set()),
        (
            ("test_tube/0.png", "train_station/1.png", "beaker/2.png"),
            {"train"},
            {"test_tube", "train_station", "beaker"},
        ),
        # One folder above all classes is none.
        (("zip/cat/0.png", "zip/dog/1.png"), {"train"}, {"cat", "dog"}),
        (("cat/0.png", "cat/1.png"), {"train"}, {"cat"}),
    ],
)
def test_where_splits_and_classes_stand(tmp_path, names, splits, classes):
    found, labels, _ = layout(tmp_path, *names)
    assert set(found) == splits
    assert set(labels.values()) == classes
    assert sum(map(len, found.values())) == len(names)


def test_folders_that_become_classes_are_said_to(tmp_path):
    _, classes, notes = layout(tmp_path, "train/images/0.png", "train/masks/0.png", "test/images/1.png")
    assert {*classes.values()} == {"images", "masks"}
    assert "folders are read as classes: images, masks" in notes
    _, classes, notes = layout(
        tmp_path / "deep", "animal/cat/0.png", "animal/dog/0.png", "thing/cup/0.png", "thing/1.png"
    )
    assert {*classes.values()} == {"animal", "thing"}
    assert "folders are read as classes: animal, thing; those below them are not: cat, cup, dog" in notes


def test_where_files_went_is_told_by_as_much_of_the_path_as_it_takes(tmp_path):
    *_, notes = layout(tmp_path, "a/train/0.png", "a/test/1.png", "b/train/2.png")
    assert "test: a/test; train: a/train, b/train" in notes


def test_names_of_pictures_that_tell_splits_are_said_to_be_none(tmp_path):
    splits, _, notes = layout(tmp_path, "train_0.png", "train_1.png", "test_2.png")
    assert set(splits) == {"train"}
    assert "all files are in train, though their names tell splits (test: test_2.png; train: train_0.png" in notes
    *_, notes = layout(tmp_path, "cat_3.png")
    assert not notes


def test_a_file_above_the_classes_is_said_to_take_them_away(tmp_path):
    splits, classes, notes = layout(tmp_path, "cat/0.png", "dog/1.png", "overview.png")
    assert (len(splits["train"]), classes) == (3, {})
    assert "no classes" in notes
    assert "overview.png" in notes


def test_a_folder_is_read_once_however_many_links_lead_to_it(tmp_path):
    for n in range(3):
        write(tmp_path / "a" / f"{n}.png", png(n))
    (tmp_path / "a" / "parent").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "again").symlink_to(tmp_path / "a", target_is_directory=True)
    elsewhere = tmp_path.parent / f"{tmp_path.name}_elsewhere"
    write(elsewhere / "3.png", png(3))
    (tmp_path / "0_linked").symlink_to(elsewhere, target_is_directory=True)
    names = [str(file.relative_to(tmp_path)) for file in walk(tmp_path)[0]]
    assert names == ["0_linked/3.png", "a/0.png", "a/1.png", "a/2.png"]


def test_what_is_no_file_is_left_out_and_said(tmp_path, monkeypatch):
    write(tmp_path / "cat" / "0.png", png(0))
    os.mkfifo(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "2.png").symlink_to("/dev/zero")
    (tmp_path / "cat" / "3.png").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "dog" / "0.png", png(1))
    opened = os.scandir

    def closed(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path)

    monkeypatch.setattr(os, "scandir", closed)
    source = open_source(Data(source=str(tmp_path)))
    assert [Path(path).name for path in source.values("image")] == ["0.png", "3.png"]
    assert f"folders that cannot be opened are left out: {tmp_path / 'dog'}" in source.notes
    assert "pipes and devices are left out: 1.png, 2.png" in source.notes


def test_what_unpacking_and_shared_drives_leave_behind_is_no_class(tmp_path):
    for name in ("cat/0.png", "dog/0.png", "cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.png", "__MACOSX/cat/0.png"):
        write(tmp_path / name, png(0))
    assert list(open_source(Data(source=str(tmp_path))).values("label")) == ["cat", "dog"]


def test_kinds_of_files_that_are_read_and_those_that_are_counted(tmp_path):
    names = ("a.jpg", "b.avif", "c.jfif", "d.jpe", "e.jp2", "f.JPEG")
    for name in (*names, "notes.md", "x.xcf", "y.xcf"):
        write(tmp_path / name, png(0))
    source = open_source(Data(source=str(tmp_path)))
    assert len(source) == len(names)
    assert source.notes == ("files of other kinds are left out: 2 .xcf, 1 .md",)


def shard(path, samples):
    with tarfile.open(path, "w") as file:
        for key, parts in samples.items():
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


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
    assert [row["text"] for row in source.present(["text"]).rows(skip=3)][:2] == ["row 5", "row 7"]
    loader = Loader({"": spec}, ("text",), batch_size=8, seed=0, tokenizers={"text": Letters()})
    whole = [batch["text"].tolist() for batch in loader.batches(0, 10)]
    assert [batch["text"].tolist() for batch in loader.batches(4, 10)] == whole[4:]


def test_names_with_brackets_are_names(tmp_path):
    write_parquet(tmp_path / "run [1]" / "rows[2].parquet", texts(4))
    for where in (tmp_path / "run [1]", tmp_path / "run [1]" / "rows[2].parquet", tmp_path / "run [1]" / "*.parquet"):
        assert len(open_source(Data(source=str(where)))) == 4
    with pytest.raises(DataError, match="no such file"):
        open_source(Data(source=str(tmp_path / "no [1]" / "rows.parquet")))


def test_pictures_named_one_by_one_or_by_a_pattern(tmp_path):
    for name in ("cat/0.png", "cat/1.jpg", "dog/2.png"):
        write(tmp_path / name, png(0))
    found = open_source(Data(source=str(tmp_path / "*/*.png")))
    assert list(found.values("image")) == [str(tmp_path / "cat/0.png"), str(tmp_path / "dog/2.png")]
    assert list(found.values("label")) == ["cat", "dog"]
    assert len(open_source(Data(source=str(tmp_path / "cat/0.png")))) == 1


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


@pytest.mark.parametrize("name", ["a.csv", "b.csv", "a.jsonl", "a.parquet", "a.tar"])
def test_a_file_without_rows_is_said_to_be_one(tmp_path, name):
    if name == "a.parquet":
        datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / name)
    elif name == "a.tar":
        shard(tmp_path / name, {})
    else:
        write(tmp_path / name, {"a.csv": "text,label\n", "b.csv": "", "a.jsonl": "\n"}[name])
    with pytest.raises(DataError, match=rf"{name} holds no rows$"):
        open_source(Data(source=str(tmp_path / name)))


def test_a_part_of_a_split_without_files_is_said_to_be_one(tmp_path):
    write(tmp_path / "cat" / "0.png", png(0))
    with pytest.raises(DataError, match=r"split 'train\[0:0\]' holds no rows"):
        open_source(Data(source=str(tmp_path), split="train[0:0]"))


def test_what_a_folder_holds_in_place_of_usable_files_is_said(tmp_path):
    write(tmp_path / "a.heic", b"x")
    with pytest.raises(DataError, match=r"holds no usable file; known are .*left out: 1 .heic"):
        open_source(Data(source=str(tmp_path)))


def test_every_extension_of_a_picture_is_one_that_pillow_reads():
    from PIL import Image, features

    Image.init()
    readable = {
        extension.lstrip(".") for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN
    }
    missing = set(EXTENSIONS["image"]) - readable
    assert not missing or missing == {"avif"} - ({"avif"} if features.check("avif") else set())


def test_a_sound_among_pictures_is_a_row_of_its_own(tmp_path):
    write(tmp_path / "train" / "a.png", png(0))
    write(tmp_path / "train" / "a.wav", wav(0.1))
    write(tmp_path / "test" / "b.png", png(0))
    source = open_source(Data(source=str(tmp_path)))
    assert (len(source), source.columns) == (2, ("image", "audio"))
