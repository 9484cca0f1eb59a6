"""Long texts are read from everywhere, to their last word, and from sentences where a task needs whole ones."""

from __future__ import annotations

import pytest
import torch

from mmssl.data.columns import Decoder
from mmssl.decode_settings import TextDecode
from mmssl.media.passage import passage
from mmssl.media.text import Tokenizer
from mmssl.recipe import Data

WORDS = [f"w{n:03d}" for n in range(400)]
LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(WORDS), "One two. Three!"] * 3, 1000)


def read(text, tokenizer, start, window):
    ids, mask = tokenizer(passage(text, tokenizer.token_starts, LENGTH, start, window), LENGTH)
    return tokenizer.decode(ids[mask]).split()


@pytest.mark.long
def test_every_word_of_a_long_text_is_read_alike_often(tokenizer):
    text = " ".join(WORDS)
    counts = dict.fromkeys(WORDS, 0)
    for k in range(2000):
        for word in read(text, tokenizer, "random", k / 2000):
            counts[word] += 1
    assert min(counts.values()) > 0
    inner = [counts[word] for word in WORDS[80:-80]]
    assert max(inner) < 1.1 * min(inner)
    assert set(read(text, tokenizer, "first", 0.7)) <= set(WORDS[:63])
    last = read(text, tokenizer, "random", 0.9999)
    assert (last[-1], len(last)) == ("w399", len(WORDS) - WORDS.index(last[0]))
    assert len(last) > 50


def test_a_text_that_fits_is_read_whole(tokenizer):
    text = " ".join(WORDS[:40])
    assert {passage(text, tokenizer.token_starts, LENGTH, "random", k / 10) for k in range(10)} == {text}


@pytest.mark.long
def test_a_text_in_which_no_sentence_ends_is_read_from_any_word(tokenizer):
    text = " ".join(WORDS)
    seen = {word for k in range(100) for word in read(text, tokenizer, "sentence", k / 99.01)}
    assert seen == set(WORDS)


@pytest.mark.long
def test_a_passage_begins_with_a_word_or_a_sentence(tokenizer):
    sentences = [" ".join(WORDS[10 * n : 10 * n + 10]) + "." for n in range(40)]
    text = " ".join(sentences)
    begins = {
        passage(text, tokenizer.token_starts, LENGTH, "sentence", k / 300).partition(".")[0] + "." for k in range(300)
    }
    assert begins <= set(sentences)
    assert len(begins) >= 34
    words = {
        passage(text, tokenizer.token_starts, LENGTH, "random", k / 300).split()[0].rstrip(".") for k in range(300)
    }
    assert words <= set(WORDS)
    assert len(words) > 100


@pytest.mark.quick(10)
@pytest.mark.parametrize(
    "text",
    [
        "x" * 100_000,
        "好" * 5_000,
        "a. " * 5_000,
        " " * 100_000,
        "!" * 100_000 + "x",
        "\ud83d" + "word " * 3_000,
        "no end of a sentence " * 500,
        "",
    ],
)
@pytest.mark.parametrize("start", ["random", "sentence"])
def test_any_text_has_a_passage(tokenizer, text, start):
    for k in range(5):
        ids, mask = tokenizer(passage(text, tokenizer.token_starts, LENGTH, start, k / 5), LENGTH)
        assert len(ids) == LENGTH
        assert mask.any()


def test_the_decoder_draws_texts_only_where_the_recipe_says_so(tokenizer):
    text = {"text": " ".join(WORDS)}
    for start, differ in (("first", False), ("random", True)):
        decoder = Decoder(
            Data(source="", start="first", text=TextDecode(length=16, start=start)),
            ("text",),
            tokenizers={"text": tokenizer},
        )
        assert decoder.fixed is not differ
        assert torch.equal(decoder(text, 0.1)["text"], decoder(text, 0.8)["text"]) is not differ
