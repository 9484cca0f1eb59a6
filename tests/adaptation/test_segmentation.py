"""Segmentation: metrics against scikit-learn and SciPy, oracles and constants, and rows that are chosen undecoded."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.metrics import accuracy_score, jaccard_score
from torch import nn

import mmssl
from mmssl.adaptation import maps, placed
from mmssl.adaptation.maps import read_maps
from mmssl.adaptation.metrics import boundary_overlap, confusion, mean_over_union
from mmssl.adaptation.rows import BatchSplit, Reads
from mmssl.adaptation.targets.masks import Masks
from mmssl.data.toy import ToySource
from mmssl.decode_settings import ImageDecode
from mmssl.encoders.base import Encoder, at_depth
from mmssl.errors import DataError, RecipeError
from mmssl.modules.dense import ConvolutionalMaps, LinearMaps
from mmssl.recipe import Data

DATA = Data(source="toy", image=ImageDecode(size=32))
QUICK = {"steps": 30, "lr": (0.3,), "batch_rows": 8, "seeds": 1}


class Painted(Encoder):
    """Says of each pixel its red value, of `steps` possible ones; of none where it is blind."""

    modality, dim = "image", 10

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        self.blind, self.unused = blind, nn.Parameter(torch.zeros(1))
        self.spec = {"model": "painted", "modality": "image"}

    def layers(self, x, valid=None):
        hot = nn.functional.one_hot((x[:, 0].long() + 12) // 25, 10).float().flatten(1, 2)
        fine = at_depth(0 * hot if self.blind else hot, tuple(x.shape[-2:]))
        return {"pixels": fine, "all": at_depth(fine.tokens.mean(1, keepdim=True), (1, 1))}


def painted(rows: int, split: str = "train") -> datasets.Dataset:
    """Toy scenes, each pixel in the gray of its class."""
    cells = [ToySource(split, rows, size=32).row(i)["mask"] for i in range(rows)]
    table = {"image": [png(25 * cell) for cell in cells], "mask": [png(cell) for cell in cells]}
    return datasets.Dataset.from_dict(table)


def png(pixels: np.ndarray) -> dict[str, bytes | str]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": ""}


@pytest.fixture(scope="module")
def pair():
    return painted(24), painted(16, "test")


def test_metrics_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    truth = random.choice([0, 1, 2, 5, 255], (7, 11, 13), p=[0.6, 0.2, 0.1, 0.05, 0.05]).astype(np.uint8)
    found = np.where(random.random(truth.shape) < 0.6, truth, random.choice([0, 1, 7], truth.shape)).astype(np.uint8)
    found[found == 255] = 0
    target = Masks.of([placed.Placed(BatchSplit([{"image": torch.zeros(7, 3, 11, 13), "mask": torch.tensor(truth)}],
                                                Reads(("image",), {})), row, "mask") for row in range(7)])  # fmt: skip
    scores = target.score(torch.from_numpy(found), torch.arange(7))
    kept = truth != 255
    assert scores["mean_iou"] == pytest.approx(jaccard_score(truth[kept], found[kept], average="macro"), abs=1e-12)
    assert scores["pixel_accuracy"] == pytest.approx(accuracy_score(truth[kept], found[kept]), abs=1e-12)
    zeros = jaccard_score(truth[kept], np.zeros(kept.sum()), average="macro")
    assert target.constant(torch.arange(7)).tolist() == [[0]]
    assert target.score(torch.zeros(7, 1, 1, dtype=torch.uint8), torch.arange(7))["mean_iou"] == pytest.approx(zeros)
    assert target.classes(torch.arange(7)).tolist() == [0, 1, 2, 5]


def test_boundary_iou_erodes_as_scipy_does():
    random = np.random.default_rng(1)
    truth, found = (ndimage.zoom(random.integers(0, 3, (2, 8, 6)), (1, 12, 12), order=0) for _ in range(2))
    truth[:, :5, :7] = 255
    counted, overlap = truth != 255, np.zeros((2, 3), dtype=int)
    distance = round(0.02 * np.hypot(96, 72))
    for row in range(2):
        for number in range(3):
            edges = []
            for one in (truth, found):
                inside = (one[row] == number) & counted[row]
                eroded = ndimage.binary_erosion(inside, np.ones((3, 3)), iterations=distance)
                edges.append(inside & ~eroded)
            overlap[:, number] += [(edges[0] & edges[1]).sum(), (edges[0] | edges[1]).sum()]
    mine = boundary_overlap(*(torch.from_numpy(one.astype(np.uint8)) for one in (found, truth)), 255)
    assert np.array_equal(mine[:, :3], overlap)
    assert not mine[:, 3:].any()
    same = torch.from_numpy(truth.astype(np.uint8))
    assert mean_over_union(*boundary_overlap(same, same, 255)) == 1
    assert confusion(same, same, 255).sum() == counted.sum()


def test_an_oracle_is_right_and_a_blind_encoder_is_the_constant_answer(pair):
    options = {"label": "mask", "probe": "segmentation", "data": DATA, "baseline": False, **QUICK}
    table = mmssl.adapt(Painted(), *pair, boundary=True, **options)
    assert table.rows[0].part == "pixels+all"
    assert table.score > 0.9
    assert table.rows[0].metrics["boundary_iou"] > 0.8
    assert table.counts == {"classes": 9}
    blind = mmssl.adapt(Painted(blind=True), *pair, **options)
    assert blind.score == blind.row("constant").metrics["mean_iou"] < 0.2
    assert [metric.name for metric in blind.metrics] == ["mean_iou", "pixel_accuracy"]


@pytest.mark.long
def test_each_depth_is_asked_and_some_can_be_named(pair):
    options = {"label": "mask", "probe": "segmentation", "data": DATA, "baseline": False, **QUICK}
    table = mmssl.adapt(Painted(), *pair, layers=True, **options)
    parts = [row.part for row in table.rows]
    assert parts == ["pixels+all", "", "pixels", "all"]
    assert table.rows[2].metrics["mean_iou"] > 0.9 > 0.3 > table.rows[3].metrics["mean_iou"]
    assert mmssl.adapt(Painted(), *pair, depths=("all",), **options).rows[0].part == "all"
    with pytest.raises(RecipeError, match=r"there is no depth 'pixel' .did you mean 'pixels'"):
        mmssl.adapt(Painted(), *pair, depths=("pixel",), **options)


@pytest.mark.long
def test_a_head_alone_leaves_the_encoder_and_tuning_trains_a_copy_of_it():
    torch.manual_seed(0)
    encoder = mmssl.encoder("timm/test_resnet", modality="image")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    options = {
        "label": "mask",
        "probe": "segmentation",
        "data": DATA,
        "limit": 24,
        "baseline": False,
        **QUICK,
        "lr": (0.01,),
    }
    rows = {}
    for name, more in {
        "linear": {},
        "conv": {"head": "conv", "width": 16},
        "tuned": {"tune": True, "decay": (1.0,)},
    }.items():
        rows[name] = mmssl.adapt(encoder, "toy", **options | more).rows[0]
        again = mmssl.adapt(encoder, "toy", **options | more).rows[0]
        assert again.metrics == rows[name].metrics
    assert len({row.metrics["mean_iou"] for row in rows.values()}) == 3
    assert rows["tuned"].setting == {"lr": 0.01, "decay": 1.0}
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_maps_that_do_not_fit_are_computed_anew_and_are_the_same(monkeypatch, pair):
    torch.manual_seed(0)
    encoder = mmssl.encoder("timm/test_vit", modality="image", img_size=32, patch_size=8)
    batches = [{"image": torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)} for _ in range(2)]
    split = BatchSplit(batches, Reads(("image",), {}))
    (kept,), _ = read_maps([encoder], split, torch.arange(12), layers=True)
    monkeypatch.setattr(maps, "KEPT_BYTES", 0)
    (streamed,), _ = read_maps([encoder], split, torch.arange(12), layers=True)
    assert list(kept) == ["blocks.5", *(f"blocks.{i}" for i in range(5))]
    picks = [torch.tensor([7, 0, 3]), torch.tensor([11])]
    for depth in kept:
        assert (kept[depth].kept is None, streamed[depth].kept is None) == (False, True)
        some = torch.tensor([0, 1, 3, 5, 6, 7, 8, 9, 10, 11, 2, 4])
        for mine, other in zip(kept[depth][some].read(picks), streamed[depth][some].read(picks), strict=True):
            assert torch.equal(mine["id"], other["id"])
            torch.testing.assert_close(mine[depth], other[depth])
            assert mine[depth].shape[1:] == (encoder.dim, 4, 4)


def test_rows_are_chosen_before_they_are_decoded(monkeypatch, pair):
    seen: set[tuple[int, int]] = set()
    read = placed.Placed.read
    monkeypatch.setattr(placed.Placed, "read", lambda cell: (seen.add((id(cell.split), cell.row)), read(cell))[1])
    options = {"label": "mask", "probe": "segmentation", "data": DATA, "baseline": False, **QUICK}
    mmssl.adapt(Painted(), *pair, **options | {"shots": 3, "steps": 2})
    assert len(seen) == 3 + 16
    seen.clear()
    mmssl.adapt(Painted(), *pair, **options | {"limit": 5, "steps": 2})
    assert len(seen) == 5 + 5


def test_masks_may_come_in_batches():
    def batches(split):
        cells = torch.stack([torch.from_numpy(ToySource(split, 12, size=32).row(i)["mask"]) for i in range(12)])
        return [{"image": (25 * cells)[:, None].expand(-1, 3, -1, -1), "mask": cells}]

    options = {"label": "mask", "probe": "segmentation", "baseline": False, **QUICK}
    assert mmssl.adapt(Painted(), batches("train"), batches("test"), **options).score > 0.6


def test_what_cannot_be_learned_is_told_before_anything_is_encoded(pair):
    train, test = pair
    options = {"label": "mask", "probe": "segmentation", "data": DATA, "baseline": False, **QUICK}
    broken = [*train["mask"][:2], {"bytes": b"nonsense", "path": "masks/2.png"}, *train["mask"][3:]]
    cases = (
        (train.remove_columns("mask").add_column("mask", broken), "column 'mask', row 2: cannot read mask 'masks/2"),
        (train.remove_columns("mask").add_column("mask", [png(np.zeros((32, 32), np.uint8))] * 24), "are of class 0"),
        (train.remove_columns("mask").add_column("mask", [png(np.zeros((64, 32), np.uint8))] * 24), "of another shape"),
    )
    for rows, sentence in cases:
        with pytest.raises(DataError, match=sentence):
            mmssl.adapt(Painted(), rows, test, **options)
    with pytest.raises(RecipeError, match="knn learns classes or labels or values, and 'mask' holds masks"):
        mmssl.adapt(Painted(), *pair, label="mask", probe="knn", data=DATA)
    with pytest.raises(RecipeError, match="set tune: true"):
        mmssl.adapt(Painted(), *pair, **options, decay=(0.5,))
    with pytest.raises(RecipeError, match="layers probes frozen features"):
        mmssl.adapt(Painted(), *pair, **options, layers=True, tune=True)


@pytest.mark.parametrize("head", [LinearMaps, ConvolutionalMaps])
def test_heads_answer_at_the_size_of_the_picture(head):
    answer = head({"a": 3, "b": 5}, 4)({"a": torch.randn(2, 3, 8, 6), "b": torch.randn(2, 5, 4, 3)}, (32, 24))
    assert answer.shape == (2, 4, 32, 24)


def test_all_classes_are_about_as_likely_at_first():
    for head in (LinearMaps({"a": 96}, 5), ConvolutionalMaps({"a": 96}, 5)):
        chances = head({"a": 10 * torch.randn(4, 96, 6, 6)}, (6, 6)).softmax(1)
        assert (chances - 0.2).abs().max() < 0.1


def test_a_linear_head_is_linear_on_the_enlarged_maps_side_by_side():
    maps_ = {"a": torch.randn(3, 2, 8, 8), "b": torch.randn(3, 5, 4, 4)}
    head = LinearMaps({"a": 2, "b": 5}, 4)
    normalized = [nn.functional.batch_norm(one, None, None, training=True) for one in maps_.values()]
    column = torch.cat([normalized[0], nn.functional.interpolate(normalized[1], (8, 8), mode="bilinear")], 1)
    weight = torch.cat([part[1].weight for part in head.maps], 1)
    bias = sum(part[1].bias for part in head.maps)
    other = nn.functional.interpolate(nn.functional.conv2d(column, weight, bias), (16, 16), mode="bilinear")
    torch.testing.assert_close(head(maps_, (16, 16)), other)
