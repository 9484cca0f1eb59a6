"""Causal language modeling: transformers' GPT-2 with the same weights, and what is refused because it sees ahead."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import TinyCausal, TinyText, tiny_batch, tiny_encoders
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from mmssl.encoders import create as encoder
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.objectives import create
from mmssl.objectives._causal import leaks
from mmssl.ops.draws import Draws

WORDS = Tokenizer.train(["the cat sat on the mat", "a dog and a cat"] * 2, 60)
SMALL = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
TOWER = {"width": 16, "heads": 2, "layers": 2}
UNUSED = {"width": 32, "layers": 1, "head_width": 16, "patch_size": 32, "image_size": 32}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def gpt2(**changes):
    torch.manual_seed(0)
    return encoder("transformers/gpt2", "text", tokenizer=WORDS, **SMALL, **changes)


def texts(length: int = 16) -> dict[str, Tensor]:
    rows = [WORDS(text, length) for text in ("the cat", "a dog sat on the mat", "", "the the the the the the the cat")]
    ids, masks = zip(*rows, strict=True)
    return {"text": torch.stack(ids), "text_mask": torch.stack(masks)}


def test_loss_and_gradients_are_those_of_transformers():
    text = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double()
    task = create("causal_language", {"text": text}).double()
    model = GPT2LMHeadModel(text.backbone.net.config).double()
    model.transformer.load_state_dict(text.backbone.net.state_dict())
    batch = texts()
    inputs = task.transform(batch, Draws(0, 0, 4))
    losses = task(inputs)
    labels = batch["text"].masked_fill(~batch["text_mask"], -100)
    expected = model(input_ids=batch["text"], attention_mask=batch["text_mask"].long(), labels=labels)
    # Theirs is taken in single precision, whatever the model's.
    torch.testing.assert_close(losses["loss"].float(), expected.loss, rtol=1e-6, atol=0)
    exact = F.cross_entropy(expected.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(losses["loss"], exact, rtol=1e-12, atol=0)
    losses["loss"].backward()
    exact.backward()
    theirs = dict(model.transformer.named_parameters())
    for name, parameter in text.backbone.net.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-9, atol=1e-14)
    hits = expected.logits[:, :-1].argmax(-1) == labels[:, 1:]
    predicted = labels[:, 1:] != -100
    torch.testing.assert_close(losses["accuracy"], hits[predicted].double().mean())
    assert inputs["predicted_tokens"] == predicted.sum()


def test_a_network_that_sees_nothing_scores_the_logarithm_of_the_vocabulary():
    task = create("causal_language", {"text": gpt2()})
    inputs = task.transform(texts(), Draws(0, 0, 4))
    outputs = {key: torch.zeros_like(value) for key, value in task.predict(inputs).items()}
    assert float(task.loss(outputs, inputs)["loss"]) == pytest.approx(math.log(WORDS.vocab_size))
    assert task.chance(4).loss == math.log(WORDS.vocab_size)


def test_the_relative_error_is_over_the_frequencies_of_earlier_steps():
    task = create("causal_language", {"text": gpt2()})
    batch = texts()
    task.transform(batch, Draws(0, 0, 4))
    task.after_step(0.0)
    inputs = task.transform(batch, Draws(0, 1, 4))
    following = batch["text"][:, 1:][batch["text_mask"][:, 1:]]
    share = torch.bincount(following, minlength=WORDS.vocab_size) + 1
    blind = -(share / share.sum()).log()[following]
    losses = task(inputs)
    torch.testing.assert_close(losses["relative_error"], losses["loss"].detach() / blind.mean())


def test_later_tokens_change_nothing_before_them():
    task = create("causal_language", {"text": gpt2()}).eval()
    batch = texts()
    inputs = task.transform(batch, Draws(0, 0, 4))
    logits, early = task.logits(inputs), (torch.arange(batch["text"].shape[1] - 1) < 5).expand(4, -1)
    early = early[inputs["text_mask"][:, 1:]]
    changed = {**batch, "text": batch["text"].clone()}
    changed["text"][:, 5:] = 7
    others = task.logits(task.transform(changed, Draws(0, 0, 4)))
    torch.testing.assert_close(others[early], logits[early])
    assert not torch.allclose(others[~early], logits[~early])


CAUSAL = {
    "gpt2": lambda: gpt2(),
    "bert as a decoder": lambda: encoder("transformers/bert", "text", tokenizer=WORDS, is_decoder=True, **BERT),
    "open_clip": lambda: encoder("open_clip/ViT-B-32", "text", embed_dim=24, text_cfg=TOWER, vision_cfg=UNUSED),
    "frozen": lambda: gpt2().requires_grad_(False),
    "tiny": TinyCausal,
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_networks_pass_and_stay_as_they_were(name):
    torch.manual_seed(0)
    text = CAUSAL[name]().train()
    frozen = [parameter.requires_grad for parameter in text.parameters()]
    task = create("causal_language", {"text": text})
    assert text.training
    assert [parameter.requires_grad for parameter in text.parameters()] == frozen
    assert all(parameter.grad is None for parameter in task.parameters())


SEEING = {
    "bert": lambda: encoder("transformers/bert", "text", tokenizer=WORDS, **BERT),
    "open_clip that sees both ways": lambda: encoder(
        *("open_clip/ViT-B-32", "text"), embed_dim=16, text_cfg=TOWER | {"no_causal_mask": True}, vision_cfg=UNUSED
    ),
    "tiny": TinyText,
}


@pytest.mark.parametrize("name", SEEING)
def test_a_network_that_sees_ahead_is_refused(name):
    torch.manual_seed(0)
    with pytest.raises(RecipeError, match=r"causal_language: the text encoder 'text' sees later tokens.*gpt2"):
        create("causal_language", {"text": SEEING[name]()})


def test_one_leak_at_one_place_is_enough():
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    causal = rows.cumsum(0)
    assert not leaks(causal, rows, torch.arange(6))
    for earlier, later in ((0, 1), (0, 5), (4, 5)):
        hint = torch.zeros(6, 6, dtype=torch.float64)
        hint[earlier, later] = 1e-12
        assert leaks(causal + hint @ rows, rows, torch.arange(6))


def test_refuses_what_reads_no_text():
    with pytest.raises(RecipeError, match="reads image"):
        create("causal_language", tiny_encoders(), encoder="image")


def test_a_narrower_embedding_gets_a_map():
    torch.manual_seed(0)
    task = create("causal_language", {"text": TinyCausal()})
    assert task.head.weight.shape == (4, 6)
    batch = tiny_batch(5)
    inputs = task.transform(batch, Draws(0, 0, 5))
    assert task.predict(inputs)["log_likelihood_ratio"].shape == (5, 23)
    assert torch.isfinite(task(inputs)["loss"])


def test_what_was_trained_is_loaded_as_a_language_model(tmp_path):
    text = gpt2().eval()
    task = create("causal_language", {"text": text}).eval()
    text.export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (model.config.bos_token_id, model.config.eos_token_id) == (WORDS.start_id, WORDS.end_id)
    batch = texts()
    inputs = task.transform(batch, Draws(0, 0, 4))
    with torch.no_grad():
        expected = model(input_ids=batch["text"], attention_mask=batch["text_mask"].long()).logits[:, :-1]
        torch.testing.assert_close(task.logits(inputs), expected[batch["text_mask"][:, 1:]])


def test_preview_shows_what_was_predicted(monkeypatch):
    task = create("causal_language", {"text": gpt2()}).eval()
    inputs = task.transform(texts(), Draws(0, 0, 4))
    following = inputs["text"][:, 1:]
    choices = F.one_hot(following, WORDS.vocab_size)
    choices[1, 0] = choices[1, 1] = F.one_hot(torch.tensor(7), WORDS.vocab_size)
    monkeypatch.setattr(task, "logits", lambda inputs: choices[inputs["text_mask"][:, 1:]])
    text, predicted, prediction = task.preview(inputs, {})
    assert text.cells[:2] == [*predicted.cells[:1], "a dog sat on the mat"] == ["the cat", "a dog sat on the mat"]
    assert prediction.cells[0] == "the cat"
    ids = following[1][inputs["text_mask"][1, 1:]]
    assert predicted.cells[1].split() == ["_", "_", *WORDS.decode(ids[2:]).split()]
