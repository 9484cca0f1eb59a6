"""Vocabularies: who is hidden and how many, what is filled in, heads tied to the embedding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import TinyText, TinyTokenizer, tiny_batch

from mmssl.errors import RecipeError
from mmssl.modules.vocabulary import TiedHead, Vocabulary, decode_rows, mark_rows
from mmssl.ops.draws import Draws

RATIO = 0.3


def test_so_many_tokens_are_chosen_and_none_is_special():
    vocabulary, batch = Vocabulary(TinyText(), "text", "some_task"), tiny_batch(50)
    text, valid = batch["text"], batch["text_mask"]
    places, chosen = vocabulary.choose(text, valid, RATIO, Draws(0, 0, 50))
    assert chosen.sum(1).tolist() == [
        min(max(1, round(RATIO * n)), n - 2) for n in valid.sum(1).tolist()
    ]  # start and end count, and are not chosen
    assert (text.gather(1, places)[chosen] > 4).all()
    assert torch.equal(vocabulary.ordinary, torch.arange(5, 30))
    seen = vocabulary.corrupt(text, places, chosen, Draws(0, 1, 50), masked=1.0)
    assert (seen.gather(1, places)[chosen] == 4).all()
    others = torch.ones_like(valid).scatter(1, places, ~chosen)
    assert torch.equal(seen[others], text[others])
    fill = vocabulary.filled_in(seen, valid, places, chosen)
    assert fill(text.gather(1, places)[chosen]) == decode_rows(vocabulary.tokenizer, text, valid)


def test_without_a_mask_token_nothing_can_be_hidden():
    with pytest.raises(RecipeError, match="some_task needs a mask token, and the tokenizer of the encoder 'words'"):
        Vocabulary(TinyText(TinyTokenizer(mask_id=None)), "words", "some_task")


def test_a_tied_head_learns_the_embedding_and_does_not_hold_it():
    text = TinyText()
    head = TiedHead(6, text)
    assert {name for name, _ in head.named_parameters()} == {
        *(f"transform.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
        "bias",
    }
    hidden = torch.randn(3, 6)
    torch.nn.init.normal_(head.bias)
    expected = head.transform(hidden) @ text.token_embedding.T + head.bias
    torch.testing.assert_close(head(hidden, text), expected)
    F.cross_entropy(head(hidden, text), torch.tensor([5, 6, 7])).backward()
    assert text.token_embedding.grad.abs().sum() > 0


def test_runs_of_marked_tokens_are_marked():
    ids, valid = torch.tensor([[7, 8, 9, 10, 0]]), torch.tensor([[True, True, True, True, False]])
    marked = torch.tensor([[False, True, True, False, True]])
    assert mark_rows(TinyTokenizer(), ids, valid, marked) == ["7 «8 9» 10"]
