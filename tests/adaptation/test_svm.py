"""SVMs of VOC07 against scikit-learn called directly, and VOC's average precision against its own definition."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.svm import LinearSVC

from mmssl.adaptation.metrics import interpolated_average_precision, mean_average_precision
from mmssl.adaptation.probes.svm import Svm
from mmssl.adaptation.targets.classes import Classes
from mmssl.adaptation.targets.labels import Labels
from mmssl.errors import DataError

COSTS = (0.01, 0.1, 1.0)


def tagged(rows: int, seed: int, noise: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors that are the sum of what each of three labels adds, of any length; the third label is rare."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.rand(rows, 3, generator=random) < torch.tensor([0.5, 0.3, 0.1])
    axes = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))
    x = labels.float() @ axes + noise * torch.randn(rows, 8, generator=random)
    return x * (1 + 5 * torch.rand(rows, 1, generator=random)), labels


def reference(cost: float) -> LinearSVC:
    weight = {1: 2, -1: 1}
    return LinearSVC(C=cost, class_weight=weight, dual=True, max_iter=2000, random_state=0)


def unit(x: torch.Tensor) -> np.ndarray:
    a = x.double().numpy()
    return a / (np.linalg.norm(a, axis=1, keepdims=True) + 1e-5)


def test_costs_and_answers_are_those_of_scikit_learn():
    train, labels = tagged(150, 0)
    test, truth = tagged(100, 1)
    target, probe = Labels(["a", "b", "c"]), Svm(c=COSTS)
    setting, score = probe.choose(target, train, labels, 0)
    (answers,) = probe.predict(target, train, labels, test, [setting], 0)
    best, precision = [], []
    for place, name in enumerate(target.names):
        own = np.where(labels[:, place], 1, -1)
        folds = [cross_val_score(reference(c), unit(train), own, cv=3, scoring="average_precision") for c in COSTS]
        means = [fold.mean() for fold in folds]
        best.append(max(means))
        cost = COSTS[int(np.argmax(means))]
        assert setting[f"C of {name}"] == cost
        decision = reference(cost).fit(unit(train), own).decision_function(unit(test))
        np.testing.assert_allclose(answers[:, place].logit().numpy(), decision, atol=1e-9)
        precision.append(average_precision_score(truth[:, place], decision))
    assert score == pytest.approx(np.mean(best))
    assert target.score(answers, truth)["mean_average_precision"] == pytest.approx(np.mean(precision))
    assert len(set(setting.values())) > 1
    assert not probe.warnings


def test_of_classes_the_largest_decision_value_wins():
    train, _ = tagged(120, 0)
    labels = (train[:, 0] > 0).long() + (train[:, 1] > 0).long()
    (answers,) = Svm().predict(Classes(range(4)), train, labels, train, [{"C": 1.0}], 0)
    own = LinearSVC(C=1.0, class_weight=None, dual=True, max_iter=2000)
    rest = [reference(1.0).fit(unit(train), np.where(labels == c, 1, -1)) for c in range(3)]
    values = np.stack([model.decision_function(unit(train)) for model in rest], 1)
    assert answers.argmax(1).tolist() == values.argmax(1).tolist()
    assert (answers[:, 3] == 0).all()  # a class that training lacks
    # The weight of two matters: without it other rows are taken for other classes.
    assert answers.argmax(1).tolist() != own.fit(unit(train), labels).predict(unit(train)).tolist()


def test_groups_are_not_divided_between_folds():
    vectors, labels = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
    twins, twice, groups = vectors.repeat(2, 1), labels.repeat(2), torch.arange(60).repeat(2)
    probe, target = Svm(c=(1.0,)), Classes(range(2))
    _, leaking = probe.choose(target, twins, twice, 0, always=True)
    _, score = probe.choose(target, twins, twice, 0, groups, always=True)
    asked = {"cv": StratifiedGroupKFold(3), "groups": groups.numpy(), "scoring": "average_precision"}
    each = [cross_val_score(reference(1.0), unit(twins), np.where(twice == c, 1, -1), **asked).mean() for c in (0, 1)]
    assert score == pytest.approx(np.mean(each))
    assert leaking is not None
    assert leaking > np.mean(each) + 0.05


def test_a_class_of_one_row_takes_the_cost_of_the_others_and_no_class_of_two_is_an_error():
    train, _ = tagged(41, 0)
    labels = torch.cat([(train[:40, 0] > 0).long(), torch.tensor([2])])
    setting, _ = Svm(c=COSTS).choose(Classes(range(3)), train, labels, 0)
    assert setting["C of 2"] in (setting["C of 0"], setting["C of 1"])
    with pytest.raises(DataError, match="C cannot be chosen; give it one value"):
        Svm(c=COSTS).choose(Classes(range(3)), train[:3], torch.arange(3), 0)
    assert Svm(c=(1.0,)).choose(Classes(range(3)), train[:3], torch.arange(3), 0) == ({"C": 1.0}, None)


def test_fits_that_did_not_converge_are_told():
    train, labels = tagged(80, 0)
    probe = Svm(c=(100.0,), max_iter=1)
    list(probe.predict(Labels(["a", "b", "c"]), train, labels, train, probe.settings(), 0))
    assert set(probe.warnings) == {"some SVMs did not converge in 1 iterations"}


def voc_precision(score: np.ndarray, truth: np.ndarray) -> float:
    """As the development kit of VOC 2010 computes it, rows in order of falling scores."""
    right = truth[np.argsort(-score)]
    recall, precision = right.cumsum() / right.sum(), right.cumsum() / np.arange(1, len(right) + 1)
    recall, precision = np.r_[0, recall, 1], np.r_[0, precision, 0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    steps = np.flatnonzero(np.diff(recall)) + 1
    return float(((recall[steps] - recall[steps - 1]) * precision[steps]).sum())


def test_interpolated_precision_is_that_of_voc():
    random = np.random.default_rng(0)
    truth = random.random((60, 4)) < [0.5, 0.3, 0.1, 0.0]
    scores = random.normal(size=(60, 4)) + truth
    found = interpolated_average_precision(torch.from_numpy(scores), torch.from_numpy(truth))
    assert found == pytest.approx(np.mean([voc_precision(scores[:, i], truth[:, i]) for i in range(3)]))
    assert found > average_precision_score(truth[:, :3], scores[:, :3])
    # Rows of one score are found together, in either.
    equal = (scores * 2).round().astype(np.float32)
    given = torch.from_numpy(equal), torch.from_numpy(truth)
    assert mean_average_precision(*given) == pytest.approx(average_precision_score(truth[:, :3], equal[:, :3]))
    curves = [precision_recall_curve(truth[:, i], equal[:, i]) for i in range(3)]
    best = [-(np.diff(recall) * np.maximum.accumulate(precision)[:-1]).sum() for precision, recall, _ in curves]
    assert interpolated_average_precision(*given) == pytest.approx(np.mean(best))
    assert math.isnan(mean_average_precision(given[0].log(), given[1]))
    # Where precision never rises with recall both are one.
    order, right = torch.tensor([[4.0], [3.0], [2.0], [1.0]]), torch.tensor([[True], [True], [False], [True]])
    assert average_precision_score(right, order) == pytest.approx(11 / 12)
    assert interpolated_average_precision(order, right) == pytest.approx(11 / 12)
