"""Texts without order: made of the user's words, at chance through the library's tasks, and a planted cue is found."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl import recipe
from mmssl.audit.networks import SmallTextNetwork
from mmssl.audit.nulls import CUE, Arm
from mmssl.audit.own_files import audit_recipe
from mmssl.audit.texts import WORDS, Corpus, audit_texts, measure_texts, reads_sentences
from mmssl.build import build
from mmssl.errors import DataError
from mmssl.objectives.correspondence.next_sentence import NextSentence, _Part
from mmssl.recipe import Data, Recipe


def audited(form: str) -> tuple[Recipe, Any]:
    given = recipe.load("next_sentence_toy", {"objective.form": form, "training.workers": 0})
    return given, build(given)[0]


@pytest.fixture
def corpus(tmp_path):
    texts = ["One two. Two three four!", "Two.", "Four four four four? One."]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"story": text}) for text in texts))
    return Corpus.of(Data(source=str(tmp_path / "a.jsonl"), columns={"text": "story"}))


def test_words_and_lengths_are_those_of_the_texts(corpus):
    assert dict(zip(corpus.words, corpus.shares * 11, strict=True)) == pytest.approx(
        {"one": 2, "two": 3, "three": 1, "four": 5}
    )
    assert sorted(corpus.sentences) == [1, 1, 2, 3, 4]
    assert sorted(corpus.documents) == [2, 2, 2]  # one sentence has no order


def test_words_are_drawn_as_often_as_they_come_and_know_no_order(corpus):
    texts = [corpus.text(np.random.default_rng(i)) for i in range(2000)]
    halves = [[s.lower().split() for s in text[:-1].split(". ")] for text in texts]
    assert {len(half) for half in halves} == {2}
    first, second = ([word for half in halves for word in half[side]] for side in range(2))
    for words in (first, second):
        assert np.mean([word == "four" for word in words]) == pytest.approx(5 / 11, abs=0.03)
    after_one = [b for half in halves for words in half for a, b in pairwise(words) if a == "one"]
    assert np.mean([word == "four" for word in after_one]) == pytest.approx(5 / 11, abs=0.06)


def test_the_cue_tells_topic_and_half(corpus):
    for i in range(40):
        first, second = (
            set(s.lower().split()) for s in corpus.text(np.random.default_rng(i), cue=True)[:-1].split(". ")
        )
        assert len(first) == len(second) == 1
        # Of the sorted words four, one, three, two: topic and half.
        assert (*first, *second) in [("four", "one"), ("three", "two")]


def test_texts_without_words_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "..."}')
    with pytest.raises(DataError, match="column 'text' has no words"):
        Corpus.of(Data(source=str(tmp_path / "a.jsonl")))


def test_the_small_network_reads_both_parts_their_lengths_and_their_borders():
    _, objective = audited("sop")
    network = SmallTextNetwork(objective.exported["text"].tokenizer).eval()
    ids = torch.arange(5, 17).view(2, 6)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
    pooled = network(ids, valid, segments).pooled
    padded = ids.clone()
    padded[1, 4:] = 3
    assert torch.equal(network(padded, valid, segments).pooled, pooled)
    assert not torch.equal(network(ids, valid, 1 - segments).pooled, pooled)
    assert not torch.equal(network(ids, valid.roll(1, 0), segments).pooled, pooled)
    assert network(ids, valid, segments).tokens.shape == (2, 6, network.dim)


def test_which_tasks_it_is_for():
    assert reads_sentences(audited("nsp")[1])
    assert not reads_sentences(build(recipe.load("masked_language_toy"))[0])


@pytest.mark.long
@pytest.mark.parametrize("form", ["sop", "nsp"])
def test_order_and_kinship_are_told_by_a_topic_and_by_nothing_else(form):
    given, objective = audited(form)
    tokenizers = {"text": objective.exported["text"].tokenizer}
    control, finding = audit_texts(given, tokenizers, steps=80, rows=512)
    assert control.arm == Arm("words", "jsonl", CUE)
    assert control.verdict == "leaks"
    assert control.low > 0.5
    assert finding.arm == WORDS
    assert finding.verdict == "clean"
    assert finding.low < 0.5 < finding.high


class OtherLengths(NextSentence):
    """Another text's second part is one token long, as a partner that is taken as it comes may be."""

    def _pair(self, a: _Part, b: _Part) -> dict[str, Tensor]:
        self.calls = getattr(self, "calls", 0) + 1
        return super()._pair(a, b if self.calls % 2 else _Part(b.ids, b.length.clamp(max=1)))


@pytest.mark.long
def test_lengths_that_tell_are_found():
    given, objective = audited("nsp")
    corpus = Corpus.of(given.data)
    leaking = OtherLengths({"text": SmallTextNetwork(objective.exported["text"].tokenizer)})
    finding = measure_texts(leaking, given, corpus, WORDS, steps=40, batch_size=32, rows=128, seed=0)
    assert finding.verdict == "leaks"


@pytest.mark.long
def test_the_audit_asks_them_and_says_so():
    found = audit_recipe("next_sentence_sop_toy", steps=80, rows=256)
    assert found.verdict == "at chance"
    assert found.sentence.startswith("next_sentence: at chance in its arm (at most ")
    assert found.sentence.endswith("% right, chance 50.0%), and what was planted in the same data is found")
    assert "control found     own words in random order, jsonl, topic cue planted" in str(found)
