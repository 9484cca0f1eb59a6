"""Packed texts: every token once and in order, no padding, whole words told apart, the same after a resume."""

from __future__ import annotations

import pytest
import torch
from made import write_parquet

from mmssl.data import shared, stream_index
from mmssl.data.loader import Loader, read
from mmssl.data.packing import Packing, Place, packed_rows
from mmssl.decode_settings import TextDecode
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.recipe import Data

DOCUMENTS = [" ".join(f"word{(7 * n + k) % 90}" for k in range(3 + 5 * n % 47)) + "." for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(DOCUMENTS, 300)


def packed(tmp_path, tokenizer, needs=("text",), length=32, batch_size=4, streaming=False, readers=64, **arguments):
    file = write_parquet(tmp_path / "train.parquet", {"text": [*DOCUMENTS, "", None]})
    text = TextDecode(length=length, pack=True)
    spec = Data(source=str(file), text=text, shuffle_buffer=8, streaming=streaming, readers=readers)
    return Loader({"": spec}, needs, batch_size=batch_size, seed=0, tokenizers={"text": tokenizer}, **arguments)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_token_stands_once_in_the_order_of_the_source(tmp_path, tokenizer, streaming):
    loader = packed(tmp_path, tokenizer, batch_size=1, streaming=streaming, readers=1)
    expected = [i for document in DOCUMENTS for i in (*tokenizer.whole([document])[0]["text"], tokenizer.end_id)]
    rows = len(expected) // 31
    found = {int(batch["id"]): batch for batch in loader.batches(0, rows)}
    assert sorted(found) == list(range(rows))
    for number, batch in found.items():
        assert batch["text_mask"].all()
        ids = batch["text"][0].tolist()
        assert ids[0] == tokenizer.start_id
        assert ids[1:] == expected[31 * number : 31 * number + 31]


def test_words_are_told_apart_across_documents(tmp_path, tokenizer):
    loader = packed(tmp_path, tokenizer, needs=("text", "text_word"))
    for batch in loader.batches(0, 5):
        for ids, words in zip(batch["text"], batch["text_word"], strict=True):
            special = torch.tensor([i in tokenizer.special_ids for i in ids.tolist()])
            assert torch.equal(words < 0, special)
            content = words[~special]
            assert content[0] == 0
            assert set(content.diff().tolist()) <= {0, 1}
            text = tokenizer.decode(ids)
            assert int(content.max()) + 1 >= len(text.split())


@pytest.mark.quick(1)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_reads_the_same_rows(tmp_path, tokenizer, streaming):
    loader = packed(tmp_path, tokenizer, streaming=streaming)
    whole = [batch["text"] for batch in loader.batches(0, 30)]
    again = [batch["text"] for batch in packed(tmp_path, tokenizer, streaming=streaming).batches(17, 30)]
    assert all(torch.equal(a, b) for a, b in zip(whole[17:], again, strict=True))


def test_a_packed_row_can_be_reached_without_packing_those_before_it(tokenizer):
    packing = Packing("text", tokenizer, 32, ("text_word",))
    whole = list(packed_rows(DOCUMENTS, packing, Place(0, 0)))
    assert any(place.token for place, _ in whole)
    for number, (place, _) in enumerate(whole):
        assert list(packed_rows(DOCUMENTS[place.document :], packing, place)) == whole[number:]


def test_readers_pack_their_own_documents_and_go_on_where_they_were(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(shared, "FEWEST_ROWS", 1)
    monkeypatch.setattr(stream_index, "EVERY", 3)

    def batches(start, stop, share=0, shares=1, **arguments):
        loader = packed(
            tmp_path, tokenizer, streaming=True, readers=4, share=share, shares=shares, directory=tmp_path / "run"
        )
        return [batch["text"] for batch in loader.batches(start, stop)]

    whole = batches(0, 40)
    parts = [batches(0, 40, share, 4) for share in range(4)]
    assert all(torch.equal(torch.cat(rows), one) for one, *rows in zip(whole, *parts, strict=True))
    tokenized = []
    monkeypatch.setattr(Tokenizer, "whole", lambda *a, real=Tokenizer.whole: tokenized.append(len(a[1])) or real(*a))
    assert all(torch.equal(a, b) for a, b in zip(whole[37:], batches(37, 40), strict=True))
    assert sum(tokenized) < 5 * len(DOCUMENTS) / 4  # by then readers had been through theirs several times


def test_probes_read_documents_one_by_one(tmp_path, tokenizer):
    file = write_parquet(tmp_path / "test.parquet", {"text": DOCUMENTS})
    spec = Data(source=str(file), text=TextDecode(length=32, pack=True))
    assert sum(len(batch["id"]) for batch in read(spec, ("text",), tokenizers={"text": tokenizer})) == len(DOCUMENTS)


@pytest.mark.long
def test_what_cannot_be_packed_is_refused(tmp_path, tokenizer):
    with pytest.raises(RecipeError, match="compares sentences"):
        packed(tmp_path, tokenizer, needs=("text", "text_sentence"))
    clip = Tokenizer.open_clip("ViT-B-32")
    with pytest.raises(RecipeError, match="cuts every text"):
        list(packed(tmp_path, clip, streaming=True).batches(0, 1))
    file = write_parquet(tmp_path / "p.parquet", {"text": DOCUMENTS, "image": DOCUMENTS})
    spec = Data(source=str(file), text=TextDecode(pack=True))
    with pytest.raises(RecipeError, match="joins the texts of several rows"):
        Loader({"": spec}, ("text", "image"), batch_size=2, seed=0, tokenizers={"text": tokenizer})
