"""Next sentence and sentence order: what a pair is made of, what must not tell the answer, transformers' own head."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from tiny_encoders import TinyText, tiny_batch, tiny_encoders
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import BertForNextSentencePrediction, PreTrainedTokenizerFast

from mmssl import recipe
from mmssl.build import build
from mmssl.data.toy import ToySource
from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.objectives import create
from mmssl.objectives.correspondence.next_sentence import NextSentence
from mmssl.ops.draws import Draws
from mmssl.registry import ROOT

FORMS = ("nsp", "sop")


def _task(form: str = "nsp") -> NextSentence:
    torch.manual_seed(0)
    return create("next_sentence", {"text": TinyText()}, form=form)


def _sentences(batch: dict[str, Tensor], row: int) -> list[list[int]]:
    """The whole sentences of a row; the last one of a row that is full may go on."""
    found: dict[int, list[int]] = {}
    for token, number in zip(batch["text"][row].tolist(), batch["text_sentence"][row].tolist(), strict=True):
        found.setdefault(number, []).append(token)
    found.pop(-1, None)
    if batch["text_mask"][row].all():
        found.popitem()
    return list(found.values())


def _flat(sentences: list[list[int]]) -> list[int]:
    return [token for sentence in sentences for token in sentence]


def _parts(inputs: dict[str, Tensor], row: int) -> tuple[list[int], list[int]]:
    """The two passages of a pair; what stands around them is checked."""
    text, mask, segments = (inputs[key][row] for key in ("text", "text_mask", "segments"))
    length = int(mask.sum())
    assert mask[:length].all()
    assert not text[length:].any()
    assert not segments[length:].any()
    tokens = text[:length].tolist()
    middle = tokens.index(3)
    assert tokens[0] == 2
    assert [i for i, token in enumerate(tokens) if token == 3] == [middle, length - 1]
    assert segments[:length].tolist() == [0] * (middle + 1) + [1] * (length - middle - 1)
    return tokens[1:middle], tokens[middle + 1 : -1]


def _answered(task: NextSentence, batch: dict[str, Tensor], answer: bool, monkeypatch, step: int = 0):
    with monkeypatch.context() as patch:
        patch.setattr(Draws, "chance", lambda self, p: torch.full((self.rows,), answer))
        return task.transform(batch, Draws(0, step, len(batch["text"])))


@pytest.mark.parametrize("form", FORMS)
def test_half_of_the_pairs_have_either_answer(form):
    inputs = _task(form).transform(tiny_batch(2000, length=40), Draws(0, 0, 2000))
    answers = inputs["answer"][inputs["valid"]]
    assert stats.binomtest(int(answers.sum()), len(answers)).pvalue > 1e-3
    assert inputs["valid_pairs"] == inputs["valid"].sum() > 1000


def test_the_second_part_goes_on_or_is_of_another_text(monkeypatch):
    task, batch = _task(), tiny_batch(120, length=40)
    documents = [_sentences(batch, row) for row in range(120)]
    starts: set[int] = set()
    made = [_answered(task, batch, answer, monkeypatch) for answer in (False, True)]
    for answer, inputs in enumerate(made):
        for row, sentences in enumerate(documents):
            first, second = _parts(inputs, row)
            assert inputs["valid"][row] == (len(sentences) > 1 and _parts(made[0], row) != _parts(made[1], row))
            if not inputs["valid"][row]:
                continue
            cut = next(k for k in range(1, len(sentences)) if _flat(sentences[:k]) == first)
            starts.add(cut)
            own = _flat(sentences[cut:])
            assert second
            if answer:
                others = [
                    _flat(other[k:])[: len(second)]
                    for i, other in enumerate(documents)
                    for k in range(1, len(other))
                    if i != row
                ]
                assert second in others
                assert second != own[: len(second)]
            else:
                assert second == own[: len(second)]
                assert len(second) >= 1
    assert len(starts) > 3


def test_neither_lengths_nor_places_depend_on_the_answer(monkeypatch):
    batch = tiny_batch(300, length=40)
    no, yes = (_answered(_task(), batch, answer, monkeypatch) for answer in (False, True))
    for key in ("text_mask", "segments", "valid"):
        assert torch.equal(no[key], yes[key])
    # As much is left of a part as there could be at most: between half of the shorter one and all of it.
    lengths = no["segments"].sum(1)[no["valid"]]
    assert lengths.float().mean() > 3


@pytest.mark.long
def test_a_partner_has_another_text_and_all_others_are_as_likely(monkeypatch):
    # Each row has three tokens of its own, so that they tell where a second part is from; 0, 5 and 6 are one text.
    own = torch.tensor([0, 1, 2, 3, 4, 0, 0])[:, None] * 3 + 5
    text = F.pad(own + torch.arange(8) % 3, (1, 3))
    text[:, 0], text[:, 9] = 2, 3
    sentence = F.pad(torch.arange(8) // 2, (1, 3), value=-1).repeat(7, 1)
    sentence[4] = sentence[4].clamp(max=0)  # a single one
    batch = {"text": text, "text_mask": text > 0, "text_sentence": sentence}
    task, counts, steps = _task(), torch.zeros(7, 5), 400
    for step in range(steps):
        inputs = _answered(task, batch, True, monkeypatch, step)
        assert inputs["valid"].tolist() == [True] * 4 + [False] + [True] * 2
        seen = (inputs["text"] * inputs["segments"]).gather(1, inputs["segments"].argmax(1, keepdim=True))[:, 0]
        counts[torch.arange(7), (seen - 5) // 3] += 1
    for row, likely in {0: [0, 1, 1, 1, 0], 1: [3, 0, 1, 1, 0], 5: [0, 1, 1, 1, 0]}.items():
        expected = np.array(likely) / sum(likely) * steps
        assert (counts[row].numpy()[expected == 0] == 0).all()
        assert stats.chisquare(counts[row].numpy()[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_what_has_no_answer_does_not_count(form):
    task, batch = _task(form), tiny_batch(6, length=40)
    for key in ("text", "text_mask", "text_sentence"):
        batch[key][:] = batch[key][:1]
    if form == "sop":
        batch["text_sentence"] = batch["text_sentence"].clamp(max=0)
    for rows in (6, 1):  # nothing but one text; a row alone
        few = {key: value[:rows] for key, value in batch.items()}
        inputs = task.transform(few, Draws(0, 0, rows))
        assert not inputs["valid"].any()
        losses = task(inputs)
        assert losses["loss"] == 0
        losses["loss"].backward()
        assert all(not p.grad.any() for p in task.parameters())
    # Two sentences of the same tokens have no order.
    same = {"text": torch.tensor([[2, 7, 8, 7, 8, 3, 0]]), "text_sentence": torch.tensor([[-1, 0, 0, 1, 1, -1, -1]])}
    same["text_mask"] = same["text"] > 0
    assert not task.transform(same, Draws(0, 0, 1))["valid"].any()


def test_a_row_without_answer_adds_nothing_to_the_mean():
    task, batch = _task(), tiny_batch(64, length=40)
    inputs = task.transform(batch, Draws(0, 0, 64))
    assert 0 < inputs["valid"].sum() < 64
    outputs, valid = task.predict(inputs), inputs["valid"]
    losses = task.loss(outputs, inputs)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(outputs["logits"][valid], inputs["answer"][valid]))
    right = outputs["logits"].argmax(1) == inputs["answer"]
    torch.testing.assert_close(losses["accuracy"], right[valid].float().mean())
    assert math.isclose(task.chance(64).loss, math.log(2))


def test_both_orders_are_the_same_tokens_and_only_whole_sentences(monkeypatch):
    task, batch = _task("sop"), tiny_batch(200, length=40)
    no, yes = (_answered(task, batch, answer, monkeypatch) for answer in (False, True))
    assert torch.equal(no["text"].sort(1).values, yes["text"].sort(1).values)
    assert torch.equal(no["text_mask"], yes["text_mask"])
    full = 0
    for row in range(200):
        first, second = _parts(no, row)
        assert _parts(yes, row) == (second, first)
        sentences = _sentences(batch, row)
        assert first + second == _flat(sentences)
        full += bool(batch["text_mask"][row].all() and no["valid"][row])
    assert full, "rows that fill their length should be among them"


@pytest.fixture(scope="module")
def stories() -> tuple[Tokenizer, dict[str, Tensor]]:
    texts = list(ToySource(rows=500).values("story"))
    tokenizer = Tokenizer.train(texts, 200)
    rows = [tokenizer.divide(text, 64, ["text_sentence"]) for text in texts]
    return tokenizer, {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.quick(1)
@pytest.mark.parametrize("form", FORMS)
def test_words_alone_do_not_tell(form, stories):
    """Neither those of the pair for the order, nor those of its second part, or their number, for the continuation."""
    tokenizer, batch = stories
    text = create_encoder("transformers/bert", "text", tokenizer=tokenizer, **SMALL)
    inputs = create("next_sentence", {"text": text}, form=form).transform(batch, Draws(0, 0, len(batch["text"])))
    assert inputs["valid"].float().mean() > 0.95
    bags, answers = [], []
    for row in inputs["valid"].nonzero()[:, 0].tolist():
        seen = inputs["segments"][row] > (0 if form == "nsp" else -1)
        tokens = inputs["text"][row][seen].tolist()
        bags.append({"length": len(tokens)} | {str(token): tokens.count(token) for token in tokens})
        answers.append(int(inputs["answer"][row]))
    blind = make_pipeline(DictVectorizer(), LogisticRegression(C=0.1, max_iter=500))
    accuracy = cross_val_score(blind, bags, np.array(answers), cv=5).mean()
    assert abs(accuracy - 0.5) < 4 * 0.5 / math.sqrt(len(bags))


SMALL = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20},
    **{"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
}
TEXTS = [
    "A cat sits on a mat. The dog looks at it. Both are tired!",
    "Two trees stand by the road. One is green. The other is not.",
    "Is this a story? It has two sentences.",
]


def test_pairs_are_what_the_tokenizer_makes_and_the_head_is_transformers_bert(monkeypatch):
    """`BertForNextSentencePrediction` with the same weights: answer, loss and every gradient."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        tokenizer = Tokenizer.train(TEXTS, 80)
        text = create_encoder("transformers/bert", "text", tokenizer=tokenizer, **SMALL)
        assert text.embeds_segments
        task = create("next_sentence", {"text": text})
        for p in task.parameters():
            torch.nn.init.normal_(p, std=0.3)
        other = BertForNextSentencePrediction(text.backbone.net.config)
        other.bert.load_state_dict(text.backbone.net.state_dict(), strict=False)
        other.bert.pooler.dense.load_state_dict(task.head[0].state_dict())
        other.cls.seq_relationship.load_state_dict(task.head[2].state_dict())

        rows = [tokenizer.divide(line, 60, ["text_sentence"]) for line in TEXTS]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        inputs = task.transform(batch, Draws(3, 0, 3))
        assert inputs["valid"].all()
        assert 0 < inputs["answer"].sum() < 3
        library = tokenizer._library
        for row in range(3):
            ids, segments = inputs["text"][row], inputs["segments"][row]
            inside = (ids > 4) & inputs["text_mask"][row]
            sides = [library.decode(ids[inside & (segments == side)]) for side in range(2)]
            known = library(*sides, return_token_type_ids=True)
            length = len(known["input_ids"])
            assert ids[:length].tolist() == known["input_ids"]
            assert segments[:length].tolist() == known["token_type_ids"]
            assert int(inputs["text_mask"][row].sum()) == length

        expected = other(
            input_ids=inputs["text"],
            attention_mask=inputs["text_mask"].long(),
            token_type_ids=inputs["segments"],
            labels=inputs["answer"],
        )
        expected.loss.backward()
        losses = task(inputs)
        losses["loss"].backward()
        torch.testing.assert_close(losses["loss"], expected.loss)
        pairs = [
            (text.backbone.net, other.bert),
            (task.head[0], other.bert.pooler.dense),
            (task.head[2], other.cls.seq_relationship),
        ]
        for own, theirs in pairs:
            gradients = {name: p.grad for name, p in theirs.named_parameters()}
            for name, p in own.named_parameters():
                torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-12, msg=name)
    finally:
        torch.set_default_dtype(torch.float32)


def test_networks_without_segments_read_the_separator_alone():
    tokenizer = Tokenizer.train(TEXTS, 80)
    text = create_encoder(
        "transformers/distilbert", "text", tokenizer=tokenizer, dim=16, n_layers=1, n_heads=2, hidden_dim=16
    )
    assert not text.embeds_segments
    task = create("next_sentence", {"text": text})
    rows = [tokenizer.divide(line, 60, ["text_sentence"]) for line in TEXTS]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    assert task.predict(task.transform(batch, Draws(0, 0, 3)))["logits"].shape == (3, 2)


def test_refuses_what_cannot_make_pairs():
    with pytest.raises(RecipeError, match="reads image"):
        create("next_sentence", tiny_encoders(), encoder="image")
    words = PreTrainedTokenizerFast(tokenizer_object=Words(WordLevel({"a": 0, "<end>": 1}, "a")), eos_token="<end>")
    gpt = create_encoder("transformers/gpt2", "text", tokenizer=Tokenizer(words), n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(RecipeError, match="no such tokens"):
        create("next_sentence", {"text": gpt})
    trained = Tokenizer.train(["the cat sat on the mat"] * 4, 60)
    causal = create_encoder("transformers/gpt2", "text", tokenizer=trained, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(RecipeError, match="'text' is causal, so that this one sees no other"):
        create("next_sentence", {"text": causal})
    assert Tokenizer.open_clip("ViT-B-32").pair_ids is None
    toy = ROOT.parent / "recipes" / "correspondence" / "next_sentence_toy.yaml"
    with pytest.raises(RecipeError, match="needs 2"):
        build(recipe.load(toy, {"training.batch_size": 1}))


def test_preview_shows_both_parts_and_the_answer():
    task, batch = _task(), tiny_batch(8, length=40)
    inputs = task.transform(batch, Draws(0, 0, 8))
    pairs, target, prediction = task.preview(inputs, {"logits": F.one_hot(inputs["answer"], 2).float()})
    for row in range(8):
        first, second = _parts(inputs, row)
        assert pairs.cells[row] == " | ".join([" ".join(map(str, [2, *first, 3])), " ".join(map(str, [*second, 3]))])
        if inputs["valid"][row]:
            assert target.cells[row] == prediction.cells[row] == ("goes on", "another text")[inputs["answer"][row]]
            assert prediction.right[row] is True
        else:
            assert target.cells[row] == "does not count"
            assert prediction.right[row] is None
