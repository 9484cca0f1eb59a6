"""Masked language modeling: exact counts, what may be chosen, the mean over the global batch."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from tiny_encoders import TinyText, TinyTokenizer, tiny_batch, tiny_encoders
from tokenizers import Tokenizer as Model
from tokenizers.models import WordLevel
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from mmssl.audit.verdict import judge
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.media.vocabulary import SPECIAL_TOKENS
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.recipe import Optimizer, Training
from mmssl.training.loop import fit


def _task(**hyper):
    torch.manual_seed(0)
    return create("masked_language", {"text": TinyText()}, **hyper)


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
    assert inputs["masked_tokens"] == sum(expected)


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


@pytest.mark.parametrize("hyper", [{}, {"unit": "word"}, {"unit": "span"}, {"count": "bernoulli"}], ids=str)
def test_whatever_the_unit_targets_recover_the_text_and_specials_stay(hyper):
    batch = tiny_batch(200, length=60)
    task = _task(**hyper)
    inputs = task.transform(batch, Draws(0, 0, 200))
    chosen = inputs["chosen"]
    target = torch.where(chosen, inputs["target"], inputs["text"].gather(1, inputs["places"]))
    assert torch.equal(inputs["text"].scatter(1, inputs["places"], target), batch["text"])
    assert (inputs["target"][chosen] > 4).all()
    seen = inputs["text"].gather(1, inputs["places"])[chosen]
    assert ((seen == 4) | (seen > 4)).all()
    assert inputs["masked_tokens"] == chosen.sum() > 800
    later = task.transform(batch, Draws(0, 1, 200))
    assert not torch.equal(later["text"], inputs["text"])


def _hidden(inputs, length):
    """Which tokens are chosen, bool (B, L)."""
    return torch.zeros(len(inputs["text"]), length, dtype=torch.bool).scatter(1, inputs["places"], inputs["chosen"])


def test_words_are_hidden_whole_and_never_overshoot():
    batch = tiny_batch(400, length=60)
    inputs = _task(unit="word").transform(batch, Draws(0, 0, 400))
    chosen, word = _hidden(inputs, 60), batch["text_word"]
    for w in range(int(word.max()) + 1):
        own = word == w
        assert set((chosen & own).sum(1).tolist()) <= {0, *own.sum(1).tolist()}
        assert not ((chosen & own).any(1) & ~((chosen & own).sum(1) == own.sum(1))).any()
    budget = torch.tensor([max(1, round(0.15 * n)) for n in batch["text_mask"].sum(1).tolist()])
    assert (chosen.sum(1) <= budget).all()
    assert (chosen.sum(1) == budget).float().mean() > 0.8
    # Each token of a word decides for itself between mask, another and itself.
    seen = inputs["text"]
    pair = chosen[:, 1:] & chosen[:, :-1] & (word[:, 1:] == word[:, :-1])
    assert (((seen[:, 1:] == 4) != (seen[:, :-1] == 4)) & pair).any()


def test_spans_have_the_count_of_spanbert_and_one_fate():
    batch = tiny_batch(400, length=60)
    inputs = _task(unit="span").transform(batch, Draws(0, 0, 400))
    chosen, seen = _hidden(inputs, 60), inputs["text"]
    content = (batch["text"] > 4).sum(1)
    assert chosen.sum(1).tolist() == [math.ceil(0.15 * n) for n in content.tolist()]
    fates = []
    for row in range(400):
        masked, kept = (seen[row] == 4).tolist(), (seen[row] == batch["text"][row]).tolist()
        place = 0
        while place < 60:
            end = place
            while end < 60 and chosen[row, end]:
                end += 1
            if end > place:
                run = range(place, end)
                assert len({masked[i] for i in run}) == 1
                fates.append("masked" if masked[place] else "kept" if all(kept[i] for i in run) else "random")
            place = end + 1
    assert stats.binomtest(fates.count("masked"), len(fates), 0.8).pvalue > 1e-4
    assert fates.count("random") > 0.04 * len(fates)


def test_bernoulli_is_distributed_as_the_collator_of_transformers():
    """Its seeded masks, on the same texts: how many a text, which places, what is seen there."""
    words = [f"w{i}" for i in range(40)]
    vocabulary = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    library = PreTrainedTokenizerFast(
        tokenizer_object=Model(WordLevel(vocabulary, unk_token="[UNK]")), **SPECIAL_TOKENS
    )
    encoder = TinyText(Tokenizer(library))
    task = create("masked_language", {"text": encoder}, count="bernoulli")
    rows, length = 2000, 66
    text = torch.randint(5, 45, (rows, length), generator=torch.Generator().manual_seed(0))
    text[:, 0], text[:, -1] = 2, 3
    mask = torch.ones_like(text, dtype=torch.bool)
    inputs = task.transform({"text": text, "text_mask": mask}, Draws(0, 0, rows))
    own = _hidden(inputs, length)
    collate = DataCollatorForLanguageModeling(library, mlm_probability=0.15, seed=1)
    other = collate(
        [{"input_ids": row, "special_tokens_mask": [int(i in (2, 3)) for i in row]} for row in text.tolist()]
    )
    hidden = other["labels"] != -100
    for one, two in ((own.sum(1), hidden.sum(1)), (own.nonzero()[:, 1], hidden.nonzero()[:, 1])):
        table = torch.stack([torch.bincount(one, minlength=length), torch.bincount(two, minlength=length)])
        assert stats.chi2_contingency(table[:, table.sum(0) > 10].numpy()).pvalue > 1e-3
    assert stats.kstest(own.sum(1).numpy(), stats.binom(length - 2, 0.15).cdf).statistic < 0.15
    assert own.sum(1).double().std() == pytest.approx(math.sqrt(64 * 0.15 * 0.85), rel=0.06)
    assert not own[:, [0, -1]].any()
    fates = []
    for seen, chosen in ((inputs["text"], own), (other["input_ids"], hidden)):
        now, before = seen[chosen], text[chosen]
        fates.append([int((now == 4).sum()), int((now == before).sum()), int(((now != 4) & (now != before)).sum())])
    assert stats.chi2_contingency(fates).pvalue > 1e-3
    # The collator's random words may be special, these may not.
    assert (other["input_ids"][:, 1:-1] < 4).any()
    assert not (inputs["text"][:, 1:-1] < 4).any()


def test_the_relative_error_is_over_the_frequencies_of_earlier_steps(monkeypatch):
    task, batch = _task(), tiny_batch(6)
    inputs = task.transform(batch, Draws(0, 0, 6))
    outputs = task.predict(inputs)
    losses = task.loss(outputs, inputs)
    # Nothing is known yet: 25 words, equally likely.
    torch.testing.assert_close(losses["relative_error"], losses["loss"].detach() / math.log(25))
    task.after_step(0.0)
    counts = torch.bincount(batch["text"][batch["text"] > 4], minlength=30) + torch.tensor([0] * 5 + [1] * 25)
    again = task.transform(batch, Draws(0, 1, 6))
    blind = -(counts / counts.sum()).log()[again["target"][again["chosen"]]].sum()
    torch.testing.assert_close(again["unigram_surprise"], blind)
    # A network that says the frequencies scores 1, whatever the text.
    logits = (counts + 1e-9).log().expand(int(again["masked_tokens"]), -1)
    monkeypatch.setattr(task, "logits", lambda inputs: logits)
    torch.testing.assert_close(task(again)["relative_error"], torch.tensor(1.0))


@pytest.mark.long
def test_a_run_that_learns_the_frequencies_alone_is_at_chance():
    torch.manual_seed(0)
    share = 1 / torch.arange(1.0, 26)

    class Loader:
        def batches(self, start, stop):
            for step in range(start, stop):
                generator = torch.Generator().manual_seed(step)
                text = 5 + torch.multinomial(share.expand(32, -1), 20, replacement=True, generator=generator)
                yield {"text": text, "text_mask": torch.ones_like(text, dtype=torch.bool), "id": torch.arange(32)}

    task = _task()
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(name == "head.bias")
    training = Training(steps=150, batch_size=32, log_every=5, optimizer=Optimizer(lr=0.1, weight_decay=0.0))
    history = fit(task, Loader(), training, quiet=True)
    (verdict,) = judge(history, task.chance(32), 32)
    # Its accuracy is that of the most frequent word, seven times that of guessing.
    assert sum(record["accuracy"] for record in history[-10:]) / 10 > 6 / 30
    assert (verdict.outcome, verdict.metric) == ("at chance", "relative_error")
    assert history[-1]["relative_error"] == pytest.approx(1, abs=0.05)


def test_choice_is_a_function_of_seed_step_and_row():
    task, batch = _task(), tiny_batch(8)
    first, again, later = (task.transform(batch, Draws(0, step, 8))["text"] for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_loss_is_the_mean_over_masked_tokens():
    task, batch = _task(), tiny_batch(6)
    inputs = task.transform(batch, Draws(0, 0, 6))
    outputs = task.predict(inputs)
    logits, target = task.logits(inputs), inputs["target"][inputs["chosen"]]
    losses = task.loss(outputs, inputs)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(logits, target))
    torch.testing.assert_close(losses["accuracy"], (logits.argmax(-1) == target).float().mean())
    # Logits at masked places are those that all places would have.
    tokens = task.encoder("text")(inputs["text"], inputs["text_mask"]).tokens
    everywhere = task.head.transform(tokens) @ task.encoder("text").token_embedding.T + task.head.bias
    at = inputs["places"][..., None].expand(-1, -1, 30)
    torch.testing.assert_close(logits, everywhere.gather(1, at)[inputs["chosen"]])
    uniform = task.loss({name: torch.zeros_like(value) for name, value in outputs.items()}, inputs)
    assert math.isclose(uniform["loss"], task.chance(6).loss, rel_tol=1e-6)


def test_refuses_a_tokenizer_without_mask_token():
    with pytest.raises(RecipeError, match="needs a mask token"):
        create("masked_language", {"text": TinyText(TinyTokenizer(mask_id=None))})
    with pytest.raises(RecipeError, match="reads image"):
        create("masked_language", tiny_encoders(), encoder="image")
    with pytest.raises(RecipeError, match=r"mask_ratio = 15 .* less than 1"):
        create("masked_language", tiny_encoders(), mask_ratio=15)
    with pytest.raises(RecipeError, match="leave out unit: span"):
        create("masked_language", tiny_encoders(), count="bernoulli", unit="span")
    with pytest.raises(RecipeError, match=r"stop = 2.0 .* less than 1"):
        create("masked_language", tiny_encoders(), unit="span", stop=2.0)
    with pytest.raises((RecipeError, ValueError), match="unit"):
        create("masked_language", tiny_encoders(), unit="line")


def test_preview_fills_the_gaps(monkeypatch):
    task, batch = _task(), tiny_batch(3)
    inputs = task.transform(batch, Draws(0, 0, 3))
    monkeypatch.setattr(task, "logits", lambda inputs: F.one_hot(inputs["target"][inputs["chosen"]], 30))
    shown, target, prediction = task.preview(inputs, {})
    assert target.cells == prediction.cells
    assert target.cells[0].split() == [str(int(i)) for i in batch["text"][0][batch["text_mask"][0]]]
    assert shown.cells != target.cells
    wrong = F.one_hot((inputs["target"][inputs["chosen"]] + 1) % 30, 30)
    monkeypatch.setattr(task, "logits", lambda inputs: wrong)
    marked = task.preview(inputs, {})[2].cells
    hidden = sum(len(re.findall(r"\d+", part)) for line in marked for part in re.findall("«(.*?)»", line))
    assert hidden == int(inputs["chosen"].sum())
