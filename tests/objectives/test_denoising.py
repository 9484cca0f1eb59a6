"""Denoising: the target is untouched, sentences are permuted whole, spans are Poisson, one mask each, BART's loss."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tiny_encoders import tiny_encoders, tiny_text_to_text
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.objectives import create
from mmssl.objectives.reconstruction.denoising import draw_lengths, permute_sentences
from mmssl.ops.draws import Draws

MASK = 4


def _task(kind: str = "bart", **hyper):
    torch.manual_seed(0)
    return create("denoising", {"text": tiny_text_to_text(kind, sentinels=0)}, **hyper)


def _batch(rows: int, length: int = 60, seed: int = 0) -> dict[str, Tensor]:
    """Texts whose tokens tell their place: words of one to three tokens, sentences of one to nine words."""
    generator = torch.Generator().manual_seed(seed)
    # Some hold no word at all.
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    place = torch.arange(length).repeat(rows, 1)
    inside = (place > 0) & (place < lengths - 1)
    text = torch.where(inside, 5 + place, 0)
    text[:, 0] = 2
    text.scatter_(1, lengths - 1, 3)
    starts = torch.rand(rows, length, generator=generator) < 0.6
    starts[:, 0], starts[:, 1] = False, True
    word = starts.cumsum(1) - 1
    stops = (torch.rand(rows, length, generator=generator) < 0.2) & starts
    stops[:, 0], stops[:, 1] = False, True
    sentence = stops.cumsum(1) - 1
    return {
        "text": text,
        "text_mask": place < lengths,
        "text_word": torch.where(inside, word, -1),
        "text_sentence": torch.where(inside, sentence, -1),
    }


def _words(batch: dict[str, Tensor], row: int, key: str = "text_word") -> list[list[int]]:
    """The token ids of each word or sentence of a row."""
    number = batch[key][row]
    return [batch["text"][row][number == n].tolist() for n in range(int(number.max()) + 1)]


def test_sentences_are_permuted_whole_and_all_else_stays():
    batch = _batch(300)
    order = permute_sentences(batch["text_sentence"], Draws(0, 0, 300))
    assert torch.equal(order.sort(1).values, torch.arange(60).expand(300, 60)), "a bijection of places"
    text = batch["text"].gather(1, order)
    outside = batch["text_sentence"] < 0
    assert torch.equal(text[outside], batch["text"][outside])
    for row in range(300):
        rest = text[row][~outside[row]].tolist()
        sentences = _words(batch, row, "text_sentence")
        found = []
        while rest:
            one = next(s for s in sentences if s[0] == rest[0])
            assert rest[: len(one)] == one
            found.append(one)
            rest = rest[len(one) :]
        assert sorted(found) == sentences


def test_every_order_of_sentences_is_equally_likely():
    sentence = torch.tensor([-1, 0, 0, 1, 2, 2, 2, -1, -1]).repeat(3000, 1)
    order = permute_sentences(sentence, Draws(0, 0, 3000))
    found = sentence.gather(1, order)[:, 1:7].unique(dim=0, return_counts=True)[1]
    assert len(found) == 6
    assert stats.chisquare(found.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(("mean", "nothing"), [(3.0, 0.0498), (3.5, 0.0302)])
def test_lengths_are_poisson_and_sum_to_the_budget(mean, nothing):
    assert math.isclose(math.exp(-mean), nothing, rel_tol=0.01)
    budgets = torch.tensor([60, 61, 0, 1, 2, 59]).repeat(500)
    lengths, used = draw_lengths(budgets, 64, mean, Draws(0, 0, 3000))
    assert torch.equal((lengths * used).sum(1), budgets)
    assert (lengths[used] >= 0).all()
    assert (used.sum(1) <= budgets).all()
    assert torch.equal(used, used.sum(1, keepdim=True) > torch.arange(64)), "the used ones come first"
    # How many are drawn before the budget is spent depends on their lengths; the first eight always are.
    first = lengths[budgets > 50][:, :8]
    assert used[budgets > 50][:, :8].float().mean() > 0.99
    zeros = int((first == 0).sum())
    assert stats.binomtest(zeros, first.numel(), math.exp(-mean)).pvalue > 1e-4
    counts = torch.bincount(first.flatten(), minlength=12)
    expected = stats.poisson.pmf(range(10), mean)
    found = [*counts[:10].tolist(), int(counts[10:].sum())]
    share = [*expected, 1 - expected.sum()]
    assert stats.chisquare(found, [s * first.numel() for s in share]).pvalue > 1e-4


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "hyper", [{}, {"span": 3.5}, {"mask_ratio": 0.9, "span": 0.5}, {"mask_ratio": 0.0}, {"mask_ratio": 1.0}]
)
def test_each_span_is_one_mask_and_exactly_the_budget_is_gone(hyper):
    task = _task(random=0.0, permute=False, **hyper)
    batch = _batch(300)
    inputs = task.transform(batch, Draws(0, 0, 300))
    assert torch.equal(inputs["target"], batch["text"])
    assert torch.equal(inputs["target_mask"], batch["text_mask"])
    assert not inputs["text"][~inputs["text_mask"]].any()
    insertions = 0
    for row in range(300):
        words = _words(batch, row)
        seen = inputs["text"][row][inputs["text_mask"][row]].tolist()
        assert (seen[0], seen[-1]) == (2, 3)
        assert len(seen) <= int(batch["text_mask"][row].sum())
        left, masks, gaps, at = seen[1:-1], 0, 0, 0
        kept: list[int] = []
        while left:
            if left[0] == MASK:
                masks, left = masks + 1, left[1:]
                continue
            number = next(n for n, w in enumerate(words) if w[0] == left[0])
            assert left[: len(words[number])] == words[number], "whole words stay or go"
            left = left[len(words[number]) :]
            assert number >= at, "in the order of the text"
            if number > at:
                gaps += 1
                assert masks > 0, "no gap without a mask"
            insertions += masks if number == at else 0
            kept.append(number)
            at, masks = number + 1, 0
        budget = math.ceil(hyper.get("mask_ratio", 0.3) * len(words) - 1e-9)
        assert len(words) - len(kept) == budget
        assert seen.count(MASK) <= budget
        assert gaps + (budget > 0 and not kept) <= max(1, seen.count(MASK))
    assert (insertions > 0) == (hyper.get("mask_ratio", 0.3) not in (0.0, 1.0))


def test_gaps_are_as_likely_in_front_as_behind():
    rows, words = 4000, 20
    text = torch.arange(5, 5 + words + 2).repeat(rows, 1)
    word = torch.arange(-1, words + 1).repeat(rows, 1)
    word[:, -1] = -1
    batch = {"text": text, "text_mask": text > 0, "text_word": word, "text_sentence": word.clamp(max=0)}
    inputs = _task(random=0.0, permute=False).transform(batch, Draws(0, 0, rows))
    hits = torch.tensor([int((inputs["text"] != 6 + n).all(1).sum()) for n in range(words)])
    assert hits.sum() == rows * 6
    # No span reaches over an end, so that words there go less often: as seldom at the one as at the other.
    assert stats.chisquare(hits[6:-6].numpy()).pvalue > 1e-4
    for near, far in zip(hits[:10], hits.flip(0)[:10], strict=True):
        assert stats.binomtest(int(near), int(near + far), 0.5).pvalue > 1e-4


def test_a_tenth_of_the_masks_is_a_random_token():
    batch = _batch(800)
    batch["text"] = batch["text"].clamp(max=5)  # one word, over and over
    plain = _task(random=0.0, permute=False).transform(batch, Draws(0, 0, 800))
    noisy = _task(permute=False).transform(batch, Draws(0, 0, 800))
    assert torch.equal(plain["text_mask"], noisy["text_mask"])
    masked = plain["text"] == MASK
    assert torch.equal(plain["text"][~masked], noisy["text"][~masked])
    seen = noisy["text"][masked]
    assert stats.binomtest(int((seen != MASK).sum()), len(seen), 0.1).pvalue > 1e-4
    assert set(seen.tolist()) == {MASK, *range(5, 30)}, "random tokens are words, never special ones"


def test_the_target_is_the_text_in_its_own_order():
    batch = _batch(50)
    inputs = _task().transform(batch, Draws(0, 0, 50))
    assert torch.equal(inputs["target"], batch["text"])
    assert inputs["target_tokens"] == batch["text_mask"].sum()
    assert "text_sentence" not in inputs


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_loss_and_gradient_are_those_of_transformers(kind):
    torch.set_default_dtype(torch.float64)
    try:
        task = _task(kind)
        encoder = task.encoder("text")
        net = AutoModelForSeq2SeqLM.from_config(encoder.backbone.net.config).double()
        net.load_state_dict(encoder.backbone.net.state_dict())
        batch = _batch(6, length=24)
        batch["text"] = torch.where(batch["text"] > 4, 5 + batch["text"] % 25, batch["text"])
        inputs = task.transform(batch, Draws(0, 0, 6))
        loss = task(inputs)["loss"]
        labels = inputs["target"].masked_fill(~inputs["target_mask"], -100)
        expected = net(input_ids=inputs["text"], attention_mask=inputs["text_mask"].long(), labels=labels).loss
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        loss.backward()
        expected.backward()
        ours, theirs = dict(encoder.backbone.net.named_parameters()), dict(net.named_parameters())
        assert ours.keys() == theirs.keys()
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-9, atol=1e-14)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_preview_reads_well(monkeypatch):
    texts = [
        "The cat sat on the mat. The dog lay on the rug! Was it red?",
        "One more sentence is here. And another one.",
    ]
    words = Tokenizer.train(texts * 4, 120)
    encoder = create_encoder(
        "transformers/bart", "text", tokenizer=words, decoder=True, d_model=16, encoder_layers=1, decoder_layers=1
    )
    task = create("denoising", {"text": encoder}, random=0.0)
    rows = [words.divide(text, 40, ["text_word", "text_sentence"]) for text in texts]
    ids, masks = (torch.stack(part) for part in zip(*(words(text, 40) for text in texts), strict=True))
    batch = {"text": ids, "text_mask": masks}
    batch |= {key: torch.stack([row[key] for row in rows]) for key in ("text_word", "text_sentence")}
    inputs = task.transform(batch, Draws(0, 0, 2))
    answers = torch.nn.functional.one_hot(inputs["target"], task.tokens)
    monkeypatch.setattr(task, "logits", lambda inputs: answers[inputs["target_mask"]])
    seen, target, predicted, prediction = task.preview(inputs, {})
    whole = [words.decode(i[m]) for i, m in zip(ids, masks, strict=True)]
    assert target.cells == predicted.cells == prediction.cells == whole
    assert all("[MASK]" in cell for cell in seen.cells)
    # One that says what it has just read foresees nothing, whatever its choices look like.
    monkeypatch.setattr(task, "logits", lambda inputs: answers.roll(1, dims=1)[inputs["target_mask"]])
    _, target, predicted, _ = task.preview(inputs, {})
    assert [cell.count("_") for cell in predicted.cells] == inputs["target_mask"].sum(1).tolist()


def test_refuses_what_cannot_work():
    with pytest.raises(RecipeError, match=r"set encoders\.text\.decoder: true"):
        create("denoising", tiny_encoders())
    for wrong in ({"mask_ratio": 30}, {"span": 0}, {"random": -0.1}):
        with pytest.raises(RecipeError, match="should be"):
            _task(**wrong)
    encoder = tiny_text_to_text("bart")
    encoder.tokenizer.mask_id = None
    with pytest.raises(RecipeError, match="needs a mask token"):
        create("denoising", {"text": encoder})
