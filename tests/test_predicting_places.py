"""Saved segmentation networks and detectors: their answers are the table's, in pixels of the user's files."""

import csv
import json
import re
import shutil

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import mmssl
from mmssl.adaptation.probes import _dense
from mmssl.data.toy import ToySource
from mmssl.errors import DataError, MmsslError, RecipeError, RunError
from mmssl.hub import load_classifier, load_saved, push_classifier
from mmssl.media.mask import IGNORED, Frame, decode_mask, palette
from mmssl.recipe import Data

pytestmark = pytest.mark.long

SIZE = Data(source="toy", image={"size": 32, "fit": "pad"})
QUICK = {"data": SIZE, "baseline": False, "seeds": 2}
MASKS = {**QUICK, "label": "mask", "probe": "segmentation", "steps": 40, "lr": (0.3,), "batch_rows": 8}
BOXES = {**QUICK, "label": "boxes", "probe": "detection", "steps": 12, "lr": (3e-3,), "width": 64, "detector": "fcos"}
KINDS = {"linear": MASKS, "conv": MASKS | {"head": "conv", "width": 8, "tune": True, "decay": (1.0,)}, "boxes": BOXES}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Scenes of 60 x 40 pixels with their masks and boxes, in files."""
    root = tmp_path_factory.mktemp("places")
    for split, rows in (("train", 20), ("test", 9)):
        (root / split).mkdir()
        source = ToySource(split, rows, size=40)
        for i in range(rows):
            row = source.row(i)
            for name, pixels in (("image", row["image"]), ("mask", row["mask"])):
                wide = np.pad(np.asarray(pixels), ((0, 0), (0, 20), (0, 0))[: np.asarray(pixels).ndim])
                Image.fromarray(wide).save(root / split / f"{i:02}.{name}.png")
    return root


def rows(root, split):
    source = ToySource(split, 20 if split == "train" else 9, size=40)
    table = {name: [str(path) for path in sorted((root / split).glob(f"*.{name}.png"))] for name in ("image", "mask")}
    cells = [source.row(i) for i in range(len(table["image"]))]
    return datasets.Dataset.from_dict(table | {key: [cell[key] for cell in cells] for key in ("boxes", "classes")})


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return mmssl.encoder("timm/test_resnet", modality="image")


@pytest.fixture(scope="module")
def saved(root, encoder, tmp_path_factory):
    """Kind -> folder, table, and the answers of which the first seed's scores are made."""
    found = {}
    for kind, options in KINDS.items():
        folder, seen = tmp_path_factory.mktemp("saved") / kind, []
        with pytest.MonkeyPatch.context() as patch:
            learner = _dense.DenseLearner
            plain = learner._rows

            def listening(self, target, encoder, views, train, test, seeds, drawn, request, plain=plain, seen=seen):
                def listen(answers, keep=request.listen):
                    seen.append(answers)
                    keep(answers)

                heard = type(request)(**{**vars(request), "listen": listen})
                return plain(self, target, encoder, views, train, test, seeds, drawn, heard)

            patch.setattr(learner, "_rows", listening)
            table = mmssl.adapt(encoder, rows(root, "train"), rows(root, "test"), save=folder, **options)
        found[kind] = folder, table, seen[0]
    return found


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_table(saved, root, kind):
    folder, table, heard = saved[kind]
    assert {path.name for path in folder.iterdir()} == {"README.md", "classifier.json", "model.safetensors"}
    loaded = load_saved(folder)
    assert loaded.table == table
    x = loaded.encoder.read([str(path) for path in sorted((root / "test").glob("*.image.png"))]).x
    answers = loaded.answer({"image": x})
    assert torch.allclose(answers.float(), heard.answers.float(), atol=1e-4)
    metric = table.main.name
    assert heard.target.score(answers, heard.test.labels)[metric] == pytest.approx(table.rows[0].runs[metric][0])


def test_masks_are_of_the_size_of_their_picture(saved, root, tmp_path):
    folder, _, heard = saved["linear"]
    out = mmssl.predict(folder, rows(root, "test"), tmp_path / "masks", batch_size=4)
    assert {path.name for path in out.iterdir()} == {"names.json", "rows.csv", *(f"{i:08}.png" for i in range(9))}
    with (out / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["id", "image", "mask_", "boxes", "classes", "mask"]
    names = json.loads((out / "names.json").read_text())
    assert len(heard.answers.unique()) > 2
    for line, answer in zip(lines, heard.answers, strict=True):
        picture = Image.open(line["mask"])
        assert (picture.size, picture.mode) == ((60, 40), "P")
        assert picture.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        numbers = np.asarray(picture)
        assert {str(number) for number in np.unique(numbers)} <= {*names}
        again = decode_mask(line["mask"], Frame(60, 40, 32, "pad"))
        inside = again != IGNORED
        assert torch.equal(again[inside], answer[inside])
        assert inside.sum() == 32 * 21
    with pytest.raises(RunError, match="is there already; name another folder"):
        mmssl.predict(folder, rows(root, "test"), out)
    mmssl.predict(folder, rows(root, "test"), out, force=True)
    # What was written is rows with masks, to be read again.
    table = mmssl.adapt(load_saved(folder).encoder, str(out / "rows.csv"), **MASKS | {"steps": 1})
    assert table.counts["classes"] >= 2


def test_a_killed_call_goes_on(saved, root, tmp_path, monkeypatch):
    monkeypatch.setattr("mmssl.parts.BATCHES", 1)
    save, painted = Image.Image.save, []

    def slow(picture, path):
        if len(painted) == 6:
            raise KeyboardInterrupt
        painted.append(path.name)
        save(picture, path)

    folder, out = saved["linear"][0], tmp_path / "masks"
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", slow)
        with pytest.raises(KeyboardInterrupt):
            mmssl.predict(folder, rows(root, "test"), out, batch_size=4)
    (out / "00000000.png").unlink()  # of a part that is there
    mmssl.predict(folder, rows(root, "test"), out, batch_size=4)
    assert {path.name for path in out.iterdir()} == {"names.json", "rows.csv", *(f"{i:08}.png" for i in range(1, 9))}
    assert len((out / "rows.csv").read_text().splitlines()) == 10


def test_boxes_are_in_the_frame_of_the_file(saved, root, tmp_path):
    folder, _, heard = saved["boxes"]
    files = [mmssl.predict(folder, rows(root, "test"), tmp_path / f"x.{kind}") for kind in ("parquet", "json", "csv")]
    found = pyarrow.parquet.read_table(files[0]).to_pylist()
    assert [*found[0]] == ["id", "image", "mask", "boxes_", "classes_", "boxes", "classes", "scores"]
    frame = Frame(60, 40, 32, "pad")
    assert sum(len(row["boxes"]) for row in found) > 0
    for row, answer in zip(found, heard.answers, strict=True):
        there = answer[answer[:, 5] >= 0]
        boxes = np.array(row["boxes"]).reshape(-1, 4)
        assert np.allclose(row["scores"], there[:, 4], atol=1e-4)
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert row["classes"] == [heard.target.names[int(number)] for number in there[:, 5]]
        top, bottom = 5 * 60 / 32, 40 + 5 * 60 / 32  # where the picture begins and ends in the square, in its pixels
        expected = there[:, :4].numpy() * 60 / 32 - np.array([0, top, 0, top])
        assert bottom - top == 40
        assert np.allclose(boxes, expected.clip(0, [60, 40, 60, 40]), atol=0.7)  # 40 * 32 / 60 is no whole number
        assert np.allclose(boxes, frame.boxes_in_picture(there[:, :4].double().numpy()), atol=1e-3)
    assert json.loads(files[1].read_text()) == found
    with files[2].open(newline="") as file:
        assert np.allclose([len(json.loads(line["boxes"])) for line in csv.DictReader(file)],
                           [len(row["boxes"]) for row in found])  # fmt: skip
    # What was written is rows with boxes, to be learned from again.
    assert mmssl.adapt(load_saved(folder).encoder, str(files[0]), **BOXES | {"steps": 1}).test_rows > 0


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_what_is_placed_comes_back(fit):
    random = np.random.default_rng(0)
    for width, height in ((80, 40), (33, 57), (32, 32), (400, 300)):
        frame = Frame(width, height, 32, fit)
        corners = np.sort(random.uniform(0, min(width, height), (20, 2, 2)), axis=1).reshape(20, 4)
        assert np.allclose(frame.boxes_in_picture(frame.place(corners)), corners, atol=1e-9)
        square = random.integers(0, 9, (32, 32)).astype(np.uint8)
        back = frame.mask_in_picture(square)
        assert back.shape == (height, width)
        again = decode_mask(back, frame).numpy()
        seen = again != IGNORED
        assert np.array_equal(again[seen], square[seen])
        share = 32 / max(width, height) if fit == "pad" else 32 / min(width, height)
        assert seen.sum() == round(width * share) * round(height * share) if fit == "pad" else seen.all()
    edges = Frame(80, 40, 32, "crop").mask_in_picture(np.ones((32, 32), np.uint8))
    assert (edges[:, :20] == IGNORED).all()
    assert (edges[:, 20:60] == 1).all()
    assert (edges[:, 60:] == IGNORED).all()


def test_the_palette_is_that_of_pascal_voc():
    colors = np.array(palette()).reshape(256, 3)
    assert colors[[0, 1, 2, 3, 8, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [64, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]
    ]  # fmt: skip


def test_classes_have_names_where_the_user_names_them(encoder, root, tmp_path):
    names = ["nothing", *(f"thing {i}" for i in range(1, 12))]
    options = MASKS | {"steps": 1, "seeds": 1}
    mmssl.adapt(encoder, rows(root, "train"), save=tmp_path / "it", names=names, **options)
    assert "`nothing`, `thing 1`" in (tmp_path / "it" / "README.md").read_text()
    out = mmssl.predict(tmp_path / "it", rows(root, "test"), tmp_path / "masks", limit=2)
    assert json.loads((out / "names.json").read_text())["1"] == "thing 1"
    with pytest.raises(RecipeError, match=r"names: masks have class number \d+, and there are 2 names"):
        mmssl.adapt(encoder, rows(root, "train"), names=["a", "b"], **options)


def test_the_folder_says_what_it_is_and_is_published_so(saved, tmp_path):
    for kind, words in (("linear", "A segmentation network"), ("boxes", "A detector")):
        folder, table, _ = saved[kind]
        text = (folder / "README.md").read_text()
        assert f"# {words}, trained by mmssl" in text
        assert f"mmssl predict {kind} DATA --to {'masks' if kind == 'linear' else 'answers.csv'}" in text
        assert f"pipeline_tag: {'image-segmentation' if kind == 'linear' else 'object-detection'}" in text
        pushed = tmp_path / kind
        push_classifier(folder, f"me/{kind}", dry_run=pushed)
        assert load_saved(pushed).table == table
        push_classifier(folder, f"me/{kind}", dry_run=pushed)  # over an earlier one
        with pytest.raises(RunError, match=f"holds a head of {table.probe}, which mmssl predict uses as it is"):
            load_classifier(folder)


@pytest.mark.parametrize(
    ("kind", "keys", "to", "said"),
    [
        ("linear", ("head", "probe"), "os.path", "head: 'os.path' is none of segmentation, detection"),
        ("linear", ("head", "classes"), [0, 1], "head.maps.0.1.weight has shape"),
        ("linear", ("head", "classes"), [0, 999], "classes"),
        ("linear", ("head", "width"), 10**12, "width"),
        (
            "linear",
            ("head", "depths"),
            {"layer": 10**6},
            "tensors missing|has shape|far larger",
        ),
        ("linear", ("head",), None, "target None is none of"),
        ("boxes", ("head", "strides"), [], "no classifier can be built"),
        ("boxes", ("head", "size"), 10**6, "size"),
        ("boxes", ("head", "names"), ["a"], "has shape"),
        ("boxes", ("encoder", "checkpoint_path"), "/etc/passwd", "read other files"),
    ],
)
def test_hostile_folders_are_one_sentence(saved, tmp_path, kind, keys, to, said):
    folder = shutil.copytree(saved[kind][0], tmp_path / "it")
    tree = json.loads((folder / "classifier.json").read_text())
    node = tree
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = to
    (folder / "classifier.json").write_text(json.dumps(tree))
    with pytest.raises(MmsslError) as caught:
        load_saved(folder)
    assert re.search(said, str(caught.value))
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_one_sentence(saved, root, tmp_path):
    masks, boxes = saved["linear"][0], saved["boxes"][0]
    with pytest.raises(RecipeError, match="masks are written to a folder"):
        mmssl.predict(masks, rows(root, "test"), tmp_path / "x.csv")
    with pytest.raises(RecipeError, match="answers are written as"):
        mmssl.predict(boxes, rows(root, "test"), tmp_path / "x")
    with pytest.raises(RecipeError, match="'boxes' holds boxes, which have no probabilities"):
        mmssl.predict(boxes, rows(root, "test"), tmp_path / "x.csv", scores=True)
    with pytest.raises(DataError, match="a stream has one; download it"):
        mmssl.predict(boxes, rows(root, "test").to_iterable_dataset(), tmp_path / "x.csv")
    broken = datasets.Dataset.from_dict({"image": [str(tmp_path / "none.png")] * 3})
    with pytest.raises(DataError):
        mmssl.predict(masks, broken, tmp_path / "masks")
    assert not list(tmp_path.iterdir())
