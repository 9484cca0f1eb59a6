"""The one call: its table, its baselines, and what may not leak."""

import io
import json
import math
import os
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import mmssl
from mmssl import Table, adapt
from mmssl import encoder as create
from mmssl.adaptation.metrics import balanced_accuracy
from mmssl.adaptation.recipe_probes import ProbeDuring
from mmssl.adaptation.request import Model
from mmssl.decode_settings import ImageDecode
from mmssl.encoders import reinitialized
from mmssl.errors import DataError, RecipeError
from mmssl.ops.intervals import wilson
from mmssl.recipe import Data, Probe

SIZE = 16


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(7)
    return create("timm/test_resnet", modality="image").eval()


def pictures(rows: int, seed: int, classes: int = 3, noise: float = 60.0) -> tuple[np.ndarray, np.ndarray]:
    """Noise around a gray that is likely in its class; class 0 has half of the rows."""
    random = np.random.default_rng(seed)
    labels = np.where(random.random(rows) < 0.5, 0, random.integers(1, classes, rows))
    gray = 60 + 60 * (labels + 0.5 * random.standard_normal(rows))[:, None, None, None]
    pixels = gray + noise * random.standard_normal((rows, SIZE, SIZE, 3))
    return pixels.clip(0, 255).astype(np.uint8), labels


def as_batches(pixels, labels, **more) -> list[dict[str, torch.Tensor]]:
    rows = {"image": torch.from_numpy(pixels).permute(0, 3, 1, 2), "label": torch.from_numpy(labels)}
    rows |= {key: torch.as_tensor(value) for key, value in more.items()}
    return [{key: value[i : i + 64] for key, value in rows.items()} for i in range(0, len(labels), 64)]


def as_dataset(pixels, labels, **more) -> datasets.Dataset:
    def png(picture) -> dict[str, bytes]:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "png")
        return {"bytes": file.getvalue()}

    names = ["dark", "gray", "light"]
    table = {"picture": [png(p) for p in pixels], "kind": [names[i] for i in labels], **more}
    return datasets.Dataset.from_dict(table).cast_column("picture", datasets.Image())


@pytest.fixture(scope="module")
def scores(small) -> Table:
    return adapt(small, as_batches(*pictures(200, 0)), as_batches(*pictures(120, 1)), probe="ridge")


def row(scores: Table, encoder: str, layer: str = "pooled"):
    (found,) = [row for row in scores.rows if row.encoder == encoder and row.part in (layer, "")]
    return found


def accuracy(scores: Table, encoder: str = "pretrained") -> float:
    return row(scores, encoder).metrics["accuracy"]


def test_the_table_has_its_baselines(scores):
    assert [row.encoder for row in scores.rows] == ["pretrained", "random", "constant"]
    random, truth = row(scores, "random"), pictures(120, 1)[1]
    runs = random.runs["accuracy"]
    assert len(runs) == 3
    assert random.spread["accuracy"] == pytest.approx(np.std(runs, ddof=1))
    assert accuracy(scores, "random") == pytest.approx(np.mean(runs))
    assert len(set(runs)) > 1
    assert accuracy(scores, "constant") == pytest.approx((truth == 0).mean())
    assert row(scores, "constant").metrics["balanced_accuracy"] == pytest.approx(1 / 3)
    assert scores.score == accuracy(scores) > 0.6
    assert row(scores, "pretrained").interval["accuracy"] == wilson(scores.score, 120)
    assert scores.baseline == max(accuracy(scores, "random"), accuracy(scores, "constant"))
    assert scores.margin == pytest.approx(scores.score - scores.baseline)
    assert (scores.train_rows, scores.test_rows, scores.counts) == (200, 120, {"classes": 3})
    assert (scores.target, scores.metrics[0].name) == ("classes", "accuracy")


def test_the_random_row_is_the_fresh_encoder_itself(small, scores):
    same = adapt(
        reinitialized(small, 1), as_batches(*pictures(200, 0)), as_batches(*pictures(120, 1)), probe="ridge", seeds=2
    )
    runs = row(same, "random").runs["accuracy"]
    assert accuracy(same) == pytest.approx(runs[1], abs=0.05)  # its setting is its own, and not that of seed 0
    assert runs == row(scores, "random").runs["accuracy"][:2]


def test_text_and_json_say_the_same(scores):
    text = str(scores)
    assert f"{100 * scores.score:.1f}" in text
    assert "random-initialized" in text
    assert "constant answer" in text
    assert "95 % intervals, after ± one standard deviation over seeds 0, 1, 2\n" in text
    assert "95 % intervals, seed 0\n" in str(replace(scores, seeds=(0,)))
    read = json.loads(json.dumps(scores.to_json()))
    assert (read["score"], read["margin"]) == (scores.score, scores.margin)
    assert read["rows"][1]["runs"]["accuracy"] == list(row(scores, "random").runs["accuracy"])
    assert Table.from_json(read) == scores
    for change in ({"rows": []}, {"metrics": "x"}, {"rows": [read["rows"][0] | {"metrics": {"accuracy": "high"}}]}):
        with pytest.raises(ValueError, match=r"rows|metrics"):
            Table.from_json(read | change)


def test_test_rows_have_no_part_in_the_choice(small):
    pixels, labels = pictures(150, 1)
    train = as_batches(*pictures(150, 0))
    shuffled = np.random.default_rng(0).permutation(labels)
    for probe in ("knn", "ridge"):
        honest = adapt(small, train, as_batches(pixels, labels), probe=probe, seeds=1)
        permuted = adapt(small, train, as_batches(pixels, shuffled), probe=probe, seeds=1)
        few = adapt(small, train, as_batches(pixels[:20], labels[:20]), probe=probe, seeds=1)
        assert honest.rows[0].setting == permuted.rows[0].setting == few.rows[0].setting
        assert permuted.score < honest.score


def test_labels_without_meaning_score_as_the_constant_does(small):
    pixels, labels = pictures(300, 0)
    other, truth = pictures(300, 1)
    random = np.random.default_rng(3)
    none = adapt(small, as_batches(pixels, random.permutation(labels)), as_batches(other, random.permutation(truth)))
    low, high = none.rows[0].interval["accuracy"]
    assert low - 0.05 < accuracy(none, "constant") < high + 0.05


@pytest.mark.long
def test_layers_are_probed_in_order_for_both_encoders(small):
    train, test = as_batches(*pictures(150, 0)), as_batches(*pictures(80, 1))
    deep = adapt(small, train, test, probe="ridge", layers=True, seeds=2)
    depths = list(small.layers(torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)))
    assert [r.part for r in deep.rows if r.encoder == "pretrained"] == ["pooled", *depths]
    assert [r.part for r in deep.rows if r.encoder == "random"] == ["pooled", *depths]
    assert all(r.setting for r in deep.rows if r.encoder != "constant")
    shallow = adapt(small, train, test, probe="ridge", seeds=2)
    assert shallow.rows == deep.rows[:3]
    with pytest.raises(RecipeError, match="finetune trains the encoder"):
        adapt(small, train, test, probe="finetune", layers=True)


def test_without_test_rows_a_fifth_is_held_out_and_groups_are_not_divided(small):
    # Twins whose labels have nothing to do with how they look: only a memory can tell.
    pixels, labels = pictures(100, 0)
    labels = np.random.default_rng(1).permutation(labels)
    train = as_batches(np.repeat(pixels, 2, 0), np.repeat(labels, 2), thing=np.repeat(np.arange(100), 2))
    alone = adapt(small, train, probe="knn", seeds=1, k=(1,))
    apart = adapt(small, train, probe="knn", seeds=1, k=(1,), groups="thing")
    assert alone.train_rows + alone.test_rows == 200
    assert 30 <= alone.test_rows <= 50
    assert "held out" in alone.test
    assert "'thing' undivided" in apart.test
    assert apart.score < 0.6 < 0.75 < alone.score
    choices = {"probe": "knn", "seeds": 1, "k": (1, 51), "temperature": math.inf}
    for test in (None, train):
        assert adapt(small, train, test, **choices).rows[0].setting == {"k": 1}
        assert adapt(small, train, test, groups="thing", **choices).rows[0].setting == {"k": 51}
    with pytest.raises(DataError, match="no key 'nothing'"):
        adapt(small, train, groups="nothing")


def test_a_dataset_gives_what_its_rows_give_as_batches(small):
    train, test = pictures(120, 0), pictures(80, 1)
    data = Data(source="x", image=ImageDecode(size=SIZE))
    from_tables = adapt(
        small,
        as_dataset(*train),
        as_dataset(*test),
        label="kind",
        probe="ridge",
        seeds=1,
        data=data,
        columns={"image": "picture"},
    )
    from_batches = adapt(small, as_batches(*train), as_batches(*test), probe="ridge", seeds=1)
    assert from_tables.rows == from_batches.rows


def test_files_folders_and_their_own_test_split(small, tmp_path):
    train, test = as_dataset(*pictures(120, 0), thing=list(range(120))), as_dataset(*pictures(60, 1), thing=[0] * 60)
    train.to_parquet(str(tmp_path / "train.parquet"))
    test.to_parquet(str(tmp_path / "test.parquet"))
    common = {
        "label": "kind",
        "probe": "ridge",
        "seeds": 1,
        "columns": {"image": "picture"},
        "data": Data(source="x", image=ImageDecode(size=SIZE)),
    }
    folder = adapt(small, str(tmp_path), **common)
    named = adapt(small, tmp_path / "train.parquet", str(tmp_path / "test.parquet"), **common)
    assert folder.rows == named.rows
    assert "split test" in folder.test
    assert (folder.train_rows, folder.test_rows) == (120, 60)
    for split in ("test", "validation"):
        (tmp_path / split).mkdir()
        test.to_parquet(str(tmp_path / split / f"{split}.parquet"))
        alone = adapt(small, tmp_path / "train.parquet", tmp_path / split, **common)
        assert alone.rows == named.rows
        assert f"split {split}" in alone.test
    one_file = adapt(small, tmp_path / "train.parquet", groups="thing", **common)
    assert "held out" in one_file.test
    assert one_file.train_rows + one_file.test_rows == 120
    with pytest.raises(DataError, match="the same rows"):
        adapt(small, tmp_path / "train.parquet", tmp_path / "train.parquet", **common)
    with pytest.raises(DataError, match=r"has no column 'kinds'.*did you mean 'kind'"):
        adapt(small, tmp_path / "train.parquet", tmp_path / "test.parquet", **common | {"label": "kinds"})
    with pytest.raises(DataError, match="no split 'train'"):
        adapt(small, tmp_path / "test", **common)


def test_column_names_of_the_recipe_do_not_bind_another_source(small, tmp_path):
    table = as_dataset(*pictures(80, 0)).rename_column("picture", "image")
    table.to_parquet(str(tmp_path / "rows.parquet"))
    recipe = Data(source="x", columns={"image": "photo"}, image=ImageDecode(size=SIZE))
    found = adapt(small, tmp_path / "rows.parquet", label="kind", probe="ridge", seeds=1, data=recipe)
    assert found.train_rows + found.test_rows == 80
    with pytest.raises(DataError, match="no column 'photo'"):
        adapt(small, tmp_path / "rows.parquet", label="kind", data=recipe, columns={"image": "photo"})


def test_few_shots_use_few_rows(small):
    train, test = as_batches(*pictures(300, 0)), as_batches(*pictures(100, 1))
    few = adapt(small, train, test, probe="knn", k=(1,), shots=2)
    many = adapt(small, train, test, probe="knn", k=(1,))
    assert len(few.rows[0].runs["accuracy"]) == 3
    assert few.rows[0].spread["accuracy"] > 0
    assert (few.shots, few.train_rows) == (2, 300)
    assert "(2 shots)" in str(few)
    share = adapt(small, train, test, probe="knn", k=(1,), shots="2 %")
    assert (share.shots, share.drawn) == ("2%", (6, 6, 6))
    assert "300 training rows, 2 % of labels (6 rows), 100 test rows" in str(share)
    with pytest.raises(DataError, match=r"alpha cannot be chosen .*; learn from more than 3, or give it one value"):
        adapt(small, train, test, probe="ridge", shots="1%")
    assert len(many.rows[0].runs["accuracy"]) == 1


@pytest.mark.long
def test_finetuning_is_the_same_call_and_leaves_the_encoder_alone(small):
    state = {key: value.clone() for key, value in small.state_dict().items()}
    train, test = as_batches(*pictures(90, 0)), as_batches(*pictures(60, 1))
    tuned = adapt(small, train, test, probe="finetune", seeds=1, steps=30, lr=(3e-3,), decay=(1.0,))
    assert [row.encoder for row in tuned.rows] == ["pretrained", "random", "constant"]
    assert tuned.score > accuracy(tuned, "constant") + 0.1
    assert tuned.validation == ""  # there was one candidate
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())


def test_classes_that_only_the_test_has_count_as_wrong_and_are_said(small):
    pixels, labels = pictures(100, 1)
    some = as_batches(*pictures(100, 0))
    wrong = adapt(small, some, as_batches(pixels, np.full_like(labels, 9)), seeds=1)
    assert wrong.score == 0
    assert "100 test rows are of classes that no training row has" in str(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe": "ridg"}, "did you mean 'ridge'"),
        ({"probe": "ridge", "alphas": (1,)}, "did you mean 'alpha'"),
        ({"shots": 0}, "shots = 0"),
    ],
)
def test_mistakes_in_the_call_are_named(small, change, message):
    with pytest.raises(RecipeError, match=message):
        adapt(small, [], **change)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(10, dtype=torch.long), "of one class"),
        (torch.arange(10), "is this column really a label"),
        (torch.tensor([-2] + [0] * 9), "class numbers from 0"),
        (torch.full((10, 3), 2), "should be zeros and ones"),
        (torch.zeros(10, 3, dtype=torch.long), "all of them are empty"),
        (torch.zeros(10), "the value is the same in all"),
        (torch.tensor([-1] * 10), "no row has a label"),
        (torch.zeros(10, 3, 3), r"should be \(B,\), \(B, C\)"),
    ],
)
def test_labels_that_are_no_classes_are_named(small, labels, message):
    pixels = torch.zeros(10, 3, SIZE, SIZE, dtype=torch.uint8)
    with pytest.raises(DataError, match=message):
        adapt(small, [{"image": pixels, "label": labels}], seeds=1)


def test_wilson_interval_of_known_cases():
    # Newcombe 1998, table I: 81 of 263.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_balanced_accuracy_equals_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score

    random = torch.Generator().manual_seed(0)
    truth, guess = torch.randint(2, 7, (200,), generator=random), torch.randint(2, 7, (200,), generator=random)
    assert balanced_accuracy(guess == truth, truth) == pytest.approx(balanced_accuracy_score(truth, guess))


def test_a_probe_during_training_decodes_once_and_sees_the_encoder_change(small, tmp_path, monkeypatch):
    as_dataset(*pictures(120, 0)).to_parquet(str(tmp_path / "train.parquet"))
    data = Data(
        source=str(tmp_path / "train.parquet"),
        columns={"image": "picture", "label": "kind"},
        image=ImageDecode(size=SIZE),
    )
    network = reinitialized(small, 0).train()
    probe = ProbeDuring(Probe(probe="ridge"), Model.of(network), data)
    monkeypatch.setattr("mmssl.data.loader.read", None)
    first = probe()
    assert first == probe()
    assert network.training
    assert set(first) == {"accuracy", "balanced_accuracy", "accuracy_constant"}
    assert first["accuracy"] > first["accuracy_constant"]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert probe()["accuracy"] == pytest.approx(first["accuracy_constant"])


def test_a_probe_during_training_never_learns_what_it_scores(small, tmp_path):
    # Twins with labels that mean nothing: who learned the held-out rows too is always right, who keeps twins together
    # is not.
    pixels, labels = pictures(100, 0)
    labels = np.random.default_rng(1).permutation(labels)
    table = as_dataset(np.repeat(pixels, 2, 0), np.repeat(labels, 2), thing=np.repeat(np.arange(100), 2).tolist())
    table.to_parquet(str(tmp_path / "train.parquet"))
    data = Data(source=str(tmp_path / "train.parquet"), columns={"image": "picture"}, image=ImageDecode(size=SIZE))
    divided = ProbeDuring(Probe(label="kind"), Model.of(small), data)()["accuracy"]
    together = ProbeDuring(Probe(label="kind", groups="thing"), Model.of(small), data)()["accuracy"]
    assert together < 0.6 < 0.7 < divided < 0.97


@pytest.mark.long
def test_the_toy_world_by_its_name(small):
    toy = mmssl.adapt(
        small, "toy", label="shape", seeds=1, limit=60, data=Data(source="toy", image=ImageDecode(size=SIZE))
    )
    assert (toy.train_rows, toy.test_rows) == (60, 60)
    assert toy.test == "toy, split test"


@pytest.mark.long
@pytest.mark.skipif("MMSSL_DATA" not in os.environ, reason="MMSSL_DATA names no folder of real data")
def test_real_emoji_from_the_train_to_the_test_split(small):
    source = f"{os.environ['MMSSL_DATA']}/emoji"
    found = adapt(small, source, label="category", groups="concept", probe="ridge", seeds=1, limit=300)
    assert found.test == f"{source}, split test"
    assert (found.train_rows, found.test_rows) == (300, 300)
    assert found.score > accuracy(found, "constant")
