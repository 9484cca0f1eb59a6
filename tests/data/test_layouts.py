"""Files and folders as people have them: splits, classes and what is left out are told by names, and said."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import datasets
import pytest
from made import png, texts, wav, write, write_csv, write_jsonl, write_parquet

from mmssl.data.files import EXTENSIONS, media_layout, split_in
from mmssl.data.sources import open_source
from mmssl.data.walk import walk
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


@pytest.mark.quick(5)
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


@pytest.mark.parametrize(
    ("names", "sentence"),
    {
        ("train/cat/a.png", "gallery/cat/b.png"): "train is no split, since no folder with it names another one",
        ("cat/a.png", "dog/b.png", "train.txt", "test.txt"): r"lists of splits are not read \(test.txt, train.txt\)",
        ("a.png", "b.png", "c.png", "a.txt"): "nothing is read from a.txt, of the names of files that are read",
        ("pos/a.txt", "neg/b.txt"): "folders of texts are read as no classes: neg, pos",
        ("train.csv", "submission.csv"): "read as train as well, though no name says so: submission.csv",
        ("a.csv", "a.png"): "read where a column of the table names them: 1 .png",
    }.items(),
)
def test_what_is_not_taken_for_labels_or_splits_is_said(tmp_path, names, sentence):
    for number, name in enumerate(names):
        write(tmp_path / name, png(number) if name.endswith("png") else "text\nhello\n")
    assert re.search(sentence, " ".join(open_source(Data(source=str(tmp_path))).notes))
