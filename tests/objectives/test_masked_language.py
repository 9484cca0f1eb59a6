"""Masked language modelling: exact counts, what may be chosen, the mean over the global batch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from tiny_encoders import TinyText, TinyTokenizer, tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws


def _task():
    torch.manual_seed(0)
    return create("masked_language", {"text": TinyText()})


def test_counts_are_berts_and_specials_are_never_chosen():
    batch = tiny_batch(300, length=90)
    batch["text"][0, :90] = 3  # nothing but special tokens
    inputs = _task().transform(batch, Draws(0, 0, 300))
    lengths = batch["text_mask"].sum(1).tolist()
    words = (batch["text"] > 4).sum(1).tolist()
    expected = [min(max(1, round(0.15 * n)), w) for n, w in zip(lengths, words, strict=True)]
    assert inputs["chosen"].sum(1).tolist() == expected
    assert {10, 30, 50, 70} & set(lengths), "lengths whose 15 % end in .5 should be among them"
    target = inputs["target"][inputs["chosen"]]
    assert (target > 4).all()
    assert inputs["masked_count"] == sum(expected)


def test_targets_recover_the_original_and_nothing_else_changes():
    batch = tiny_batch(50, length=60)
    inputs = _task().transform(batch, Draws(0, 0, 50))
    target = torch.where(inputs["chosen"], inputs["target"], inputs["text"].gather(1, inputs["places"]))
    assert torch.equal(inputs["text"].scatter(1, inputs["places"], target), batch["text"])


def test_eighty_ten_ten():
    batch = tiny_batch(1500, length=60)
    inputs = _task().transform(batch, Draws(0, 0, 1500))
    chosen = inputs["chosen"]
    seen, target = inputs["text"].gather(1, inputs["places"])[chosen], inputs["target"][chosen]
    # A random word is the original in 1 of 25 cases.
    shares = {"masked": (seen == 4, 0.8), "kept": (seen == target, 0.1 + 0.1 / 25)}
    for happened, share in shares.values():
        assert stats.binomtest(int(happened.sum()), len(seen), share).pvalue > 1e-4
    assert ((seen == 4) | (seen > 4)).all()


def test_choice_is_a_function_of_seed_step_and_row():
    task, batch = _task(), tiny_batch(8)
    first, again, later = (task.transform(batch, Draws(0, step, 8))["text"] for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_loss_is_the_mean_over_masked_tokens():
    task, batch = _task(), tiny_batch(6)
    inputs = task.transform(batch, Draws(0, 0, 6))
    outputs = task.predict(inputs)
    logits, target = outputs["logits"][inputs["chosen"]], inputs["target"][inputs["chosen"]]
    losses = task.loss(outputs, inputs)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(logits, target))
    torch.testing.assert_close(losses["accuracy"], (logits.argmax(-1) == target).float().mean())
    # Logits at masked places are those that all places would have.
    tokens = task.encoder("text")(inputs["text"], inputs["text_mask"]).tokens
    everywhere = task.head(tokens) @ task.encoder("text").token_embedding.T + task.bias
    at = inputs["places"][..., None].expand(-1, -1, 30)
    torch.testing.assert_close(outputs["logits"], everywhere.gather(1, at))
    uniform = task.loss({"logits": torch.zeros_like(outputs["logits"])}, inputs)
    assert math.isclose(uniform["loss"], task.chance(6).loss, rel_tol=1e-6)


def test_refuses_a_tokenizer_without_mask_token():
    with pytest.raises(RecipeError, match="needs a mask token"):
        create("masked_language", {"text": TinyText(TinyTokenizer(mask_id=None))})
    with pytest.raises(RecipeError, match="reads image"):
        create("masked_language", tiny_encoders(), encoder="image")
    with pytest.raises(RecipeError, match="between 0 and 1"):
        create("masked_language", tiny_encoders(), rate=15)


def test_preview_fills_the_gaps():
    task, batch = _task(), tiny_batch(3)
    inputs = task.transform(batch, Draws(0, 0, 3))
    logits = F.one_hot(inputs["target"], 30).float()
    shown, target, prediction = task.preview(inputs, {"logits": logits})
    assert target.cells == prediction.cells
    assert target.cells[0].split() == [str(int(i)) for i in batch["text"][0][batch["text_mask"][0]]]
    assert shown.cells != target.cells
