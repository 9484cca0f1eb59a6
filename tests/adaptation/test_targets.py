"""Targets: what cells mean, how rows are divided, and probes of labels and values against scikit-learn."""

import hashlib
import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    mean_absolute_error,
    r2_score,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler

import mmssl
from mmssl.adaptation import features
from mmssl.adaptation.probes.knn import Knn
from mmssl.adaptation.probes.logistic import Logistic
from mmssl.adaptation.probes.ridge import Ridge
from mmssl.adaptation.targets import find_target
from mmssl.adaptation.targets.classes import Classes
from mmssl.adaptation.targets.labels import Labels
from mmssl.adaptation.targets.values import Values
from mmssl.data.loader import read
from mmssl.data.toy import ToySource
from mmssl.data.toy.scene import draw_scene
from mmssl.decode_settings import ImageDecode
from mmssl.errors import DataError, RecipeError
from mmssl.recipe import Data

DATA = Data(source="toy", limit=160, image=ImageDecode(size=16))


@pytest.mark.parametrize(
    ("cells", "kind", "labels"),
    [
        (["b", "a", "b"], Classes, [1, 0, 1]),
        ([3, 1, 3], Classes, [1, 0, 1]),
        ([True, False], Classes, [1, 0]),
        ([["b"], [], ["a", "b"]], Labels, [[False, True], [False, False], [True, True]]),
        ([[7], [4, 7]], Labels, [[False, True], [True, True]]),
        ([[True, False, True], [False, True, True]], Labels, [[True, False, True], [False, True, True]]),
        ([0.5, 2], Values, [[0.5], [2.0]]),
        ([[0.5, 1], [2.0, 3]], Values, [[0.5, 1.0], [2.0, 3.0]]),
    ],
)
def test_a_target_is_recognized_by_its_cells(cells, kind, labels):
    found = find_target(cells, None, "here")
    assert found is kind
    target = found.of(cells)
    assert target.encode(cells).tolist() == labels
    assert target.matrix(target.encode(cells)).shape == (len(cells), target.width)


def test_a_target_may_be_asked_for_by_name():
    assert find_target([1, 2], "values", "here").of([1, 2]).encode([1, 2]).tolist() == [[1.0], [2.0]]
    assert find_target(["x", "y"], "labels", "here").of(["x", "y"]).encode(["y"]).tolist() == [[False, True]]
    with pytest.raises(RecipeError, match="did you mean 'values'"):
        find_target([1], "value", "here")
    for cells, sentence in (
        ([{"a": 1}], "here holds dict"),
        (["a", 1], "here holds names in some rows"),
        ([b"cat", b"dog"], "here holds bytes; known targets are"),
        ([], "no row has a"),
    ):
        with pytest.raises(DataError, match=sentence):
            find_target(cells, None, "here")
    for kind, cells, sentence in (
        (Values, ["x"], "should be numbers, the column holds str"),
        (Values, [[1.0], [1.0, 2.0]], "as many numbers in each row, found 1, 2"),
        (Values, [float("inf")], "finite"),
        (Classes, [[1]], "the column holds lists"),
        (Classes, ["a", 1], "int, str"),
        (Labels, [[], []], "all of them are empty"),
    ):
        with pytest.raises(DataError, match=sentence):
            kind.of(cells)


def test_sets_of_labels_are_held_out_alike_and_rare_ones_together():
    common = [["a"]] * 50 + [["a", "b"]] * 25
    rare = [[f"only {i}"] for i in range(20)]
    target = Labels.of(common + rare)
    labels = target.encode(common + rare)
    held = target.hold_out(labels, 0.2, 0)
    assert [int(held[:50].sum()), int(held[50:75].sum()), int(held[75:].sum())] == [10, 5, 4]
    assert torch.equal(held, target.hold_out(labels, 0.2, 0))
    assert not torch.equal(held, target.hold_out(labels, 0.2, 1))


@pytest.mark.parametrize("kind", [Labels, Values])
def test_a_group_is_never_divided_whatever_the_target(kind):
    random = np.random.default_rng(0)
    groups = torch.from_numpy(random.integers(0, 40, 300))
    cells = [["x"] if g % 3 else ["y", "x"] for g in groups.tolist()] if kind is Labels else random.random(300).tolist()
    target = kind.of(cells)
    held = target.hold_out(target.encode(cells), 0.2, 0, groups)
    assert 40 < held.sum() < 80
    assert not set(groups[held].tolist()) & set(groups[~held].tolist())


@pytest.mark.parametrize(
    ("target", "labels", "shots", "digest"),
    [
        (Classes(range(7)), torch.arange(1000) % 7, 5, "43d552999bae2c1d"),
        (Classes(range(7)), torch.arange(1000) % 7, "2%", "df3219607b581b81"),
        (Labels(range(3)), torch.arange(1000)[:, None] % torch.tensor([2, 3, 5]) == 0, 5, "3db28606de5eda30"),
        (Values(1), torch.linspace(0, 1, 1000)[:, None], 5, "334477b3b6706de9"),
    ],
    ids=["classes", "share", "labels", "values"],
)
def test_the_rows_of_a_seed_are_the_same_on_every_machine(target, labels, shots, digest):
    rows = target.draw_shots(labels, shots, 0).numpy().astype("<i8")
    assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == digest


def test_shots_are_rows_of_each_label_and_of_values_rows_in_all():
    random = np.random.default_rng(0)
    cells = [[name for name in "abc" if random.random() < {"a": 0.6, "b": 0.2, "c": 0.02}[name]] for _ in range(300)]
    target = Labels.of(cells)
    labels = target.encode(cells)
    index = target.draw_shots(labels, 10, 0)
    counts = labels[index].sum(0)
    assert counts[2] == labels[:, 2].sum() < 10  # it has no more
    assert counts[:2].min() >= 10
    assert len(index) <= 30
    assert index.tolist() == sorted(set(index.tolist()))
    assert not torch.equal(index, target.draw_shots(labels, 10, 1))
    values = Values()
    assert len(values.draw_shots(torch.rand(50, 1), 7, 0).unique()) == 7


def test_a_share_is_of_each_class_its_own_and_within_a_larger_one():
    labels = torch.tensor([0] * 600 + [1] * 149 + [2] * 249 + [3] * 2)
    target = Classes(range(4))
    one, ten = (target.draw_shots(labels, shots, 0) for shots in ("1%", "10%"))
    assert labels[one].bincount().tolist() == [6, 1, 2, 1]
    assert labels[ten].bincount().tolist() == [60, 15, 24, 1]
    assert set(one.tolist()) < set(ten.tolist())
    assert target.draw_shots(labels, "100%", 0).tolist() == list(range(1000))
    several = Labels(range(2))
    marks = torch.stack([labels < 3, labels == 2], 1)
    counts = marks[several.draw_shots(marks, "10%", 0)].sum(0)
    assert counts[0] == 100
    assert 25 <= counts[1] < 100


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(7)
    return mmssl.encoder("timm/test_resnet", modality="image").eval()


@pytest.fixture(scope="module")
def toy(encoder):
    """Features of training and test rows, and the cells of a column of both."""
    x = [
        features(encoder, read(DATA.model_copy(update={"split": split}), ("image",)))[0] for split in ("train", "test")
    ]

    def cells(column):
        return [list(ToySource(split, 160).values(column)) for split in ("train", "test")]

    return x[0], x[1], cells


def scaled(train, test):
    scaler = StandardScaler().fit(train.double().numpy())
    return scaler.transform(train.double().numpy()), scaler.transform(test.double().numpy())


def multi_hot(cells):
    binarizer = MultiLabelBinarizer().fit(cells[0] + cells[1])
    return binarizer.transform(cells[0]), binarizer.transform(cells[1])


def first(probe, target, train, labels, test):
    (answers,) = probe.predict(target, train, labels, test, probe.settings(), 0)
    return answers.numpy()


def test_labels_and_values_of_the_toy_world_are_what_its_scenes_show():
    rows = [ToySource(rows=20).row(i) for i in range(20)]
    assert all(row["shape"] in row["shapes"] and row["color"] in row["colors"] for row in rows)
    assert all(len(row["shapes"]) <= row["count"] in (2, 3) for row in rows)
    assert all(0 < x < 1 and 0 < y < 1 for x, y in (row["position"] for row in rows))
    assert all(0.2 <= row["size"] <= 0.28 for row in rows)
    scenes = [draw_scene(0, "train", i) for i in range(20)]
    assert [row["count"] for row in rows] == [len(scene.bodies) for scene in scenes]
    assert all(scene.box.left < row["position"][0] < scene.box.right for row, scene in zip(rows, scenes, strict=True))


@pytest.mark.quick(1)
@pytest.mark.parametrize("column", ["colors", "shapes"])
def test_probes_of_labels_equal_scikit_learn(encoder, toy, column):
    train, test, cells = toy
    y, truth = multi_hot(cells(column))
    target = Labels.of(cells(column)[0] + cells(column)[1])
    labels = target.encode(cells(column)[0])
    assert np.array_equal(labels.numpy(), y)
    x, asked = scaled(train, test)

    answers = first(Knn(k=(15,), temperature=float("inf")), target, train, labels, test)
    neighbors = KNeighborsClassifier(15, metric="cosine").fit(train.numpy(), y)
    assert np.array_equal(answers > 0.5, neighbors.predict(test.numpy()) == 1)
    chances = np.stack([chance[:, 1] for chance in neighbors.predict_proba(test.numpy())], axis=1)
    np.testing.assert_allclose(answers, chances, atol=1e-6)

    ridge = SklearnRidge(alpha=0.1 * len(x)).fit(x, y).predict(asked)
    np.testing.assert_allclose(first(Ridge(alpha=(0.1,)), target, train, labels, test), ridge, atol=1e-6)

    rest = OneVsRestClassifier(LogisticRegression(C=0.01, max_iter=1000)).fit(x, y)
    answers = first(Logistic(c=(0.01,)), target, train, labels, test)
    np.testing.assert_allclose(answers, rest.predict_proba(asked), atol=1e-3)
    assert np.mean((answers > 0.5) == rest.predict(asked)) > 0.999

    table = mmssl.adapt(encoder, "toy", label=column, probe="ridge", alpha=(0.1,), seeds=1, limit=160, data=DATA)
    metrics = table.rows[0].metrics
    assert table.target == "labels"
    assert metrics["mean_average_precision"] == pytest.approx(average_precision_score(truth, ridge), abs=1e-6)
    assert metrics["subset_accuracy"] == pytest.approx(accuracy_score(truth, ridge > 0.5))
    constant = table.row("constant").metrics
    assert constant["mean_average_precision"] == pytest.approx(truth.mean())
    assert constant["subset_accuracy"] == pytest.approx(accuracy_score(truth, np.tile(y.mean(0) > 0.5, (160, 1))))
    assert "subset_accuracy" in table.rows[0].interval


@pytest.mark.quick(1)
@pytest.mark.parametrize("column", ["count", "size", "position"])
def test_probes_of_values_equal_scikit_learn(encoder, toy, column):
    train, test, cells = toy
    y, truth = (np.array(some, dtype=float).reshape(160, -1) for some in cells(column))
    target = Values.of(cells(column)[0] + cells(column)[1])
    labels = target.encode(cells(column)[0])
    x, asked = scaled(train, test)

    def weights(distance):
        return np.exp(-distance / 0.07)

    neighbors = KNeighborsRegressor(15, metric="cosine", weights=weights).fit(train.double().numpy(), y)
    answers = first(Knn(k=(15,)), target, train, labels, test)
    np.testing.assert_allclose(answers, neighbors.predict(test.double().numpy()), rtol=1e-4)

    ridge = SklearnRidge(alpha=0.1 * len(x)).fit(x, y).predict(asked).reshape(160, -1)
    np.testing.assert_allclose(first(Ridge(alpha=(0.1,)), target, train, labels, test), ridge, atol=1e-6)

    table = mmssl.adapt(
        encoder, "toy", label=column, target="values", probe="ridge", alpha=(0.1,), seeds=1, limit=160, data=DATA
    )
    assert table.rows[0].metrics["r2"] == pytest.approx(r2_score(truth, ridge), abs=1e-6)
    assert table.rows[0].metrics["mean_absolute_error"] == pytest.approx(mean_absolute_error(truth, ridge), abs=1e-6)
    constant = table.row("constant").metrics
    assert constant["r2"] == pytest.approx(r2_score(truth, np.tile(y.mean(0), (160, 1))), abs=1e-6)
    assert "of R^2" in str(table)
    with pytest.raises(RecipeError, match=f"logistic learns classes or labels, and '{column}' holds values"):
        mmssl.adapt(encoder, "toy", label=column, target="values", probe="logistic", limit=160, data=DATA)


def test_a_label_that_all_training_rows_have_needs_no_fit():
    x, labels = torch.randn(40, 3), torch.ones(40, 2, dtype=torch.bool)
    labels[::2, 1] = False
    answers = first(Logistic(c=(1.0,)), Labels(["always", "sometimes"]), x, labels, x)
    assert (answers[:, 0] == 1).all()
    assert 0 < answers[:, 1].min() < answers[:, 1].max() < 1


def png(level: int) -> dict:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def table_of(labels, feature=None, levels=None) -> datasets.Dataset:
    levels = range(len(labels)) if levels is None else levels
    rows = datasets.Dataset.from_dict({"image": [png(level) for level in levels], "y": labels})
    rows = rows.cast_column("image", datasets.Image())
    return rows.cast_column("y", feature) if feature else rows


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0, 1, -1] * 20, datasets.ClassLabel(names=["dark", "light"])),
        (["a", "b", None] * 20, None),
        (["a", "b", " "] * 20, None),
        ([[1], [2, 1], None] * 20, None),
        ([0.5, 1.5, float("nan")] * 20, None),
    ],
)
def test_rows_without_a_label_are_left_out_and_counted(encoder, labels, feature):
    table = mmssl.adapt(
        encoder, table_of(labels, feature), label="y", probe="ridge", seeds=1, baseline=False, data=DATA
    )
    assert table.train_rows + table.test_rows == 40
    assert "20 of 60 rows of the given data set have no 'y' and are left out" in table.warnings[0]


def test_whole_numbers_that_a_csv_with_empty_cells_made_floats(encoder):
    rows = table_of([0.0, 1.0, None] * 20)
    table = mmssl.adapt(encoder, rows, label="y", probe="ridge", seeds=1, baseline=False, data=DATA)
    assert "'y' holds whole numbers, read as values; if they are classes: target classes" in table.warnings
    table = mmssl.adapt(encoder, rows, label="y", target="classes", probe="ridge", seeds=1, baseline=False, data=DATA)
    assert table.counts == {"classes": 2}


@pytest.mark.parametrize(
    ("labels", "counts", "told"),
    [
        ([[1, 0, 1], [0, 1, 0]] * 20, {"labels": 3}, "marks of labels 0 to 2"),
        (["['red']", "['red', 'dark']"] * 20, {"labels": 2}, "written as text"),
        (["cat", "Cat"] * 20, {"classes": 2}, "capitals alone"),
        ([["a", ""], ["b", " "]] * 20, {"labels": 2}, ""),
        (["a"] * 39 + ["b"] * 39 + ["c"], {"classes": 2}, "no training row has; they count as wrong: 'c'"),
    ],
)
def test_what_a_reader_may_think_otherwise_is_under_the_table(encoder, labels, counts, told):
    rows, test = table_of(labels[:-4]), table_of(labels[-4:])
    table = mmssl.adapt(encoder, rows, test, label="y", probe="ridge", seeds=1, baseline=False, data=DATA)
    assert table.counts == counts
    assert told in "".join(table.warnings)


def test_what_a_list_holds_is_said_where_it_is_no_label():
    with pytest.raises(DataError, match=r"here holds lists of int and nothing, lists of str; known targets"):
        find_target([[1, None], ["a"]], None, "here")


def test_why_all_rows_are_of_one_class_is_said(encoder):
    with pytest.raises(
        DataError,
        match=r"column 'y': all .* of one class, 'a'; 40 of 60 rows .* have no 'y' and are left out \(NA, None",
    ):
        mmssl.adapt(encoder, table_of(["a", None, None] * 20), label="y", probe="ridge", baseline=False, data=DATA)


def test_numbers_below_zero_are_classes_unless_the_data_set_names_its_classes(encoder):
    table = mmssl.adapt(encoder, table_of([-1, 1] * 20), label="y", probe="ridge", seeds=1, baseline=False, data=DATA)
    assert (table.counts, table.warnings) == ({"classes": 2}, ())


@pytest.mark.long
def test_finetuning_learns_labels_and_values():
    torch.manual_seed(0)
    small = mmssl.encoder("timm/test_resnet", modality="image")
    levels = [(i * 37) % 200 for i in range(120)]
    options = {"probe": "finetune", "steps": 60, "lr": (3e-3,), "decay": (1.0,), "seeds": 1, "baseline": False}
    names = [["bright"] * (level > 100) + ["middling"] * (60 < level < 140) for level in levels]
    several = mmssl.adapt(small, table_of(names, levels=levels), label="y", data=DATA, **options)
    assert several.score > several.row("constant").metrics["mean_average_precision"] + 0.2
    # Far from 0 and 1: the head learns in units of the labels.
    brightness = [1000.0 + 5.0 * level for level in levels]
    values = mmssl.adapt(small, table_of(brightness, levels=levels), label="y", data=DATA, **options)
    assert values.score > 0.7


@pytest.mark.long
def test_a_target_of_ones_own_is_learned_by_the_probes_of_what_it_derives_from(encoder, monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/halves.py").write_text(
        "from mmssl.adaptation.targets.values import Values\n\n\nclass Halves(Values):\n"
        "    def encode(self, cells):\n        return super().encode(cells) / 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    whole = mmssl.adapt(encoder, DATA, label="size", probe="ridge", baseline=False)
    half = mmssl.adapt(encoder, DATA, label="size", probe="ridge", baseline=False, target="mine.halves")
    assert half.target == "halves"
    error = "mean_absolute_error"
    assert half.rows[0].metrics[error] == pytest.approx(whole.rows[0].metrics[error] / 2, rel=1e-4)
    with pytest.raises(RecipeError, match="logistic learns classes or labels, and 'size' holds halves"):
        mmssl.adapt(encoder, DATA, label="size", probe="logistic", target="mine.halves")


def test_whole_numbers_that_may_measure_something_are_said_to_be_read_as_classes():
    def told(names):
        labels = torch.arange(len(names)).repeat(3)
        return Classes(names).check(labels, labels, "pitch")

    (said,) = told(range(30, 90, 4))
    assert said.startswith("15 whole numbers from 30 to 86 are read as classes; where they measure something, take")
    assert told(range(100)) == told([n for n in range(100) if n % 7]) == told([3, 50, 90]) == []
    assert told([f"{n}" for n in range(0, 90, 4)]) == []
