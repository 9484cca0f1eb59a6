"""Annotated folders: masks and texts by name, VOC, COCO and YOLO, in splits; what is broken is one sentence."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycoco

import mmssl
from mmssl.data.sources import open_source
from mmssl.decode_settings import ImageDecode
from mmssl.errors import DataError
from mmssl.media.mask import decode_mask
from mmssl.media.outlines import Outlines
from mmssl.recipe import Data


def picture(path, size=(8, 6), value=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if path.suffix == ".jpg" else "L", size, (value,) * 3 if path.suffix == ".jpg" else value).save(
        path
    )


def opened(folder, split="train", **more):
    return open_source(Data(source=str(folder), split=split, **more))


@pytest.mark.parametrize(
    ("images", "masks"),
    [("images/{}", "masks/{}"), ("{}/img", "{}/gt"), ("images/{}/city", "annotations/{}/city")],
)
def test_masks_are_paired_with_pictures_by_their_names(tmp_path, images, masks):
    for split, names in {"training": "abc", "val": "de"}.items():
        for value, name in enumerate(names):
            picture(tmp_path / images.format(split) / f"{name}.jpg")
            if name != "b":
                picture(tmp_path / masks.format(split) / f"{name}.png", value=value)
    train = opened(tmp_path)
    assert train.notes == ("pictures and masks of the same name: 4 pairs, 1 picture without mask",)
    assert train.splits == ("train", "validation")
    assert [row.rpartition("/")[2] for row in train.values("image")] == ["a.jpg", "b.jpg", "c.jpg"]
    assert train.present(["image", "mask"]).tolist() == [0, 2]
    assert decode_mask(train.row(2)["mask"]).unique().tolist() == [2]
    assert len(opened(tmp_path, "validation")) == 2
    assert len(opened(tmp_path, "train[:2]+validation")) == 4
    assert len(opened(tmp_path, limit=2)) == 2
    assert train.select(["mask"]).columns == ("mask",)
    with pytest.raises(DataError, match="has no split 'test'; it has: train, validation"):
        opened(tmp_path, "test")


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{}.jpg", "masks/{}_mask.png"),
        ("leftImg8bit/{}_leftImg8bit.jpg", "gtFine/{}_gtFine_labelIds.png"),
        ("scans/{}.jpg", "scans/{}_mask.png"),
        ("scans/{}_sat.jpg", "scans/{}_mask.png"),
        ("leftImg8bit/{}_leftImg8bit.jpg", "gtFine/{}_gtFine_labelTrainIds.png"),
        ("train/{}.jpg", "train_masks/{}_mask.png"),
        ("train_images/{}.jpg", "train_labels/{}_L.png"),
        ("PNGImages/{}.jpg", "PedMasks/{}_mask.png"),
        ("{}.jpg", "masks/{}.png"),
        ("JPEGImages/{}.jpg", "SegmentationClassPNG/{}.png"),
    ],
)
def test_a_mask_may_add_a_word_to_the_name(tmp_path, image, mask):
    for value, name in enumerate(("a", "b-1")):
        picture(tmp_path / image.format(name))
        picture(tmp_path / mask.format(name), value=value)
        if "gtFine" in mask:
            picture(tmp_path / f"gtFine/{name}_gtFine_instanceIds.png", value=7)
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        (tmp_path / "SegmentationClass" / f"{name}.npy").touch()
    source = opened(tmp_path)
    assert source.notes[0].startswith("pictures and masks of the same name: 2 pairs")
    assert [decode_mask(source.row(i)["mask"]).unique().tolist() for i in range(len(source))] == [[0], [1]]
    assert not [line for line in mmssl.check(tmp_path).notes if "columns.image=mask" in line]


def test_class_folders_stay_classes(tmp_path):
    for name in ("labels/a.png", "cats/a.png", "images/b.png", "cats/c_mask.png"):
        picture(tmp_path / name)
    (tmp_path / "cats" / "a.xml").write_text("<page/>")
    (tmp_path / "labels" / "a.txt").write_text("a gray field 1 2 3\n")
    (tmp_path / "about.json").write_text('{"title": "cats"}')
    (tmp_path / "info.json").write_text('{"images": 4, "annotations": "none", "categories": ["cat"]}')
    (tmp_path / "captions.json").write_text('{"a.png": ["a cat"]}')
    (tmp_path / "empty.json").write_text('{"images": [], "annotations": [], "categories": []}')
    source = opened(tmp_path)
    assert set(source.values("label")) == {"labels", "cats", "images"}
    assert "no file in images has a mask of its name in labels: what is there is read as pictures" in source.notes


@pytest.mark.parametrize("kind", ["mask", "boxes", "text"])
def test_folders_of_classes_are_labels_beside_annotations(tmp_path, kind):
    names = [f"{folder}/{folder} ({number})" for folder in ("benign", "normal") for number in (1, 2)]
    for name in names:
        picture(tmp_path / f"{name}.png")
        if kind == "mask":
            picture(tmp_path / f"{name}_mask.png")
            picture(tmp_path / f"{name}_mask_1.png")
        elif kind == "boxes":
            (tmp_path / f"{name}.xml").write_text(VOC)
    if kind == "text":
        told = captions([f"{name}.png" for name in names], [(number, "a") for number in range(4)])
        (tmp_path / "captions.json").write_text(told)
    source = opened(tmp_path)
    assert list(source.values("label")) == ["benign"] * 2 + ["normal"] * 2
    assert len(source.present([kind])) == 4
    assert "; folders are read as classes: benign, normal" in source.notes[0]


def test_what_is_not_read_next_to_annotations_is_said(tmp_path):
    for name in ("images/a.png", "labels/a.png"):
        picture(tmp_path / name)
    for name in ("metadata.csv", "train.txt", "val.txt"):
        (tmp_path / name).write_text("file_name,text\nimages/a.png,b\n")
    assert opened(tmp_path).notes[1:] == (
        "tables are not read next to annotations: metadata.csv",
        "lists of splits are not read (train.txt, val.txt); a folder for each split makes them splits",
    )


VOC = """<annotation><object><name>dog</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax>
<ymax>6</ymax></bndbox></object><object><name>cat</name><bndbox><ymin>1</ymin><xmin>1</xmin><xmax>8</xmax>
<ymax>6</ymax></bndbox></object></annotation>"""


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in "abc":
        picture(root / "JPEGImages" / f"{name}.jpg")
    (root / "Annotations").mkdir()
    for name in "ab":
        (root / "Annotations" / f"{name}.xml").write_text(VOC)
    picture(root / "SegmentationClass" / "b.png", value=15)
    return root


def test_voc_has_boxes_masks_and_lists_of_splits(voc, tmp_path):
    source = opened(tmp_path)
    assert source.notes == ("PASCAL VOC: 2 pictures with boxes, 1 with masks, 1 without either",)
    row = source.row(1)
    assert row["boxes"] == [[0, 1, 5, 6], [0, 0, 8, 6]]  # all 8 x 6 pixels
    assert (row["classes"], row["crowd"]) == (["dog", "cat"], [True, False])
    assert decode_mask(row["mask"]).unique().tolist() == [15]
    assert source.row(0)["mask"] is None
    assert source.present(["boxes"]).tolist() == [0, 1]
    for kind, names in {"Main/train": "a", "Main/val": "b", "Main/trainval": "ab", "Main/dog_val": "b"}.items():
        file = voc / "ImageSets" / f"{kind}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{name}  1\n" for name in names))
    assert [len(opened(voc, split)) for split in ("train", "validation", "unlabeled")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (VOC[:90], r"VOC2012/Annotations/b.xml: no boxes can be read: no element found|unclosed"),
        (VOC.replace("<xmin>1</xmin>", ""), "could not convert"),
        (VOC.replace("dog", ""), "an object has no name"),
        (VOC.replace("<xmin>1", "<xmin>nan", 1), "xmin, ymin, xmax and ymax are"),
        (VOC.replace("<xmax>5", "<xmax>0"), "xmin, ymin, xmax and ymax are"),
    ],
)
def test_an_xml_file_that_is_broken_is_named(voc, tmp_path, content, sentence):
    (voc / "Annotations" / "b.xml").write_text(content)
    with pytest.raises(DataError, match=sentence):
        opened(tmp_path)


@pytest.mark.parametrize("xml", ["images/{}.xml", "annotations/xmls/{}.xml"])
def test_xml_of_voc_may_be_anywhere(tmp_path, xml):
    for name in "abc":
        picture(tmp_path / "images" / "train" / f"{name}.jpg")
    picture(tmp_path / "trimaps" / "a.png")
    for name in "ab":
        file = tmp_path / xml.format(f"train/{name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(VOC)
    source = opened(tmp_path)
    told = "xml of VOC: 4 boxes in 2 pictures, 1 picture without such a file"
    assert source.notes[0] == f"{told}, 1 picture in other folders left out"
    assert (source.row(1)["boxes"], source.row(2)["boxes"]) == ([[0, 1, 5, 6], [0, 0, 8, 6]], None)


BLOB = np.asfortranarray(np.eye(6, 8, 1, np.uint8) | np.eye(6, 8, 2, np.uint8))
RUNS = pycoco.encode(BLOB)
POLYGON = [[1.0, 1.0, 6.0, 1.0, 6.0, 4.0, 1.0, 4.0]]


def coco(names=("a.jpg", "b.jpg"), **changes):
    """A file of two categories and three annotations, with one of its values changed."""
    things = [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [1, 1, 5, 3], "segmentation": POLYGON},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [1, 0, 7, 6], "iscrowd": 0, "segmentation": {**RUNS}},
        {"id": 3, "image_id": 9, "category_id": 3, "bbox": [0, 0, 2, 2], "iscrowd": 1,
         "segmentation": {"counts": [0, 6, 42], "size": [6, 8]}},
    ]  # fmt: skip
    things[1]["segmentation"]["counts"] = RUNS["counts"].decode()
    things[0] |= changes
    images = [{"id": n, "file_name": name, "height": 6, "width": 8} for n, name in zip((7, 9), names, strict=True)]
    categories = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}]
    return json.dumps({"images": images, "annotations": things, "categories": categories})


@pytest.fixture
def coco_folder(tmp_path):
    for split in ("train2017", "val2017"):
        for name in "ab":
            picture(tmp_path / split / f"{name}.jpg")
        path = tmp_path / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(coco())
    (tmp_path / "annotations" / "person_keypoints_train2017.json").write_text("{")
    return tmp_path


def test_coco_has_boxes_names_and_masks_as_pycocotools_draws_them(coco_folder):
    for split in ("train", "validation"):
        source = opened(coco_folder, split)
        row, crowd = source.row(0), source.row(1)
        assert row["image"].endswith(("train2017/a.jpg", "val2017/a.jpg")[split != "train"])
        assert row["boxes"] == [[1, 1, 6, 4], [1, 0, 8, 6]]
        assert row["classes"] == ["dog", "car"]
        assert (crowd["crowd"], crowd["boxes"]) == ([True], [[0, 0, 2, 2]])
        inside = pycoco.decode(pycoco.merge(pycoco.frPyObjects(POLYGON, 6, 8))).astype(bool)
        expected = np.where(BLOB.astype(bool), 1, np.where(inside, 2, 0))  # the smaller one is in front
        assert np.array_equal(decode_mask(row["mask"]), expected)
        assert decode_mask(crowd["mask"])[:, 0].tolist() == [255] * 6
    picture(coco_folder / "unlabeled2017" / "z.jpg")
    assert opened(coco_folder, "unlabeled").row(0)["boxes"] is None
    sent = pickle.loads(pickle.dumps(source.select(["image"])))
    assert [list(row) for row in sent.rows] == [["image"]] * 2
    assert source.notes[0].startswith("COCO: 6 boxes of 2 categories in 4 pictures, from annotations/instances_train")


def test_a_file_of_coco_in_each_folder_of_a_split(tmp_path):
    for split in ("train", "valid"):
        picture(tmp_path / split / "a.jpg")
        (tmp_path / split / "_annotations.coco.json").write_text(coco())
    source = opened(tmp_path, "validation")
    assert [len(source), source.splits] == [1, ("train", "validation")]
    assert "; 2 listed pictures not there" in source.notes[0]


def test_a_file_of_coco_has_any_name(tmp_path):
    for name in "abz":
        picture(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "images" / "a.json").write_text(coco())  # of the picture
    picture(tmp_path / "panoptic_train" / "a.png")  # a mask
    (tmp_path / "result.json").write_text(coco(("images\\a.jpg", "b.jpg")))
    source = opened(tmp_path)
    assert (source.splits, len(source), len(source.row(0)["boxes"])) == (("train", "unlabeled"), 2, 2)
    assert len(opened(tmp_path, "unlabeled")) == 1


def captions(names, texts):
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    told = [{"id": 10 + n, "image_id": number, "caption": text} for n, (number, text) in enumerate(texts)]
    return json.dumps({"images": images, "annotations": told})


def test_captions_of_coco_are_rows(tmp_path):
    for name in ("train2017/a.jpg", "train2017/b.jpg", "val2017/a.jpg"):
        picture(tmp_path / name)
    (tmp_path / "annotations").mkdir()
    told = captions(["a.jpg", "b.jpg", "gone.jpg"], [(0, "one "), (1, "two"), (0, "three"), (2, "four")])
    (tmp_path / "annotations" / "captions_train2017.json").write_text(told)
    (tmp_path / "annotations" / "captions_val2017.json").write_text(captions(["a.jpg"], [(0, "five")]))
    source = opened(tmp_path)
    assert [(row["image"][-15:], row["text"]) for row in map(source.row, range(len(source)))] == [
        ("train2017/a.jpg", ["one", "three"]), ("train2017/b.jpg", ["two"])
    ]  # fmt: skip
    assert opened(tmp_path, "validation").row(0)["image"].endswith("val2017/a.jpg")
    note = "captions of COCO: 4 of 3 pictures; 1 picture with captions not there"
    assert source.notes == (note,)
    (tmp_path / "annotations" / "instances_train2017.json").write_text(coco())
    both = opened(tmp_path).row(0)
    assert (both["classes"], both["text"]) == (["dog", "car"], ["one", "three"])
    for broken, sentence in (("{}", "'images' is missing"), ("[", "cannot be read"), (captions([], [(0, "")]), "0 is")):
        (tmp_path / "annotations" / "captions_val2017.json").write_text(broken)
        with pytest.raises(DataError, match=f"captions_val2017.json: .*{sentence}"):
            opened(tmp_path)


@pytest.mark.parametrize("text", ["{}.txt", "../captions/{}.txt", "../txt/{}.txt"])
def test_texts_of_the_names_of_pictures_are_a_column(tmp_path, text):
    for name in "abc":
        picture(tmp_path / "all" / "images" / f"{name}.jpg")
    for name, written in {"a": "\ufeffa cat\n", "b": " \n"}.items():
        file = tmp_path / "all" / "images" / text.format(name)
        file.parent.mkdir(exist_ok=True)
        file.write_text(written, encoding="utf-8")
    source = opened(tmp_path / "all")
    assert [source.row(i)["text"] for i in range(3)] == ["a cat", None, None]
    (note,) = (note for note in source.notes if ".txt" in note)
    assert note == "text is that of .txt files of the same name, of 2 in all"
    if ".." not in text:
        assert opened(tmp_path / "all" / "images" / "*.jpg").row(0)["text"] == "a cat"
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"b.txt: cannot be read as UTF-8"):
        opened(tmp_path / "all")
    file.unlink()  # one of three is no rule
    assert "text" not in opened(tmp_path / "all").columns


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (coco()[:-20], "annotations/instances_train2017.json: cannot be read"),
        (coco(image_id=8), "annotation 1 is of image 8, which the file does not list"),
        (coco(category_id=1), "annotation 1 is of category 1"),
        (coco(bbox=[1, 2, -3, 4]), "should be left, top, width and height"),
        (coco(bbox=None), "no annotations as COCO writes them"),
        (coco(("x.jpg", "y.jpg")), "none of the 2 pictures .* unlike 'x.jpg' in annotations/instances_train2017.json"),
        (coco().replace("dog", "cat"), "other categories than"),
    ],
)
def test_a_file_of_coco_that_is_broken_is_named(coco_folder, content, sentence):
    (coco_folder / "annotations" / "instances_train2017.json").write_text(content)
    if "none of" in sentence:
        (coco_folder / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(DataError, match=sentence):
        opened(coco_folder)


def test_outlines_that_cannot_be_drawn_are_one_sentence():
    for outline in ([[1, 2]], {"size": [6, 8]}, {"counts": "!!", "size": [3, 3]}, 5):
        with pytest.raises(DataError, match="an outline"):
            Outlines(6, 8, ((1, outline),)).draw()


def test_segmentation_reads_such_a_folder_and_says_what_it_found(tmp_path):
    for split, count in {"train": 8, "val": 4}.items():
        for i in range(count):
            picture(tmp_path / "images" / split / f"{i}.jpg", (40, 30), 60 * (i % 2))
            picture(tmp_path / "masks" / split / f"{i}.png", (40, 30), i % 2)
    encoder = mmssl.encoder("timm/test_resnet", modality="image")
    table = mmssl.adapt(
        encoder, tmp_path, probe="segmentation", baseline=False, seeds=1, steps=5, lr=(1e-2,),
        data=Data(source="x", image=ImageDecode(size=32, fit="pad")),
    )  # fmt: skip
    assert (table.train_rows, table.test_rows, table.counts) == (8, 4, {"classes": 2})
    assert "pictures and masks of the same name: 12 pairs" in str(table)


def test_a_table_may_name_the_files_of_masks(tmp_path):
    lines = ["image,mask"]
    for i in range(6):
        picture(tmp_path / f"{i}.jpg", value=40 * (i % 2))
        picture(tmp_path / f"{i}.png", value=i % 2)
        lines.append(f"{i}.jpg,{i}.png")
    (tmp_path / "train.csv").write_text("\n".join(lines))
    encoder = mmssl.encoder("timm/test_resnet", modality="image")
    table = mmssl.adapt(
        encoder, tmp_path / "train.csv", label="mask", probe="segmentation", baseline=False, seeds=1, steps=2,
        data=Data(source="x", image=ImageDecode(size=32)), lr=(1e-2,),
    )  # fmt: skip
    assert table.counts == {"classes": 2}


@pytest.mark.long
@pytest.mark.parametrize("layout", ["voc", "coco_folder"])
def test_such_a_folder_is_checked_and_trained_on(layout, request, tmp_path):
    request.getfixturevalue(layout)
    assert list(mmssl.check(tmp_path).columns) == ["image", "mask", "boxes", "classes", "crowd"]
    settings = {"data.source": str(tmp_path), "data.limit": None, "training.steps": 1, "training.batch_size": 2}
    run = mmssl.run("rotation_toy", settings | {"probe": None}, tmp_path / "out", quiet=True)
    assert run.directory.is_dir()
