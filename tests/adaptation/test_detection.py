"""Detection: COCO's numbers against pycocotools, boxes where their pictures are, and detectors that learn."""

import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models.detection.image_list import ImageList

import mmssl
from mmssl.adaptation.average_precision import coco_average_precision
from mmssl.adaptation.maps import resolutions
from mmssl.adaptation.targets import find_target
from mmssl.adaptation.targets.boxes import Boxes
from mmssl.data.toy import ToySource
from mmssl.decode_settings import ImageDecode
from mmssl.encoders.base import Encoder, at_depth
from mmssl.errors import DataError, RecipeError
from mmssl.media.mask import Frame
from mmssl.modules.detectors import ExactAnchors
from mmssl.modules.pyramid import SimplePyramid
from mmssl.recipe import Data

DATA = Data(source="toy", image=ImageDecode(size=32))
QUICK = {"label": "boxes", "probe": "detection", "baseline": False, "seeds": 1, "width": 64, "steps": 2}


class Patches(Encoder):
    """The share of each class in patches of 4 x 4 pixels, of pictures that show the class as red."""

    modality, dim = "image", 10

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.spec = {"model": "patches", "modality": "image"}

    def layers(self, x, valid=None):
        red = x[:, 0] * 255 if x.is_floating_point() else x[:, 0]
        hot = nn.functional.one_hot((red.round().long() + 12) // 25, 10).float().movedim(3, 1)
        maps = nn.functional.avg_pool2d(hot, 4)
        return {"patches": at_depth(maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:]))}


def painted(rows: int, split: str = "train") -> datasets.Dataset:
    """Toy scenes, each pixel in the gray of its class."""
    cells = [ToySource(split, rows, size=32).row(i) for i in range(rows)]
    table = {key: [cell[key] for cell in cells] for key in ("boxes", "classes")}
    return datasets.Dataset.from_dict({"image": [Image.fromarray(25 * cell["mask"]) for cell in cells], **table})


def random_boxes(random, count: int) -> np.ndarray:
    corners = random.uniform(0, 80, (count, 2))
    return np.concatenate([corners, corners + random.uniform(2, 60, (count, 2))], axis=1)


def test_average_precision_is_that_of_pycocotools():
    random = np.random.default_rng(0)
    truth, found = [], []
    for picture in range(12):
        count = picture % 5
        truth.append((random_boxes(random, count), random.integers(0, 3, count), random.random(count) < 0.2))
        near = truth[-1][0] + random.normal(0, 4, (count, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        numbers = np.where(random.random(count) < 0.8, truth[-1][1], random.integers(0, 4, count))
        spare = random_boxes(random, 4)
        boxes = np.concatenate([near, spare])
        numbers = np.concatenate([numbers, random.integers(0, 4, 4)])
        found.append(np.column_stack([boxes, random.random(len(boxes)), numbers]))
    reference = COCO()
    reference.dataset = {
        "images": [{"id": picture} for picture in range(12)],
        "categories": [{"id": number} for number in range(4)],
        "annotations": [],
    }
    for picture, (corners, numbers, crowd) in enumerate(truth):
        for (x, y, right, bottom), number, crowded in zip(corners, numbers, crowd, strict=True):
            w, h = right - x, bottom - y
            thing = {"image_id": picture, "category_id": int(number), "bbox": [x, y, w, h], "area": w * h}
            things = reference.dataset["annotations"]
            things.append({"id": len(things) + 1, "iscrowd": int(crowded), **thing})
    reference.createIndex()
    rows = [(picture, *row) for picture, own in enumerate(found) for row in own]
    results = np.array(
        [[p, x, y, right - x, bottom - y, score, number] for p, x, y, right, bottom, score, number in rows]
    )
    evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    mine = coco_average_precision(found, truth, 4)
    assert mine == pytest.approx(evaluation.stats[:3].tolist(), abs=1e-12)
    assert 0.02 < mine[2] < mine[0] < mine[1] < 0.9
    assert coco_average_precision([own[:0] for own in found], truth, 4) == (0, 0, 0)
    perfect = [np.column_stack([own, np.ones(len(own)), numbers]) for own, numbers, _ in truth]
    assert coco_average_precision(perfect, [(a, b, np.zeros(len(a), bool)) for a, b, _ in truth], 4) == (1, 1, 1)


@pytest.mark.parametrize(
    ("fit", "expected"), [("crop", [[0.0, 2, 6, 6], [10, 0, 14, 20]]), ("pad", [[3, 6, 8, 8], [10, 5, 12, 15]])]
)
def test_boxes_stand_where_their_picture_does(fit, expected):
    frame = Frame(80, 40, 20, fit)
    placed = frame.place(np.array([[12.0, 4, 32, 12], [40, 0, 48, 40]]))
    assert placed[1].tolist() == expected[1]
    assert placed.clip(0, 20)[0].tolist() == expected[0]


def cells(rows: dict, size: int = 20, **settings):
    """The target of a picture of 80 x 40 pixels in each row."""
    count = len(next(iter(rows.values())))
    table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (80, 40))] * count, **rows})
    data = Data(source="x", image=ImageDecode(size=size, **settings))
    return mmssl.adapt, table, data


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("column", "options"),
    [
        ({"boxes": [[[12.0, 4, 32, 12]]] * 6, "classes": [["cat"]] * 6}, {}),
        ({"boxes": [[[12.0, 4, 20, 8]]] * 6, "kind": [["cat"]] * 6}, {"form": "extents", "classes": "kind"}),
        ({"boxes": [{"bbox": [[12.0, 4, 20, 8]], "category": ["cat"]}] * 6}, {}),
        ({"boxes": [{"bbox": [[12.0, 4, 32, 12]], "category": ["cat"]}] * 6}, {"form": "corners"}),
    ],
)
def test_boxes_are_read_in_every_form(monkeypatch, column, options):
    seen = []
    look = Boxes.look
    monkeypatch.setattr(Boxes, "look", lambda target, *rows: (seen.append(target), look(target, *rows))[1])
    _, table, data = cells(column, fit="pad")
    encoder = mmssl.encoder("timm/test_vit", modality="image", img_size=20, patch_size=4)
    mmssl.adapt(encoder, table, data=data, **QUICK, **options)
    (target,) = seen
    (boxes,) = target.boxes(torch.tensor([0]))
    assert boxes.corners.tolist() == [[3, 6, 8, 8]]
    assert target.names == ("cat",)


def test_a_box_of_which_little_is_seen_is_left_out_and_crowds_are_not_learned():
    rows = {
        "boxes": [[[0.0, 0, 24, 40], [10, 0, 50, 40], [30, 10, 40, 20]]] * 6,
        "classes": [["a", "b", "c"]] * 6,
        "crowd": [[False, False, True]] * 6,
    }
    _, table, data = cells(rows)
    encoder = mmssl.encoder("timm/test_vit", modality="image", img_size=20, patch_size=4)
    found = mmssl.adapt(encoder, table, data=data, **QUICK)
    assert found.counts == {"boxes": 10, "classes": 2}
    assert find_target([[[0, 0, 1, 1]], []], None, "here") is Boxes
    assert find_target([{"bbox": []}], None, "here") is Boxes
    assert found.row("constant").metrics["average_precision"] == pytest.approx(1)  # all pictures are alike


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        (
            {"boxes": [[[30.0, 4, 20, 8]]] * 6},
            r"row 0: box \[30.0, 4.0, 20.0, 8.0\] should be left, top, right, bottom",
        ),
        ({"boxes": [[[1.0, 4, math.nan, 8]]] * 6}, "should be left, top, right, bottom"),
        ({"boxes": [[[1.0, 4, 5]]] * 6}, "lists of four numbers"),
        ({"boxes": [[[1.0, 4, 5, 8]]] * 6, "classes": [["a", "b"]] * 6}, "1 boxes and 2 classes"),
        ({"boxes": [[]] * 6, "classes": [[]] * 6}, "none of the 5 training rows has a box"),
        ({"kind": [0] * 6}, "has no column 'boxes'"),
    ],
)
def test_boxes_that_make_no_sense_are_one_sentence(column, sentence):
    _, table, data = cells(column)
    with pytest.raises(DataError, match=sentence):
        mmssl.adapt(Patches(), table, data=data, **QUICK)


def test_faster_rcnn_takes_places_that_are_powers_of_two_apart():
    encoder = mmssl.encoder("timm/test_vit", modality="image", img_size=42, patch_size=14)
    data = Data(source="toy", image=ImageDecode(size=42))
    with pytest.raises(RecipeError, match=r"powers of two apart, and these are 3.5, 7, 14, 28 pixels apart"):
        mmssl.adapt(encoder, "toy", data=data, limit=6, detector="faster_rcnn", **QUICK)


def test_what_it_takes_is_said(monkeypatch):
    train = painted(6)
    with pytest.raises(RecipeError, match="multiple of 32 from 64 on"):
        mmssl.adapt(Patches(), train, data=DATA, **QUICK | {"width": 32})
    table = mmssl.adapt(Patches(), train.remove_columns("classes"), data=DATA, **QUICK)
    assert any("all boxes are of one class" in warning for warning in table.warnings)
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    with pytest.raises(RecipeError, match=r"pip install 'mmssl\[detection\]'"):
        mmssl.adapt(Patches(), train, data=DATA, **QUICK)


def squares(rows: int, seed: int) -> datasets.Dataset:
    """A square of 12 to 16 pixels of one of two grays, anywhere in a picture."""
    random, table = np.random.default_rng(seed), {"image": [], "boxes": [], "classes": []}
    for row in range(rows):
        side = random.integers(12, 17)
        left, top = random.integers(0, 33 - side, 2).tolist()
        pixels = np.zeros((32, 32), np.uint8)
        pixels[top : top + side, left : left + side] = 25 * (1 + row % 2)
        table["image"].append(Image.fromarray(pixels))
        table["boxes"].append([[left, top, left + int(side), top + int(side)]])
        table["classes"].append(["dark" if row % 2 else "light"])
    return datasets.Dataset.from_dict(table)


@pytest.mark.long
@pytest.mark.parametrize(
    ("detector", "steps", "lr"), [("fcos", 40, 3e-3), ("retinanet", 200, 1e-3), ("faster_rcnn", 20, 3e-3)]
)
def test_detectors_find_what_an_oracle_sees(detector, steps, lr):
    options = QUICK | {"steps": steps, "lr": (lr,), "detector": detector}
    table = mmssl.adapt(Patches(), squares(32, 0), squares(16, 1), data=DATA, **options)
    assert table.rows[0].metrics["average_precision_50"] > 0.4
    assert table.row("constant").metrics["average_precision_50"] < 0.1


@pytest.mark.quick(1)
@pytest.mark.parametrize("size", [28, 33, 40])
@pytest.mark.parametrize(
    ("model", "arguments"),
    [("timm/test_resnet", {}), ("timm/test_vit", {"img_size": 28, "patch_size": 7, "dynamic_img_pad": True})],
)
def test_small_pictures_of_any_size_and_tuning(model, arguments, size):
    torch.manual_seed(0)
    encoder = mmssl.encoder(model, modality="image", **arguments)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    data = Data(source="toy", image=ImageDecode(size=size))
    table = mmssl.adapt(
        encoder, "toy", data=data, limit=6, tune=size == 28, decay=(1.0,) if size == 28 else (), **QUICK
    )
    assert 0 <= table.score <= 1
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_anchors_are_as_far_apart_as_places():
    anchors = ExactAnchors(((8,), (16,)), ((1.0,),) * 2)
    images = ImageList(torch.zeros(2, 3, 100, 100), [(100, 100)] * 2)
    found = anchors(images, [torch.zeros(2, 4, 13, 13), torch.zeros(2, 4, 7, 7)])
    centers = (found[0][:, :2] + found[0][:, 2:]) / 2
    assert len(found) == 2
    torch.testing.assert_close(centers[:13, 0], torch.arange(13) * 100 / 13)
    torch.testing.assert_close(centers[169:176, 0], torch.arange(7) * 100 / 7)


def test_pyramids_of_one_map_have_all_scales():
    levels = SimplePyramid(16, 32, (4.0, 2.0, 1.0, 0.5))({"last": torch.randn(2, 16, 7, 5)})
    assert [tuple(level.shape[1:]) for level in levels.values()] == [(32, 28, 20), (32, 14, 10), (32, 7, 5), (32, 4, 3)]
    layers = {f"{side}": at_depth(torch.zeros(1, side**2, 4), (side, side)) for side in (16, 8, 4)}
    assert resolutions(layers) == ["16", "8", "4"]
    assert resolutions(layers, 8) == ["8", "4"]
    assert resolutions(layers, 2) == ["4"]
