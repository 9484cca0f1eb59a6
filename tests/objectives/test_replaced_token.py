"""Replaced token detection: labels, the draw, who learns from what, and transformers' ELECTRA with the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.metrics import roc_auc_score
from tiny_encoders import TinyText, TinyTokenizer, tiny_batch, tiny_encoders
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.objectives import create
from mmssl.objectives.reconstruction.replaced_token import ReplacedToken
from mmssl.ops.draws import Draws
from mmssl.ops.masking import draw_tokens

TEXTS = ["A cat, sitting (on) a mat.", "the dog's bone is under the tree", "two cats chase one dog"] * 4


def _tiny(**hyper) -> ReplacedToken:
    torch.manual_seed(0)
    tokenizer = TinyTokenizer()
    return create("replaced_token", {"text": TinyText(tokenizer), "generator": TinyText(tokenizer)}, **hyper)


def _electra(tokenizer: Tokenizer, *, hidden: int, embedding: int = 12):
    return create_encoder(
        "transformers/electra",
        "text",
        tokenizer=tokenizer,
        embedding_size=embedding,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )


def test_chosen_places_are_counted_as_published_and_shown_masked_or_as_they_are():
    batch = tiny_batch(1500, length=60)
    for share in (0.85, 1.0):
        inputs = _tiny(masked=share).transform(batch, Draws(0, 0, 1500))
        chosen, places = inputs["chosen"], inputs["places"]
        lengths = batch["text_mask"].sum(1).tolist()
        words = (batch["text"] > 4).sum(1).tolist()
        expected = [min(max(1, round(0.15 * n)), w) for n, w in zip(lengths, words, strict=True)]
        assert chosen.sum(1).tolist() == expected
        assert inputs["chosen_tokens"] == sum(expected)
        assert inputs["valid_tokens"] == sum(lengths)
        original = batch["text"].gather(1, places)
        assert (original[chosen] > 4).all()
        seen = inputs["hidden"].gather(1, places)
        assert ((seen == 4) | (seen == original))[chosen].all()
        hidden = int((seen == 4)[chosen].sum())
        assert stats.binomtest(hidden, int(chosen.sum()), share).pvalue > 1e-4
        assert torch.equal(inputs["hidden"].scatter(1, places, original), batch["text"])


def test_a_token_is_replaced_exactly_where_it_differs():
    task, batch = _tiny(), tiny_batch(200)
    inputs = task.transform(batch, Draws(0, 0, 200))
    outputs = task.predict(inputs)
    drawn = outputs["sampled"].long()
    corrupted = batch["text"].clone()
    for row, (places, chosen) in enumerate(zip(inputs["places"], inputs["chosen"], strict=True)):
        for slot in chosen.nonzero()[:, 0].tolist():
            corrupted[row, places[slot]] = drawn[row, slot]
    label = (corrupted != batch["text"]).float()
    assert 0 < label.sum() < inputs["chosen"].sum(), "some draws should hit the original"
    mask = batch["text_mask"]
    losses = task.loss(outputs, inputs)
    expected = F.binary_cross_entropy_with_logits(outputs["replaced"][mask], label[mask])
    torch.testing.assert_close(losses["discriminator_loss"], expected)
    torch.testing.assert_close(losses["replaced"], label[mask].mean())
    torch.testing.assert_close(losses["loss"], losses["generator_loss"] + 50 * expected)
    area = roc_auc_score(label[mask].numpy(), outputs["replaced"][mask].detach().numpy())
    assert float(losses["ranking"]) == pytest.approx(area, abs=1e-5)
    same = {**outputs, "sampled": batch["text"].gather(1, inputs["places"]).float()}
    nothing = task.loss(same, inputs)
    assert nothing["replaced"] == 0
    assert nothing["ranking"] == 0.5
    assert task.loss({k: torch.zeros_like(v) for k, v in outputs.items()}, inputs)["ranking"] == 0.5


def test_tokens_are_drawn_from_the_distribution_at_temperature_one():
    torch.manual_seed(0)
    logits = torch.randn(7) * 2
    logits[[0, 3, 6]] = -torch.inf
    drawn = draw_tokens(logits.expand(20_000, 7), torch.rand(20_000))
    counts = torch.bincount(drawn, minlength=7)
    assert counts[[0, 3, 6]].sum() == 0
    possible = [1, 2, 4, 5]
    expected = logits.softmax(-1)[possible].double()
    assert stats.chisquare(counts[possible].numpy(), (expected / expected.sum() * 20_000).numpy()).pvalue > 1e-3
    # The ends of the interval, in a vocabulary in which rounding makes the sum differ from 1.
    many = torch.randn(3, 50_000) * 3
    many[:, 0] = many[:, -1] = -torch.inf
    for dice in (0.0, 1 - 2**-24):
        ends = draw_tokens(many, torch.full((3,), dice))
        assert ((ends >= 1) & (ends <= 49_998)).all()


def test_the_generator_learns_nothing_from_the_encoders_answers():
    task = _tiny(share_embeddings=False)
    inputs = task.transform(tiny_batch(16), Draws(0, 0, 16))

    def gradients(key: str) -> dict[str, float]:
        task.zero_grad()
        task(inputs)[key].backward()
        return {name: float(p.grad.abs().max()) for name, p in task.named_parameters() if p.grad is not None}

    ours, theirs = gradients("discriminator_loss"), gradients("generator_loss")
    assert not set(ours) & set(theirs)
    assert all(value > 0 for value in (*ours.values(), *theirs.values()))
    assert {name.split(".")[1] for name in theirs if name.startswith("encoders.")} == {"generator"}
    assert set(ours) | set(theirs) == {name for name, _ in task.named_parameters()}


@pytest.mark.parametrize("share", [True, False])
def test_it_is_transformers_electra(share):
    """`ElectraForMaskedLM` proposes and `ElectraForPreTraining` tells, with the same weights and the same draw."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        tokenizer = Tokenizer.train(TEXTS, 60)
        encoders = {"text": _electra(tokenizer, hidden=16), "generator": _electra(tokenizer, hidden=8)}
        task = create("replaced_token", encoders, share_embeddings=share)
        for p in task.parameters():
            torch.nn.init.normal_(p, std=0.3)
        shared = [
            path for path, p in task.named_parameters(remove_duplicate=False) if path.endswith("embeddings.weight")
        ]
        assert len(shared) == 6
        assert len({id(task.get_parameter(path)) for path in shared}) == (3 if share else 6)

        big = ElectraForPreTraining(encoders["text"].backbone.net.config)
        big.electra.load_state_dict(encoders["text"].backbone.net.state_dict())
        big.discriminator_predictions.dense.load_state_dict(task.head[0].state_dict())
        big.discriminator_predictions.dense_prediction.load_state_dict(task.head[2].state_dict())
        small = ElectraForMaskedLM(encoders["generator"].backbone.net.config)
        small.electra.load_state_dict(encoders["generator"].backbone.net.state_dict())
        small.generator_predictions.dense.load_state_dict(task.language_head.transform[0].state_dict())
        small.generator_predictions.LayerNorm.load_state_dict(task.language_head.transform[2].state_dict())
        small.generator_lm_head.bias = torch.nn.Parameter(task.language_head.bias.detach().clone())
        small.generator_lm_head.weight = small.electra.embeddings.word_embeddings.weight
        if share:
            for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
                getattr(small.electra.embeddings, name).weight = getattr(big.electra.embeddings, name).weight
            small.generator_lm_head.weight = big.electra.embeddings.word_embeddings.weight

        ids, masks = zip(*(tokenizer(text, 14) for text in TEXTS[:3]), strict=True)
        batch = {"text": torch.stack(ids), "text_mask": torch.stack(masks)}
        inputs = task.transform(batch, Draws(0, 0, 3))
        outputs = task.predict(inputs)
        labels = torch.full_like(batch["text"], -100)
        for row in range(3):
            places = inputs["places"][row][inputs["chosen"][row]]
            labels[row, places] = batch["text"][row, places]
        attention = batch["text_mask"].long()
        proposed = small(input_ids=inputs["hidden"], attention_mask=attention, labels=labels)
        drawn = outputs["sampled"].long()
        corrupted = batch["text"].scatter(
            1, inputs["places"], torch.where(inputs["chosen"], drawn, batch["text"].gather(1, inputs["places"]))
        )
        label = corrupted != batch["text"]
        told = big(input_ids=corrupted, attention_mask=attention, labels=label)
        # Its own loss makes single precision of the labels, and with them of the result.
        known = F.binary_cross_entropy_with_logits(told.logits[batch["text_mask"]], label[batch["text_mask"]].double())
        torch.testing.assert_close(known, told.loss.double(), rtol=1e-6, atol=0)
        expected = proposed.loss + 50 * known
        expected.backward()
        losses = task.loss(outputs, inputs)
        losses["loss"].backward()
        torch.testing.assert_close(losses["loss"], expected, rtol=1e-10, atol=0)
        pairs = [
            (encoders["text"].backbone.net, big.electra),
            (encoders["generator"].backbone.net, small.electra),
            (task.head[0], big.discriminator_predictions.dense),
            (task.head[2], big.discriminator_predictions.dense_prediction),
            (task.language_head.transform[0], small.generator_predictions.dense),
            (task.language_head.transform[2], small.generator_predictions.LayerNorm),
        ]
        for own, theirs in pairs:
            other = dict(theirs.named_parameters())
            for name, p in own.named_parameters():
                torch.testing.assert_close(p.grad, other[name].grad, rtol=1e-8, atol=1e-10, msg=name)
        torch.testing.assert_close(
            task.language_head.bias.grad, small.generator_lm_head.bias.grad, rtol=1e-8, atol=1e-10
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_refuses_networks_that_cannot_play_together():
    tokenizer = TinyTokenizer()
    with pytest.raises(RecipeError, match="takes two networks"):
        create("replaced_token", tiny_encoders(), generator="text")
    with pytest.raises(RecipeError, match="reads image"):
        create("replaced_token", tiny_encoders(), generator="image")
    with pytest.raises(RecipeError, match="different vocabularies"):
        create("replaced_token", {"text": TinyText(TinyTokenizer()), "generator": TinyText(TinyTokenizer())})
    nothing = TinyTokenizer(mask_id=None)
    with pytest.raises(RecipeError, match="needs a mask token"):
        create("replaced_token", {"text": TinyText(nothing), "generator": TinyText(nothing)})
    for hyper, reason in (({"mask_ratio": 15}, "less than 1"), ({"masked": 0.0}, "greater than 0")):
        with pytest.raises(RecipeError, match=reason):
            create("replaced_token", {"text": TinyText(tokenizer), "generator": TinyText(tokenizer)}, **hyper)
    words = Tokenizer.train(TEXTS, 60)
    wide = {"text": _electra(words, hidden=16), "generator": _electra(words, hidden=8, embedding=8)}
    with pytest.raises(RecipeError, match="share_embeddings: false"):
        create("replaced_token", wide)
    create("replaced_token", wide, share_embeddings=False)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    other = create_encoder("transformers/modernbert", "text", tokenizer=words, **sizes)
    with pytest.raises(RecipeError, match="another kind"):
        create("replaced_token", {"text": _electra(words, hidden=16), "generator": other})


def test_vocabularies_made_from_the_same_texts_are_one():
    first, again, other = (Tokenizer.train(texts, 60) for texts in (TEXTS, list(TEXTS), TEXTS[:1] * 4))
    create("replaced_token", {"text": _electra(first, hidden=16), "generator": _electra(again, hidden=8)})
    assert first == again
    assert hash(first) == hash(again)
    assert first != other
    assert first != Tokenizer.open_clip("ViT-B-32")
    assert Tokenizer.open_clip("ViT-B-32") == Tokenizer.open_clip("RN50")


def test_preview_marks_what_was_replaced_and_what_was_found():
    task, batch = _tiny(), tiny_batch(3)
    inputs = task.transform(batch, Draws(0, 0, 3))
    outputs = task.predict(inputs)
    drawn = inputs["chosen"] & (outputs["sampled"].long() != inputs["text"].gather(1, inputs["places"]))
    changed = torch.zeros_like(inputs["text_mask"]).scatter(1, inputs["places"], drawn)
    shown, replaced, found = task.preview(inputs, outputs | {"replaced": changed.double() - 0.5})
    assert replaced.cells == found.cells
    assert sum(cell.count("«") for cell in replaced.cells) > 0
    assert shown.cells != replaced.cells
