"""Retrieval as a probe: what counts as one item and as right, re-ranking, baselines, sentences where it cannot work."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from known_pairs import LENGTH, NAMES, Colors, rows, table

import mmssl
from mmssl import adapt
from mmssl.adaptation.canonical_correlation import (
    CanonicalCorrelation,
    bag_of_words,
    fit_canonical_correlation,
    frequent_words,
    raw_features,
)
from mmssl.decode_settings import ImageDecode, TextDecode
from mmssl.errors import DataError, RecipeError, RunError
from mmssl.objectives import reinitialized
from mmssl.recipe import Data

DATA = Data(source="", image=ImageDecode(size=16), text=TextDecode(length=LENGTH))
RIGHT = list(enumerate(NAMES))
PARTS = "parts that share nothing"


def retrieve(task, pairs, *more, **settings):
    return adapt(task, pairs, *more, probe="retrieval", **{"baseline": False, **settings})


def found(scores, encoder: str, query: str):
    """The row in which the items of `query` ask."""
    return scores.row(encoder, {"image": "image to text", "text": "text to image"}[query])


def recall(scores, encoder: str, query: str) -> dict[int, float]:
    """k -> recall at k."""
    metrics = found(scores, encoder, query).metrics
    return {int(name.removeprefix("recall_at_")): v for name, v in metrics.items() if name != "median_rank"}


def test_a_perfect_task_finds_everything_both_ways():
    scores = retrieve(Colors(), rows(RIGHT))
    for query in ("image", "text"):
        assert recall(scores, "pretrained", query) == {1: 1.0, 5: 1.0, 10: 1.0}
        assert found(scores, "pretrained", query).metrics["median_rank"] == 1
        assert recall(scores, "chance", query)[1] == pytest.approx(1 / 6)
        assert found(scores, "chance", query).metrics["median_rank"] == 3
        low, high = found(scores, "pretrained", query).interval["recall_at_1"]
        assert 0.5 < low < 0.7
        assert high == 1
    assert (scores.counts, scores.test_rows) == ({"image items": 6, "text items": 6, PARTS: 6}, 6)
    assert scores.margin == pytest.approx(1 - 1 / 6)


def test_wrong_pairs_are_never_found():
    shifted = [(color, NAMES[(color + 1) % 6]) for color in range(6)]
    scores = retrieve(Colors(), rows(shifted), ks=(1,))
    assert recall(scores, "pretrained", "image") == recall(scores, "pretrained", "text") == {1: 0.0}


def test_equal_items_stand_once_and_are_encoded_once():
    task = Colors()
    # Two texts for each of three pictures, and one text that two pictures share.
    pairs = [(0, "red"), (0, "red paint"), (1, "green"), (1, "green paint"), (2, "blue"), (2, "red")]
    scores = retrieve(task, rows(pairs), ks=(1, 3))
    assert (scores.counts["image items"], scores.counts["text items"]) == (3, 5)
    assert (task.encoder("image").calls, task.encoder("text").calls) == (3, 5)
    assert (scores.test_rows, scores.counts[PARTS]) == (6, 2)  # red and blue have a text in common
    assert recall(scores, "pretrained", "image")[1] == 1  # any of the right texts will do
    assert recall(scores, "pretrained", "text")[1] == 1  # red is right for "red", too
    chance = recall(scores, "chance", "image")[3]
    # 2, 2 and 3 of 5 texts are right (red's are 2, blue's 2): the chance that 3 draws miss all.
    assert chance == pytest.approx(1 - 1 / 10)


def test_groups_say_what_belongs_together():
    pairs = [(color, NAMES[(color + 1) % 6]) for color in range(6)]
    thing = [0, 0, 0, 1, 1, 1]
    none, some = retrieve(Colors(), rows(pairs)), retrieve(Colors(), rows(pairs, thing=thing), groups="thing")
    assert recall(none, "pretrained", "image")[1] == 0
    # The right name stands in another row of the group, except for 0 and 3, whose names are in the other group.
    assert recall(some, "pretrained", "image")[1] == pytest.approx(4 / 6)
    assert some.counts[PARTS] == 2
    same = retrieve(Colors(), table(pairs, thing=["x", "x", "x", "y", "y", "y"]), groups="thing", data=DATA)
    assert recall(same, "pretrained", "image") == recall(some, "pretrained", "image")
    with pytest.raises(DataError, match=r"no column 'thin' .*'thing'"):
        retrieve(Colors(), table(pairs, thing=thing), groups="thin", data=DATA)


def test_the_best_are_ordered_anew_by_what_sees_both():
    task = Colors(matches=True, contrary=True).train()
    scores = retrieve(task, rows(RIGHT), rerank=3, ks=(1, 2, 3))
    assert recall(scores, "pretrained", "image")[1] == 1
    # Of three candidates the right one comes last.
    assert recall(scores, "re-ranked", "image") == {1: 0, 2: 0, 3: 1}
    assert task.matched == 2 * 6 * 3
    assert task.training
    agreeing = retrieve(Colors(matches=True), rows(RIGHT), rerank=4)
    assert recall(agreeing, "re-ranked", "text")[1] == 1
    with pytest.raises(KeyError):
        retrieve(Colors(matches=True), rows(RIGHT), rerank=0).row("re-ranked")


def test_without_a_common_space_every_pair_is_matched():
    task = Colors(embeds=False, matches=True)
    scores = retrieve(task, rows([*RIGHT, (0, "red paint")]), batch_size=5)
    assert recall(scores, "pretrained", "text")[1] == 1
    assert task.matched == 2 * 6 * 7
    assert "re-ranked" not in {row.encoder for row in scores.rows}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = Colors().encoder("text").tokenizer
    encoders = {
        "image": mmssl.encoder("timm/test_resnet", modality="image"),
        "text": mmssl.encoder("transformers/bert", modality="text", tokenizer=tokenizer, **text),
    }
    return mmssl.objective("contrastive", encoders, width=8)


def test_baselines_stand_in_the_table(small):
    before = {name: value.clone() for name, value in small.state_dict().items()}
    train = table([(i % 6, f"{NAMES[i % 6]}{' paint' * (i % 3)}") for i in range(48)])
    scores = retrieve(small, train, table(RIGHT), data=DATA, baseline=True, seeds=2)
    assert [row.encoder for row in scores.rows] == [
        name for name in ("pretrained", "random", "raw", "chance") for _ in range(2)
    ]
    assert recall(scores, "raw", "image")[1] == 1  # a linear map of colors and words is all it takes
    assert found(scores, "random", "image").spread
    assert found(scores, "pretrained", "image").spread == {}
    text, read = str(scores), json.loads(json.dumps(scores.to_json()))
    assert "random-initialized" in text
    assert "linear maps of raw inputs" in text
    assert read["rows"][0]["metrics"]["recall_at_1"] == recall(scores, "pretrained", "image")[1]
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_random_weights_are_those_of_the_seed(small):
    one = retrieve(reinitialized(small, 4), table(RIGHT), data=DATA)
    other = retrieve(small, table(RIGHT), data=DATA, baseline=True, seed=4, seeds=1)
    assert recall(one, "pretrained", "text") == recall(other, "random", "text")
    assert torch.equal(reinitialized(small, 4).project_a.weight, reinitialized(small, 4).project_a.weight)
    assert not torch.equal(reinitialized(small, 5).project_a.weight, reinitialized(small, 4).project_a.weight)


def test_tasks_together_compare_what_each_does(small):
    encoders = dict(small.encoders.items())
    tasks = {"turn": {"name": "rotation"}, "pair": {"name": "contrastive", "width": 8}}
    both = mmssl.objective("combine", encoders, tasks=tasks)
    both.tasks["pair"].load_state_dict({k: v for k, v in small.state_dict().items() if not k.startswith("encoders.")})
    own, shared = retrieve(small, table(RIGHT), data=DATA), retrieve(both, table(RIGHT), data=DATA)
    assert own.rows == shared.rows
    assert reinitialized(both, 1).pairs[0][:2] == ("image", "text")


@pytest.mark.quick(1)
@pytest.mark.parametrize("suffix", ["", "/test.parquet"])
def test_a_test_split_alone_will_do(tmp_path, small, suffix):
    table(RIGHT).to_parquet(tmp_path / "test.parquet")
    scores = retrieve(small, f"{tmp_path}{suffix}", data=DATA, baseline=True, seeds=1)
    assert scores.test_rows == 6
    assert "raw" not in {row.encoder for row in scores.rows}  # there is nothing to learn it from
    table(RIGHT * 4).to_parquet(tmp_path / "train.parquet")
    assert "raw" in {row.encoder for row in retrieve(small, tmp_path, data=DATA, baseline=True, seeds=1).rows}


def test_sentences_where_it_cannot_work(small):
    image = small.encoder("image")
    with pytest.raises(RecipeError, match=r"give the task: run\.objective"):
        adapt(image, rows(RIGHT), probe="retrieval")
    with pytest.raises(RecipeError, match="name them as a and b"):
        adapt(small, rows(RIGHT), probe="retrieval", encoder="image")
    with pytest.raises(RecipeError, match="Rotation compares no two encoders"):
        retrieve(mmssl.objective("rotation", {"image": image}), rows(RIGHT))
    with pytest.raises(RecipeError, match="compares image and text, not sound and anything"):
        retrieve(Colors(), rows(RIGHT), a="sound")
    with pytest.raises(RecipeError, match=r"unknown key 'rernk' .*'rerank'"):
        retrieve(Colors(), rows(RIGHT), rernk=3)
    with pytest.raises(RecipeError, match="layers, shots and target"):
        retrieve(Colors(), rows(RIGHT), layers=True)
    with pytest.raises(RecipeError, match="baseline=False"):
        retrieve(Colors(), rows(RIGHT), baseline=True)
    with pytest.raises(RecipeError, match="ks = "):
        retrieve(Colors(), rows(RIGHT), ks=(0,))
    with pytest.raises(DataError, match="'image' is read, and the batches have: text"):
        retrieve(Colors(), [{k: v for k, v in batch.items() if k != "image"} for batch in rows(RIGHT)])
    with pytest.raises(DataError, match="there are no rows"):
        retrieve(Colors(), [])
    broken = Colors()
    broken.encoder("image").one.data.fill_(torch.nan)
    with pytest.raises(RunError, match="not finite"):
        retrieve(broken, rows(RIGHT))


def test_linear_maps_find_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 4, generator=generator)
    a = hidden @ torch.randn(4, 9, generator=generator) + 0.05 * torch.randn(300, 9, generator=generator)
    b = hidden @ torch.randn(4, 7, generator=generator) + 0.05 * torch.randn(300, 7, generator=generator)
    index = torch.arange(200)
    correlation, _ = fit_canonical_correlation(a, b, (index, index), index % 5 == 0)
    left, right = correlation(a[200:], b[200:])
    assert ((left @ right.T).argmax(1) == torch.arange(100)).double().mean() > 0.9
    # Canonical correlations: the first direction's correlation is the largest there is.
    tight = CanonicalCorrelation(a, b, 1e-9)
    x, y = ((side.double() - side.double().mean(0)) @ turn for side, turn in zip((a, b), tight.maps, strict=True))
    u, v = (torch.linalg.qr(side.double() - side.double().mean(0)).Q for side in (a, b))
    expected = torch.linalg.svdvals(u.T @ v)[:4]
    for i in range(4):
        assert torch.corrcoef(torch.stack([x[:, i], y[:, i]]))[0, 1].item() == pytest.approx(expected[i].item())


def test_raw_numbers_of_every_modality():
    assert raw_features("image", torch.zeros(2, 3, 40, 30, dtype=torch.uint8), None).shape == (2, 768)
    assert raw_features("video", torch.zeros(2, 9, 3, 16, 16, dtype=torch.uint8), None).shape == (2, 1536)
    assert raw_features("audio", torch.zeros(2, 4000), None).shape == (2, 512)
    ids, mask = torch.tensor([[5, 9, 5, 0], [7, 5, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    seen = raw_features("text", ids, mask)
    assert frequent_words(seen).tolist() == [5, 7, 9]
    assert bag_of_words(seen, torch.tensor([5, 7])).tolist() == [[1, 0], [1, 1]]


def test_a_wrong_pair_of_sources_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no such file or folder"):
        retrieve(Colors(), str(tmp_path / "nothing.parquet"), data=DATA)
    datasets.Dataset.from_dict({"text": ["red"]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match="no column 'image'"):
        retrieve(Colors(), tmp_path, data=DATA)


@pytest.mark.long
def test_rows_that_the_run_was_trained_on_are_said_and_so_is_a_missing_baseline(tmp_path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    recipe = {
        "encoders": {
            "image": {"model": "timm/test_resnet"},
            "text": {"model": "transformers/bert", "tokenizer": "train:120", **text},
        },
        "objective": {"name": "contrastive", "width": 8},
        "data": {"source": "toy", "limit": 32, "image": {"size": 16}, "text": {"length": 16}},
        "training": {"steps": 2, "batch_size": 8},
    }
    run = mmssl.run(recipe, out=tmp_path / "run", quiet=True)
    seen = mmssl.adapt(run, probe="retrieval", test=run.recipe.data, seeds=1)
    assert any("the run was trained on these rows" in warning for warning in seen.warnings)
    assert any("no linear maps" in note for note in seen.notes)
    unseen = mmssl.adapt(run, "toy", probe="retrieval", seeds=1, limit=32)
    assert "split test" in unseen.test
    assert not unseen.warnings
