"""Probes against brute force and scikit-learn; the choice of hyper-parameters."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mmssl import registry
from mmssl.adaptation.probes.knn import Knn
from mmssl.adaptation.probes.logistic import Logistic
from mmssl.adaptation.probes.ridge import Ridge
from mmssl.adaptation.targets.classes import Classes
from mmssl.errors import DataError


def blobs(rows: int, classes: int = 4, width: int = 12, noise: float = 1.0, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (rows,), generator=random)
    return centers[labels] + noise * torch.randn(rows, width, generator=random), labels


def classes(labels: torch.Tensor) -> Classes:
    return Classes(range(int(labels.max()) + 1))


def predicted(probe, train, labels, test, settings=None):
    """The class that each setting answers for each row."""
    answers = probe.predict(classes(labels), train, labels, test, settings or probe.settings(), 0)
    return [answer.argmax(1) for answer in answers]


def hold_out(labels, share, seed, groups=None):
    return classes(labels).hold_out(labels, share, seed, groups)


def test_every_probe_is_found_by_name():
    assert {"knn", "ridge", "logistic", "svm", "mlp", "attentive", "finetune"} <= set(registry.components("probe"))
    for name in registry.components("probe"):
        assert registry.find("probe", name).__name__.lower() == name.replace("_", "")


@pytest.mark.quick(1)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_knn_equals_brute_force(temperature):
    train, labels = blobs(150, noise=2.0)
    test, _ = blobs(100, noise=2.0, seed=1)
    probe = Knn(k=(1, 7, 60), temperature=temperature)
    a = train.double().numpy() / np.linalg.norm(train.double().numpy(), axis=1, keepdims=True)
    b = test.double().numpy() / np.linalg.norm(test.double().numpy(), axis=1, keepdims=True)
    for setting, guess in zip(probe.settings(), predicted(probe, train, labels, test), strict=True):
        for row, got in zip(b, guess, strict=True):
            similarity = a @ row
            nearest = np.argsort(-similarity)[: setting["k"]]
            votes = [sum(math.exp(similarity[j] / temperature) for j in nearest if labels[j] == c) for c in range(4)]
            assert got == int(np.argmax(votes))


@pytest.mark.parametrize("k", [1, 5, 21])
def test_knn_with_one_vote_each_equals_scikit_learn(k):
    train, labels = blobs(200, classes=2, noise=2.0)
    test, _ = blobs(80, classes=2, noise=2.0, seed=1)
    (guess,) = predicted(Knn(k=(k,), temperature=math.inf), train, labels, test)
    other = KNeighborsClassifier(k, metric="cosine").fit(train.numpy(), labels.numpy()).predict(test.numpy())
    assert guess.tolist() == other.tolist()


def test_knn_survives_few_rows_low_temperature_and_null_vectors():
    train, labels = torch.cat([torch.zeros(1, 3), torch.eye(3)]), torch.tensor([0, 0, 1, 2])
    for guess in predicted(Knn(temperature=1e-4), train, labels, torch.eye(3)):
        assert guess.tolist() == [0, 1, 2]


@pytest.mark.parametrize("width", [5, 300])  # fewer and more features than rows
def test_ridge_equals_scikit_learn(width):
    train, labels = blobs(120, classes=5, width=width, noise=2.0)
    test, _ = blobs(200, classes=5, width=width, noise=2.0, seed=1)
    train = train * torch.logspace(-3, 3, width) + 5
    test = test * torch.logspace(-3, 3, width) + 5
    probe = Ridge(alpha=(1.0, 0.1, 1e-3))
    scaler = StandardScaler().fit(train.double().numpy())
    for setting, guess in zip(probe.settings(), predicted(probe, train, labels, test), strict=True):
        other = RidgeClassifier(alpha=setting["alpha"] * len(train))
        other.fit(scaler.transform(train.double().numpy()), labels.numpy())
        assert guess.tolist() == other.predict(scaler.transform(test.double().numpy())).tolist()


def test_ridge_takes_features_that_never_change():
    train, labels = blobs(50)
    train[:, 3] = 7.0
    (guess,) = predicted(Ridge(alpha=(1e-3,)), train, labels, train)
    assert (guess == labels).float().mean() > 0.5


def test_logistic_equals_scikit_learn_from_a_cold_start():
    train, labels = blobs(150, noise=2.0)
    test, _ = blobs(150, noise=2.0, seed=1)
    probe = Logistic(c=(1e-3, 0.1, 1.0))
    scaler = StandardScaler().fit(train.double().numpy())
    for setting, guess in zip(probe.settings(), predicted(probe, train, labels, test), strict=True):
        other = LogisticRegression(C=setting["C"], max_iter=1000)
        other.fit(scaler.transform(train.double().numpy()), labels.numpy())
        assert (guess.numpy() == other.predict(scaler.transform(test.double().numpy()))).mean() > 0.99
    assert not probe.warnings


def test_logistic_counts_fits_that_did_not_converge():
    train, labels = blobs(100)
    probe = Logistic(c=(1.0,), max_iter=1)
    predicted(probe, train, labels, train)
    assert len(probe.warnings) == 1
    assert "C=1" in probe.warnings[0]


@pytest.mark.parametrize("name", ["knn", "ridge", "logistic"])
def test_a_class_that_training_lacks_is_never_guessed(name):
    train, labels = blobs(80)
    keep = labels != 1
    probe = registry.find("probe", name)()
    for guess in predicted(probe, train[keep], labels[keep], train):
        assert 1 not in guess.unique()
        assert (guess == labels)[keep].float().mean() > 0.3


def test_hold_out_takes_a_share_of_each_class_and_never_all_of_it():
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2 + [3])
    held = hold_out(labels, 0.2, 0)
    assert [int(held[labels == c].sum()) for c in range(4)] == [20, 2, 1, 0]
    assert torch.equal(held, hold_out(labels, 0.2, 0))
    assert not torch.equal(held, hold_out(labels, 0.2, 1))


def test_hold_out_never_divides_a_group():
    groups = torch.randint(0, 40, (300,), generator=torch.Generator().manual_seed(0))
    labels = groups % 3
    held = hold_out(labels, 0.2, 0, groups)
    assert 0 < held.sum() < 300
    assert not set(groups[held].tolist()) & set(groups[~held].tolist())


def test_groups_remove_the_reward_of_remembering():
    # Twins: a row's nearest neighbor is its own copy, so one neighbor looks perfect unless groups are kept together.
    vectors, labels = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 4
    twins, twice, groups = vectors.repeat(2, 1), labels.repeat(2), torch.arange(200).repeat(2)
    leaking, _ = Knn(temperature=math.inf).choose(classes(twice), twins, twice, 0)
    assert leaking == {"k": 1}
    held = hold_out(twice, 0.2, 0, groups)
    (guess,) = predicted(Knn(k=(1,)), twins[~held], twice[~held], twins[held])
    assert (guess == twice[held]).float().mean() < 0.5


def test_choose_takes_the_best_candidate_of_the_held_out_rows():
    train, labels = blobs(1500, noise=3.0)
    probe = Knn()
    chosen, _ = probe.choose(classes(labels), train, labels, 0)
    held = hold_out(labels, 0.2, 0)
    fitted = predicted(probe, train[~held], labels[~held], train[held])
    scores = [(g == labels[held]).float().mean().item() for g in fitted]
    best = [s["k"] for s, a in zip(probe.settings(), scores, strict=True) if a == max(scores)]
    assert chosen["k"] == best[0]
    assert len(set(scores)) > 1


def test_choose_needs_rows_to_spare_or_one_candidate():
    train, _ = blobs(4)
    with pytest.raises(DataError, match="k cannot be chosen"):
        Knn().choose(Classes(range(4)), train, torch.arange(4), 0)
    assert Knn(k=(3,)).choose(Classes(range(4)), train, torch.arange(4), 0) == ({"k": 3}, None)


@pytest.mark.parametrize(("rows", "times"), [(20, 10), (500, 3), (2000, 1)])
def test_few_validation_rows_are_held_out_again(rows, times):
    labels = torch.arange(rows) % 2
    held: list[torch.Tensor] = []

    class Watched(Knn):
        def predict(self, target, train, labels, test, settings, seed):
            held.append(test[:, 0])
            for setting in settings:  # right of one class for the first setting, and of all rows for the second
                yield target.matrix((test[:, 0].long() % 2) * (setting["k"] == 3))

    train = torch.stack([torch.arange(rows), torch.zeros(rows)], 1).float()
    assert Watched(k=(5, 3)).choose(classes(labels), train, labels, 0) == ({"k": 3}, 1.0)
    assert len({tuple(one.tolist()) for one in held}) == len(held) == times


def test_shots_are_drawn_per_class():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    index = classes(labels).draw_shots(labels, 5, 0)
    assert labels[index].bincount().tolist() == [5, 3, 5]
    assert len(index.unique()) == len(index)
    assert not torch.equal(index, classes(labels).draw_shots(labels, 5, 1))
