"""Cross-encoder distillation: which candidates, whose scores, what is learned from them and by whom."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from tiny_encoders import TinyImage, TinyText, tiny_batch, tiny_encoders, tiny_fused

from mmssl.encoders.base import Features
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws

ROWS, WIDTH = 7, 6

pytestmark = pytest.mark.usefixtures("double")


def distillation(encoders=None, rows: int = ROWS, **hyper):
    """Task, inputs, outputs; two rows have the same text."""
    torch.manual_seed(0)
    task = create("cross_encoder_distillation", encoders or tiny_fused("cross"), **{"width": WIDTH} | hyper)
    batch = tiny_batch(rows)
    for key in ("text", "text_mask"):
        batch[key][4] = batch[key][1]
    inputs = task.transform(batch, Draws(0, 0, rows))
    return task, inputs, task.predict(inputs)


def apart() -> dict:
    """Two towers that nothing else reads, and a frozen cross-encoder with its own."""
    encoders = tiny_fused("cross")
    for name in ("image", "text", "fusion"):
        encoders[name].freeze()
    return encoders | {"fast_image": TinyImage(), "fast_text": TinyText()}


def score(task, outputs, a: int, b: int) -> float:
    """Of one pair, by the fusion alone."""
    tokens, valid = outputs["b_tokens"][b : b + 1], outputs["b_valid"][b : b + 1] > 0.5
    seen = Features(outputs["a_tokens"][a : a + 1], outputs["a_tokens"][a : a + 1, 0], ())
    return float(task.match(seen, Features(tokens, tokens[:, 0], (), valid)).detach())


def by_hand(task, outputs, form: str, negatives: int, temperature: float) -> float:
    """Row by row in both directions, with scipy."""
    a, b = outputs["a"].detach().numpy(), outputs["b"].detach().numpy()
    cosines = a @ b.T / task.temperature.item()
    equal = np.eye(len(a), dtype=bool)
    equal[1, 4] = equal[4, 1] = True
    found: list[float] = []
    for direction, table in enumerate((cosines, cosines.T)):
        for i, row in enumerate(table):
            others = [j for j in np.argsort(-row) if not equal[i, j]][:negatives]
            candidates = [i, *others]
            pairs = [(i, j) if direction == 0 else (j, i) for j in candidates]
            taught = np.array([score(task, outputs, *pair) for pair in pairs]) / temperature
            said = row[candidates]
            if form == "kl":
                found.append(entropy(softmax(taught), softmax(said)))
            else:
                found += [((taught[0] - t) - (said[0] - s)) ** 2 for t, s in zip(taught[1:], said[1:], strict=True)]
    return float(np.mean(found))


@pytest.mark.parametrize("form", ["kl", "margin_mse"])
@pytest.mark.parametrize(("negatives", "temperature"), [(2, 1.0), (3, 2.0), (50, 1.0)])
def test_loss_is_that_of_row_by_row(form, negatives, temperature):
    task, inputs, outputs = distillation(form=form, candidates=negatives, teacher_temperature=temperature, weight=0.5)
    losses = task.loss(outputs, inputs)
    assert losses["distillation/loss"].item() == pytest.approx(by_hand(task, outputs, form, negatives, temperature))
    rest = losses["matching/loss"] + losses["contrastive/loss"]
    assert losses["loss"].item() == pytest.approx((rest + 0.5 * losses["distillation/loss"]).item())
    alike = {**outputs, "a": torch.zeros_like(outputs["a"])}
    with torch.no_grad():  # the candidates are then others, unless all of them are
        uninformed = task.loss(alike, inputs)["distillation/loss"]
    if negatives == 50:
        assert losses["distillation/uninformed"].item() == pytest.approx(uninformed.item())
        share = losses["distillation/loss"] / losses["distillation/uninformed"]
        assert losses["distillation/relative_error"].item() == pytest.approx(share.item())


def test_a_student_or_a_teacher_to_which_all_candidates_are_alike_is_at_the_level():
    task, inputs, outputs = distillation()
    levels = task.chance(8).metrics
    for term in ("matching", "contrastive", "distillation"):  # each has a verdict of its own
        assert any(key.startswith(f"{term}/") for key in levels)
    alike = {**outputs, "a": torch.zeros_like(outputs["a"])}
    assert task.loss(alike, inputs)["distillation/relative_error"].item() == pytest.approx(1)
    assert levels["distillation/relative_error"] == 1
    assert levels.keys() <= task.loss(outputs, inputs).keys()
    with torch.no_grad():
        for parameter in task.head.parameters():
            parameter.zero_()
    flat = task.loss(outputs, inputs)
    assert flat["distillation/uninformed"].item() == 0
    assert flat["distillation/relative_error"].item() == 1


@pytest.mark.parametrize("form", ["kl", "margin_mse"])
def test_a_student_that_says_what_its_teacher_says_has_no_loss_and_a_gradient_leads_there(form):
    task, inputs, outputs = distillation(form=form, candidates=3)
    taught, _, there = task._scores(outputs, inputs["items"])
    assert task._errors(taught, taught + 5, there).abs().max().item() < 1e-12
    said = torch.zeros_like(taught).requires_grad_()
    (slope,) = torch.autograd.grad(task._errors(taught, said, there).sum(), said)
    if form == "kl":  # of softmax(said) - softmax(taught)
        expected = np.exp(log_softmax(said.detach().numpy(), axis=1)) - softmax(taught.numpy(), axis=1)
        np.testing.assert_allclose(slope.numpy(), expected, atol=1e-12)
    else:
        margins = taught[:, :1] - taught[:, 1:]
        expected = torch.cat([-2 * margins.sum(1, keepdim=True), 2 * margins], dim=1)
        torch.testing.assert_close(slope, expected)


def test_the_distillation_teaches_the_towers_and_never_the_fusion():
    task, inputs, outputs = distillation()
    term = task.loss(outputs, inputs)["distillation/loss"]
    learning = {name: p for name, p in task.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(term, list(learning.values()), allow_unused=True)
    taught = {name for name, g in zip(learning, found, strict=True) if g is not None and g.any()}
    assert taught == {
        *(name for name in learning if name.startswith(("encoders.image.", "encoders.text."))),
        *(f"project_{side}.{part}" for side in "ab" for part in ("weight", "bias")),
        "temperature",
    }


def test_a_frozen_cross_encoder_with_its_own_towers_teaches_others():
    task, inputs, outputs = distillation(apart(), a="fast_image", b="fast_text", form="margin_mse")
    towers = task.encoder("image"), task.encoder("text")
    for key, tower in zip("ab", towers, strict=True):
        torch.testing.assert_close(outputs[f"{key}_tokens"], tower(inputs[key], inputs.get(f"{key}_valid")).tokens)
    losses = task.loss(outputs, inputs)
    assert losses["distillation/loss"].item() == pytest.approx(by_hand(task, outputs, "margin_mse", 4, 1.0))
    losses["loss"].backward()
    learned = {name.rpartition(".")[0] for name, p in task.named_parameters() if p.grad is not None and p.grad.any()}
    assert "head" in learned
    assert {"encoders.fast_image.first", "encoders.fast_text.net"} <= learned
    assert not any(name.startswith(("encoders.image", "encoders.text", "encoders.fusion")) for name in learned)
    quick, slow = task.pairs
    assert (quick.a, quick.b, quick.match) == ("fast_image", "fast_text", None)
    assert (slow.a, slow.b, slow.embed) == ("image", "text", None)


def test_a_batch_without_candidates_teaches_nothing():
    task, inputs, outputs = distillation(rows=5)
    inputs["items"][:] = 3
    for form in ("kl", "margin_mse"):
        task.form = form
        losses = task.loss(outputs, inputs)
        assert losses["distillation/loss"].item() == 0
        assert math.isfinite(losses["loss"].item())


def test_what_cannot_work_is_said():
    with pytest.raises(RecipeError, match=r"cross_encoder_distillation: fusion = 'text' reads text; it should be"):
        create("cross_encoder_distillation", tiny_encoders(), fusion="text")
    with pytest.raises(RecipeError, match=r"'audio' reads audio, and 'image', which the fusion 'fusion' reads in its"):
        create("cross_encoder_distillation", tiny_fused("cross"), a="audio")


def test_the_preview_shows_what_both_say():
    task, inputs, outputs = distillation(candidates=2)
    *_, last = task.preview(inputs, outputs)
    assert last.title == "own text of 3: teacher | student"
    taught, said, _ = task._scores(outputs, inputs["items"])
    assert last.cells[2] == f"{taught[2].softmax(0)[0].item():.2f} | {said[2].softmax(0)[0].item():.2f}"
