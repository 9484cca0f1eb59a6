"""Folders of YOLO: boxes, outlines and keypoints, names of classes, and numbers that are something else."""

import pytest
from test_annotated import opened, picture

from mmssl.errors import DataError
from mmssl.media.mask import decode_mask


@pytest.fixture
def yolo(tmp_path):
    for name in "abc":
        picture(tmp_path / "images" / "val" / f"{name}.jpg")
    for name, text in {"a": "1 0.5 0.5 0.25 1\n\n0 0 0 0.5 0 0.5 0.5\n", "b": "", "c": "0 0 0 1 0 1 0.5"}.items():
        file = tmp_path / "labels" / "val" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "data.yaml").write_text("names: [dog, cat]\n")
    return tmp_path


def test_yolo_has_boxes_or_outlines_as_shares(yolo):
    source = opened(yolo, "validation")
    assert source.notes == ("txt of YOLO: 3 boxes in 3 pictures",)
    boxes, nothing, outlined = (source.row(number) for number in range(3))
    assert boxes == boxes | {"boxes": [[3, 0, 5, 6], [0, 0, 4, 3]], "classes": ["cat", "dog"], "mask": None}
    assert (nothing["boxes"], outlined["boxes"]) == ([], [[0, 0, 8, 3]])
    assert decode_mask(outlined["mask"]).unique().tolist() == [0, 1]
    (yolo / "data.yaml").write_text("names: {0: dog, 1: cow}\n")
    assert opened(yolo, "validation").row(0)["classes"] == ["cow", "dog"]
    (yolo / "data.yaml").unlink()
    assert opened(yolo, "validation").row(0)["classes"] == ["1", "0"]
    (yolo / "classes.txt").write_text("dog\nbird\n")
    assert opened(yolo, "validation").row(0)["classes"] == ["bird", "dog"]
    (yolo / "classes.txt").rename(yolo / "_darknet.labels")
    assert opened(yolo, "validation").row(0)["classes"] == ["bird", "dog"]


@pytest.mark.parametrize("keypoints", ["0.9 0.9 2 " * 3, "0.9 0.9 1 " * 4, "0.9 0.9 " * 5])
def test_keypoints_of_yolo_are_no_outlines(yolo, keypoints):
    (yolo / "data.yaml").write_text("names: [person]\nkpt_shape: [3, 3]\n")
    for name in "abc":
        (yolo / "labels" / "val" / f"{name}.txt").write_text(f"0 0.5 0.5 0.25 1 {keypoints}\n")
    row = opened(yolo, "validation").row(0)
    assert (row["boxes"], row["mask"]) == ([[3, 0, 5, 6]], None)


def test_numbers_that_are_no_shares_are_no_boxes(yolo):
    for name in "abc":
        (yolo / "labels" / "val" / f"{name}.txt").write_text("12 33 45 10 22 101 7\n")
    with pytest.raises(DataError, match="shares of the picture"):
        opened(yolo, "validation")
    (yolo / "data.yaml").unlink()
    assert opened(yolo).row(0)["text"] == "12 33 45 10 22 101 7"


def test_splits_of_boxes_may_be_words_in_names_of_folders(tmp_path):
    for name in ("obj_Train_data/a", "obj_Validation_data/b"):
        picture(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.txt").write_text("0 0.5 0.5 0.25 1\n")
    assert opened(tmp_path).splits == ("train", "validation")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("1 2 0.5 0.1 0.1", "labels/val/b.txt, line 2: '1 2 0.5 0.1 0.1' should be a class number and shares"),
        ("1.5 0.5 0.5 0.1 0.1", "a class number with center, width and height"),
        ("dog 0.5 0.5 0.1 0.1", "a class number with center"),
        ("0 0.5 0.5 0.1 -0.1", "a class number and shares"),
        ("1 0.5 0.5 0.1 0.1 0.9", "a class number with center"),
        ("2 0.5 0.5 0.1 0.1", "class 2 has no name; there are 2"),
    ],
)
def test_a_line_of_yolo_that_is_broken_is_named(yolo, line, sentence):
    (yolo / "labels" / "val" / "b.txt").write_text(f"0 0.5 0.5 1 1\n{line}\n")
    with pytest.raises(DataError, match=sentence):
        opened(yolo, "validation")
