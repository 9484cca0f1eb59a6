"""Multiple instances: candidates are sentences, and both forms of the loss in closed form and by a loop."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders
from torch import Tensor

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.ops.pairs import multiple_instance_nce

FORMS = ("published", "paper")


def _task(**hyper):
    torch.manual_seed(0)
    return create("multiple_instance", tiny_encoders(), **{"width": 7, "candidates": 3} | hyper)


def _by_loop(a: Tensor, b: Tensor, twice: bool) -> float:
    rows, number, losses = len(a), b.shape[1], []
    for i in range(rows):
        positive = sum(math.exp(float(a[i] @ b[i, k])) for k in range(number))
        everything = sum(math.exp(float(a[i] @ b[j, k])) for j in range(rows) for k in range(number))
        everything += sum(
            math.exp(float(a[j] @ b[i, k])) for j in range(rows) for k in range(number) if twice or j != i
        )
        losses.append(-math.log(positive / everything))
    return sum(losses) / rows


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("twice", [True, False])
def test_loss_and_gradient_are_those_of_a_written_out_loop(twice):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 5, generator=generator, requires_grad=True)
    b = torch.randn(6, 4, 5, generator=generator, requires_grad=True)
    loss, *_ = multiple_instance_nce(a, b, 1.0, twice=twice)
    assert float(loss.detach()) == pytest.approx(_by_loop(a.detach(), b.detach(), twice), rel=1e-12)
    scores = torch.einsum("id,jkd->ijk", a, b)
    own = torch.arange(6)
    wide = torch.cat([scores.flatten(1), scores.transpose(0, 1).flatten(1)], dim=1).exp().sum(1)
    positive = scores[own, own].exp().sum(1)
    expected = ((wide - (0 if twice else positive)).log() - positive.log()).mean()
    for got, want in zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("double")
def test_smallest_and_blind_values_are_those_of_the_forms():
    right = 100 * torch.eye(5)
    for twice, least in ((True, math.log(2)), (False, 0.0)):
        loss, a_to_b, b_to_a = multiple_instance_nce(right, right[:, None].expand(-1, 3, -1), 1.0, twice=twice)
        assert float(loss) == pytest.approx(least, abs=1e-12)
        assert a_to_b == b_to_a == 1
    for form in FORMS:
        task = _task(form=form)
        flat = task.loss({"a": torch.zeros(6, 7), "b": torch.zeros(6, 3, 7)}, {})
        assert float(flat["loss"]) == pytest.approx(task.chance(6).loss)


@pytest.mark.usefixtures("double")
def test_with_one_candidate_it_is_one_sum_over_both_directions():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    loss, *_ = multiple_instance_nce(a, b[:, None], 0.5, twice=True)
    scores = 0.5 * a @ b.T
    expected = torch.cat([scores, scores.T], dim=1).logsumexp(1) - scores.diagonal()
    torch.testing.assert_close(loss, expected.mean())


def test_candidates_are_neighboring_sentences_of_the_rows_text():
    task, batch = _task(length=24), tiny_batch(60, length=40)
    inputs = task.transform(batch, Draws(0, 0, 60))
    assert inputs["b"].shape == inputs["b_valid"].shape == (60, 3, 24)
    starts = set()
    for row in range(60):
        text, sentence, mask = (batch[key][row] for key in ("text", "text_sentence", "text_mask"))
        number = int(sentence.max()) + 1
        whole = [text[mask & ((sentence == k) | (sentence < 0))].tolist() for k in range(max(1, number))]
        found = [ids[valid].tolist() for ids, valid in zip(inputs["b"][row], inputs["b_valid"][row], strict=True)]
        first = next(k for k, words in enumerate(whole) if words[:24] == found[0])
        wanted = [whole[(first + k) % len(whole)][:24] for k in range(3)]
        matches = [k for k in range(len(whole)) if [whole[(k + i) % len(whole)][:24] for i in range(3)] == found]
        assert matches or found == wanted
        assert not inputs["b"][row][~inputs["b_valid"][row]].any()
        if number > 3:
            assert min(matches) <= number - 3
            starts.add(min(matches))
        assert all(words[0] == 2 for words in found)
    assert len(starts) > 2


def test_clips_and_sentences_of_noise_are_found_at_chance():
    for form in FORMS:
        task = _task(form=form, normalize=True, temperature=0.1)
        with torch.no_grad():
            found = [task(task.transform(tiny_batch(50, seed=k), Draws(0, k, 50))) for k in range(6)]
        for name in task.accuracies:
            hits = round(sum(float(losses[name]) for losses in found) * 50)
            assert stats.binomtest(hits, 300, 1 / 50).pvalue > 1e-3


def test_unit_vectors_and_a_temperature_where_they_are_asked_for():
    batch = tiny_batch(5)
    plain, cold = _task(), _task(normalize=True, temperature=0.1)
    inputs = plain.transform(batch, Draws(0, 0, 5))
    raw, unit = plain.predict(inputs), cold.predict(inputs)
    for key in ("a", "b"):
        torch.testing.assert_close(unit[key], raw[key] / raw[key].norm(dim=-1, keepdim=True))
    expected, *_ = multiple_instance_nce(unit["a"], unit["b"], 10.0, twice=True)
    torch.testing.assert_close(cold.loss(unit, inputs)["loss"], expected)
    assert len(plain.preview(inputs, raw)) == 3


def test_refuses_what_cannot_work():
    with pytest.raises(RecipeError, match="it should read clips"):
        _task(a="text")
    with pytest.raises(RecipeError, match="reads text, and the encoder 'audio' reads audio"):
        _task(b="audio")
