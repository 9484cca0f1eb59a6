"""Span denoising: exact counts, sentinels in order, nothing lost, every place removed as often, T5's loss."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders, tiny_text_to_text
from transformers import AutoModelForSeq2SeqLM

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.objectives import create
from mmssl.objectives.reconstruction.span_denoising import corrupted_lengths, count_spans, draw_spans
from mmssl.ops.draws import Draws


def _task(kind: str = "t5", sentinels: int = 12, **hyper):
    torch.manual_seed(0)
    return create("span_denoising", {"text": tiny_text_to_text(kind, sentinels)}, **hyper)


def _runs(row: list[bool]) -> list[int]:
    """Lengths of the runs of True."""
    text = "".join("x" if hidden else " " for hidden in row)
    return [len(run) for run in text.split()]


def _join(seen: list[int], target: list[int], sentinels: list[int], end: int) -> list[int]:
    """The text: each sentinel of what was seen, replaced by what the target says behind it."""
    assert target[-1] == end
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            assert token == sentinels[len(spans)], "sentinels in order, each once"
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    assert [token for token in seen if token in sentinels] == list(spans)
    assert all(spans.values())
    return [token for part in seen for token in spans.get(part, [part])]


def test_512_and_114_are_made_of_568():
    assert count_spans(568) == (85, 28)
    assert corrupted_lengths(568) == (512, 114)
    task = _task(sentinels=40, random_roll=False)
    text = torch.randint(5, 30, (4, 570))
    text[:, 0], text[:, -1] = 2, 3
    inputs = task.transform({"text": text}, Draws(0, 0, 4))
    # A tokenizer of T5 has no token in front of a text; this one has.
    assert (inputs["text_mask"].sum(1) == 1 + 512).all()
    assert (inputs["target_mask"].sum(1) == 114).all()


@pytest.mark.quick(2)
@pytest.mark.parametrize("roll", [True, False])
@pytest.mark.parametrize(("rate", "span"), [(0.15, 3.0), (0.5, 1.0), (0.9, 2.0), (0.3, 8.0)])
def test_counts_are_exact_and_the_text_can_be_put_together_again(rate, span, roll):
    task = _task(sentinels=40, mask_ratio=rate, span=span, random_roll=roll)
    sentinels = list(task.tokenizer.sentinel_ids)
    assert sentinels == list(range(69, 29, -1)), "descending from the top of the vocabulary"
    batch = tiny_batch(120, length=60)
    inputs = task.transform(batch, Draws(0, 0, 120))
    cut = 0
    for row in range(120):
        text = batch["text"][row][batch["text_mask"][row]].tolist()
        seen = inputs["text"][row][inputs["text_mask"][row]].tolist()
        target = inputs["target"][row][inputs["target_mask"][row]].tolist()
        assert _join(seen, target, sentinels, 3) == text
        assert (seen[0], seen[-1]) == (2, 3)
        removed, spans = count_spans(len(text) - 2, rate, span)
        assert len(target) - 1 - sum(token in sentinels for token in target) == removed
        more = sum(token in sentinels for token in target) - spans
        assert more in ((0, 1) if roll else (0,)), "a roll can cut one span in two"
        cut += more
    assert (cut > 0) == roll
    assert not inputs["text"][~inputs["text_mask"]].any()
    assert not inputs["target"][~inputs["target_mask"]].any()
    assert inputs["target_tokens"] == inputs["target_mask"].sum()


def test_every_place_is_removed_as_often_as_any_other():
    rows, length = 6000, 40
    sizes = torch.full((rows,), length), *torch.tensor(count_spans(length)).expand(rows, 2).unbind(1)
    rolled = draw_spans(*sizes, length + 3, Draws(0, 0, rows), roll=True)
    assert not rolled[:, length:].any()
    hits = rolled[:, :length].sum(0)
    assert hits.sum() == rows * 6
    # Places of one row depend on each other; those of different rows do not, so each place alone is binomial.
    lowest = min(stats.binomtest(int(n), rows, 6 / length).pvalue for n in hits)
    assert lowest > 1e-3 / length
    assert stats.chisquare(hits.numpy()).pvalue > 1e-4
    as_published = draw_spans(*sizes, length, Draws(0, 0, rows), roll=False)
    assert not as_published[:, 0].any()
    assert as_published[:, -1].all()


def test_lengths_are_uniform_among_all_divisions():
    # 6 removed tokens in 3 spans: 10 divisions, all equally likely; so are those of the 6 that stay.
    rows = 4000
    sizes = (torch.full((rows,), 12), torch.full((rows,), 6), torch.full((rows,), 3))
    pattern = draw_spans(*sizes, 12, Draws(0, 0, rows), roll=False)
    for kind in (pattern, ~pattern):
        found: dict[tuple[int, ...], int] = {}
        for row in kind.tolist():
            lengths = tuple(_runs(row))
            found[lengths] = found.get(lengths, 0) + 1
        assert len(found) == 10
        assert stats.chisquare(list(found.values())).pvalue > 1e-4


def test_short_and_empty_texts():
    task = _task()
    sentinel = task.tokenizer.sentinel_ids[0]
    text = torch.tensor([[2, 3, 0, 0, 0], [2, 7, 3, 0, 0], [2, 7, 8, 3, 0], [0, 0, 0, 0, 0]])
    inputs = task.transform({"text": text, "text_mask": text > 0}, Draws(0, 0, 4))
    said = [row[mask].tolist() for row, mask in zip(inputs["target"], inputs["target_mask"], strict=True)]
    assert said[:2] == [[3], [3]], "nothing can be removed and something be left"
    assert said[2] in ([sentinel, 7, 3], [sentinel, 8, 3])
    assert said[3] == [3]
    assert inputs["text"][1, :3].tolist() == [2, 7, 3]
    assert not inputs["text_mask"][3].any()
    assert torch.isfinite(task(inputs)["loss"])


def test_an_unknown_token_is_text_and_can_be_removed():
    text = torch.ones(50, 10, dtype=torch.long)
    text[:, 0], text[:, -1] = 2, 3
    inputs = _task().transform({"text": text}, Draws(0, 0, 50))
    assert (inputs["target"] == 1).sum() == 50 * count_spans(8)[0]


def test_loss_and_gradient_are_those_of_transformers():
    torch.set_default_dtype(torch.float64)
    try:
        task = _task()
        encoder = task.encoder("text")
        net = AutoModelForSeq2SeqLM.from_config(encoder.backbone.net.config).double()
        net.load_state_dict(encoder.backbone.net.state_dict())
        batch = tiny_batch(6)
        inputs = task.transform(batch, Draws(0, 0, 6))
        loss = task(inputs)["loss"]
        labels = inputs["target"].masked_fill(~inputs["target_mask"], -100)
        expected = net(input_ids=inputs["text"], attention_mask=inputs["text_mask"].long(), labels=labels).loss
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        loss.backward()
        expected.backward()
        theirs = dict(net.named_parameters())
        ours = dict(encoder.backbone.net.named_parameters())
        assert ours.keys() == theirs.keys()
        assert len(ours) > 10
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-9, atol=1e-14)
            assert parameter.grad.abs().max() > 0
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_tokenizer_made_from_texts_names_the_sentinels_in_the_preview(monkeypatch):
    texts = ["the cat sat on the mat and the dog lay on the rug", "a red square is left of a blue circle"]
    words = Tokenizer.train(texts * 4, 120)
    encoder = create_encoder(
        "transformers/t5", "text", tokenizer=words, decoder=True, sentinels=9, d_model=8, d_kv=4, d_ff=8, num_layers=1
    )
    task = create("span_denoising", {"text": encoder})
    ids, masks = (torch.stack(part) for part in zip(*(encoder.tokenizer(t, 40) for t in texts), strict=True))
    inputs = task.transform({"text": ids, "text_mask": masks}, Draws(0, 0, 2))
    answers = torch.nn.functional.one_hot(inputs["target"], task.tokens)
    monkeypatch.setattr(task, "logits", lambda inputs: answers[inputs["target_mask"]])
    seen, target, _, prediction = task.preview(inputs, {})
    assert target.cells == prediction.cells
    for row in range(2):
        assert "<extra_id_0>" in seen.cells[row]
        assert target.cells[row].startswith("<extra_id_0>")


def test_refuses_what_cannot_work():
    with pytest.raises(RecipeError, match=r"set encoders\.text\.sentinels: 100"):
        _task(sentinels=0)
    with pytest.raises(RecipeError, match=r"set encoders\.text\.decoder: true"):
        create("span_denoising", tiny_encoders())
    with pytest.raises(RecipeError, match="reads image"):
        create("span_denoising", tiny_encoders(), encoder="image")
    for wrong in ({"mask_ratio": 15}, {"span": 0}):
        with pytest.raises(RecipeError, match="should be"):
            _task(**wrong)
    with pytest.raises(RecipeError, match=r"raise encoders\.text\.sentinels"):
        _task(sentinels=3).transform({"text": torch.full((2, 80), 7)}, Draws(0, 0, 2))
