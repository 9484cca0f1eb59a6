"""Boxes and masks as people write them: what is read, what is refused in one sentence, and what is told."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

import mmssl
from mmssl.adaptation.probes import make_probe
from mmssl.adaptation.request import Model, Request
from mmssl.decode_settings import ImageDecode
from mmssl.errors import DataError
from mmssl.recipe import Data

DATA = Data(source="here", image=ImageDecode(size=32))
ROWS = 10
TWO = [[4, 4, 30, 30], [20, 20, 60, 60]]
BELOW = np.repeat(np.arange(64) >= 32, 64).reshape(64, 64).astype(np.uint8)


def png(pixels: np.ndarray) -> dict[str, bytes | str]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": ""}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.of(mmssl.encoder("timm/test_resnet", modality="image"))


def read(model, probe, label, columns):
    """The target of the column, and what it tells; the last two of ten rows are for the test."""
    table = datasets.Dataset.from_dict({"image": [png(np.zeros((64, 64, 3), np.uint8))] * ROWS, **columns})
    request = Request(table.select(range(8)), table.select(range(8, ROWS)), label=label, data=DATA)
    question = make_probe(probe, {}).ask(model, request)
    target = question.target
    if probe == "detection":
        target = target.asked(classes="classes", form=None)
    return target, target.look(question.train.labels, question.test.labels), question


@pytest.mark.parametrize(
    ("label", "columns"),
    [
        ("boxes", {"boxes": [TWO] * ROWS, "classes": [["a", "b"]] * ROWS}),
        ("boxes", {"boxes": [json.dumps(TWO)] * ROWS, "classes": ['["a", "b"]'] * ROWS}),  # as a csv has them
        (
            "objects",
            {
                "objects": [
                    [
                        {"bbox": [4, 4, 26, 26], "category": "a"},
                        {"bbox": [20, 20, 40, 40], "category": "b", "iscrowd": 0},
                    ]
                ]
                * ROWS
            },
        ),
    ],
)
def test_boxes_are_the_same_however_they_are_written(model, label, columns):
    target, told, question = read(model, "detection", label, columns)
    (boxes, *_) = target.boxes(question.train.labels)
    assert boxes.corners.tolist() == [[2, 2, 15, 15], [10, 10, 30, 30]]
    assert (boxes.classes, told) == (["a", "b"], [])


def test_class_numbers_that_became_floats_are_numbers(model):
    target, _, _ = read(model, "detection", "boxes", {"boxes": [TWO] * ROWS, "classes": [[1.0, 2.0]] * ROWS})
    assert target.names == (1, 2)


@pytest.mark.parametrize(
    ("boxes", "classes", "told"),
    [
        ([[4, 4, 4, 30], TWO[1]], ["a", "b"], "10 of 20 boxes do not count: 10 have no area"),
        ([[70, 4, 90, 30], TWO[1]], ["a", "b"], "10 of 20 boxes do not count: 10 are outside of their pictures"),
        ([[60, 4, 160, 30], TWO[1]], ["a", "b"], "10 are cut away with what the square leaves out"),
    ],
)
def test_boxes_that_do_not_count_are_told(model, boxes, classes, told):
    _, found, _ = read(model, "detection", "boxes", {"boxes": [boxes] * ROWS, "classes": [classes] * ROWS})
    assert told in "".join(found)


@pytest.mark.parametrize(
    ("boxes", "classes", "sentence"),
    [
        ([[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.6, 1.0]], ["a", "b"], "within one pixel; .* multiply shares by its width"),
        (TWO, ["a", None], "row 0: classes should be a list of names or whole numbers, .* are 'a', None"),
        (TWO, [1.5, 2.0], "are 1.5, 2"),
        (TWO, "ab", "are 'ab'"),
        (TWO, 3, "are 3"),
    ],
)
def test_boxes_and_classes_that_cannot_be_meant_are_one_sentence(model, boxes, classes, sentence):
    with pytest.raises(DataError, match=sentence):
        read(model, "detection", "boxes", {"boxes": [boxes] * ROWS, "classes": [classes] * ROWS})


def test_classes_of_places_that_only_test_rows_have_are_told(model):
    columns = {"boxes": [TWO] * ROWS, "classes": [["a", "b"]] * 8 + [["a", "z"]] * 2}
    assert read(model, "detection", "boxes", columns)[1] == [
        "boxes of test rows are of classes that no training row has; they count as missed: 'z'"
    ]
    masks = [png(BELOW)] * 8 + [png(BELOW * 7)] * 2
    assert read(model, "segmentation", "mask", {"mask": masks})[1] == [
        "pixels of test rows are of classes that no training row has; they count as wrong: 7"
    ]
    assert read(model, "segmentation", "mask", {"mask": [png(BELOW)] * ROWS})[1] == []


def test_test_masks_without_a_class_are_refused(model):
    masks = [png(BELOW)] * 8 + [png(BELOW * 0 + 255)] * 2
    with pytest.raises(DataError, match="row 0: no pixel of the 2 test rows has a class; 255"):
        read(model, "segmentation", "mask", {"mask": masks})
