"""The class of every word: scores and answers are scikit-learn's on all words, and tokens are where words are."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import mmssl
from mmssl.adaptation.placed import Placed
from mmssl.adaptation.probes.tagging import Tagging, WordRows
from mmssl.adaptation.rows import Reads, open_rows
from mmssl.adaptation.table import CONSTANT, PRETRAINED, RANDOM
from mmssl.adaptation.targets.tags import Tags
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import DataError, RecipeError
from mmssl.media.text import Tokenizer
from mmssl.recipe import Data

NAMES = {
    "Ada": "PER",
    "Turing": "PER",
    "Paris": "LOC",
    "Rome": "LOC",
    "saw": "O",
    "left": "O",
    "in": "O",
    "again,": "O",
}
HOW = Data(source="here", text={"length": 24})
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def sentences(rows: int, seed: int) -> datasets.Dataset:
    dice = np.random.default_rng(seed)
    words = [list(dice.choice([*NAMES], dice.integers(2, 8))) for _ in range(rows)]
    tags = [[NAMES[word] for word in row] for row in words]
    return datasets.Dataset.from_dict({"text": ["  ".join(row) for row in words], "words": words, "tags": tags})


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(sentences(50, 9)["text"], 60)  # so few that words have several tokens


class Spelling(Encoder):
    """Says of each token which one it is and which comes next, or nothing at all."""

    modality, dim = "text", 120

    def __init__(self, tokenizer: Tokenizer, mute: bool = False) -> None:
        super().__init__()
        self.one, self.tokenizer, self.mute = nn.Parameter(torch.ones(())), tokenizer, mute

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        own = nn.functional.one_hot(x, 60).float()
        tokens = torch.cat([own, own.roll(-1, 1)], 2) * self.one * (not self.mute)
        return Features(tokens, tokens.mean(1), (x.shape[1],), valid)

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        return {"first": self(x, valid)}


def asked(encoder, train=None, **options):
    options = {"test": sentences(12, 1), "data": HOW, "label": "tags", "baseline": False} | options
    return mmssl.adapt(encoder, sentences(24, 0) if train is None else train, probe="tagging", **options)


def target_of(rows, tokenizer, how=HOW) -> tuple[Tags, Tensor, list[str]]:
    split = open_rows(rows, Reads(("text",), {"text": tokenizer}), how, None, None, "train")
    cells = [Placed(split, row, "tags") for row in range(len(rows))]
    target = Tags(cells)
    labels = target.encode(cells)
    return target, labels, target.look(labels, labels)


@pytest.mark.long
def test_an_encoder_that_spells_finds_names_and_a_mute_one_does_not(tokenizer):
    table = asked(Spelling(tokenizer), layers=True, c=(10.0,))
    assert table.row(PRETRAINED).metrics == {"macro_f1": 1.0, "accuracy": 1.0}
    assert table.row(PRETRAINED, "first").metrics == table.row(PRETRAINED).metrics
    assert table.counts["classes"] == 3
    mute = asked(Spelling(tokenizer, mute=True), c=(10.0,))
    assert mute.row(PRETRAINED).metrics == mute.row(CONSTANT).metrics
    listed = asked(Spelling(tokenizer), columns={"text": "words"}, c=(10.0,))
    assert listed.row(PRETRAINED).metrics == table.row(PRETRAINED).metrics


def test_scores_equal_scikit_learns_on_flattened_words(tokenizer):
    rows = sentences(9, 0)
    target, labels, told = target_of(rows, tokenizer)
    assert (target.names, told) == (("LOC", "O", "PER"), [])
    flat = [tag for row in rows["tags"] for tag in row]
    answers = torch.rand(9, 7, 3, generator=torch.Generator().manual_seed(0))
    answers = answers[:, : target.classes(labels).shape[1]]
    said = [target.names[number] for number in answers.argmax(2)[target.words(labels)]]
    found = target.score(answers, labels)
    assert found["accuracy"] == pytest.approx(accuracy_score(flat, said))
    assert found["macro_f1"] == pytest.approx(f1_score(flat, said, average="macro"))
    share = target.constant(labels)
    assert share.flatten().tolist() == pytest.approx([flat.count(name) / len(flat) for name in target.names])
    most = max(target.names, key=flat.count)
    assert target.score(share, labels)["macro_f1"] == pytest.approx(f1_score(flat, [most] * len(flat), average="macro"))


def test_answers_equal_scikit_learns_regression_on_the_words(tokenizer):
    target, labels, _ = target_of(sentences(9, 0), tokenizer)
    truth = target.classes(labels)[target.words(labels)].numpy()
    numbers = target.words(labels).sum(1)
    x = torch.randn(len(truth), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), numbers.cumsum(0)])
    words = WordRows(x, starts, torch.arange(9))
    (answers,) = Tagging().predict(target, words, labels, words, [{"C": 1.0}], 0)
    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    other = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(scaled, truth)
    assert answers[target.words(labels)].numpy() == pytest.approx(other.predict_proba(scaled), abs=1e-3)
    some = torch.tensor([4, 1])
    assert torch.equal(words[some].flat(), torch.cat([x[starts[4] : starts[5]], x[starts[1] : starts[2]]]))
    (few,) = Tagging().predict(target, words, labels, words[some], [{"C": 1.0}], 0)
    padded = pad_sequence([answers[4][: numbers[4]], answers[1][: numbers[1]]], batch_first=True)
    assert torch.allclose(few, padded, atol=1e-9)


def test_each_word_has_the_token_that_it_begins_with(tokenizer):
    text = " Turing  saw\tParis\nagain, "
    places = tokenizer.first_places(text, 24)
    ids, _ = tokenizer(text, 24)
    assert places[0] == 1  # after the start token
    for start, stop, word in zip(places, [*places[1:], None], text.split(), strict=True):
        own = ids[start:stop] if stop is not None else ids[start : start + len(tokenizer.token_starts(word))]
        assert tokenizer.decode(own).replace(" ", "") == word.lower()
    cut = tokenizer.first_places(text, int(places[2]) + 1)  # with an end token where the third word begins
    assert cut.tolist() == [*places[:2].tolist(), -1, -1]
    assert tokenizer.first_places("", 24).tolist() == []


def test_words_that_are_not_read_or_have_no_class_do_not_count(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["Ada saw Rome", "Paris in Rome"], "tags": [[1, 0, 2], [2, -100, -1]]})
    named = datasets.Dataset.from_dict({"text": rows["text"], "tags": [["b", "a", "c"], ["c", "", None]]})
    target, labels, _ = target_of(named, tokenizer)
    assert (target.names, target.classes(labels).tolist()) == (("a", "b", "c"), [[1, 0, 2], [2, -1, -1]])
    target, labels, told = target_of(rows, tokenizer)
    assert target.classes(labels).tolist() == [[1, 0, 2], [2, -1, -1]]
    assert (target.counts(labels), told) == ({"words": 4, "classes": 3}, [])
    second = int(tokenizer.first_places("Ada saw Rome", 24)[2])
    _, _, told = target_of(rows, tokenizer, Data(source="here", text={"length": second + 1}))
    assert "words are beyond text.length" in told[0]


def test_random_weights_stand_in_the_table(tokenizer):
    encoder = mmssl.encoder("transformers/bert", modality="text", tokenizer=tokenizer, **BERT)
    table = asked(encoder, baseline=True, seeds=2, shots=6, c=(1.0,))
    assert len(table.row(RANDOM).runs["macro_f1"]) == 2


def test_sentences_where_it_cannot_work(tokenizer):
    encoder = Spelling(tokenizer)
    bad = datasets.Dataset.from_dict({"text": ["Ada saw"] * 4, "tags": [["PER", "O", "O"]] * 4})
    with pytest.raises(DataError, match=r"row \d: 3 tags, and 2 words between white space; a list of words"):
        asked(encoder, bad, test=bad.select([0]))
    one = datasets.Dataset.from_dict({"text": ["Ada saw"] * 4, "tags": [["O", "O"]] * 4})
    with pytest.raises(DataError, match="all words of the 4 training rows have one tag or none"):
        asked(encoder, one, test=one.select([0]))
    odd = datasets.Dataset.from_dict({"text": ["Ada saw"] * 4, "tags": ["PER O"] * 4})
    with pytest.raises(DataError, match="tags are a list of names or whole numbers, found 'PER O'"):
        asked(encoder, odd, test=odd.select([0]))
    with pytest.raises(RecipeError, match="tagging reads texts, and encoder '' reads image"):
        asked(mmssl.encoder("timm/test_resnet", modality="image"))
    with pytest.raises(RecipeError, match="its tokenizer changes texts before it cuts them"):
        Tokenizer.open_clip("ViT-B-32").first_places("a b", 77)
