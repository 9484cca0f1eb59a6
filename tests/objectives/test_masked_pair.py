"""Masked pairs: what is hidden, what levels mean, both sides are used. FLAVA's own terms are in test_flava.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_encoders import TinyText, TinyTokenizer, tiny_batch, tiny_encoders, tiny_pairs
from torch import Tensor

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import Objective, create
from mmssl.objectives.base import Step
from mmssl.ops.draws import Draws

ROWS, LENGTH, CODES = 6, 10, 20


def _task(kind: str = "joint", *, seed: int = 0, **hyper: Any) -> Objective:
    torch.manual_seed(seed)
    encoders = tiny_pairs(kind, hyper["a"] if hyper.get("a") in ("audio", "video") else "image")
    return create("masked_pair", encoders, **{"codes": CODES, **hyper})


def test_what_is_hidden_is_what_is_asked_and_cannot_be_seen():
    task = _task(views={"area": None}).eval()
    batch = tiny_batch(ROWS)
    inputs = task.transform(batch, Draws(0, 0, ROWS))
    hidden = inputs["a/hidden"]
    assert torch.equal(torch.zeros_like(hidden).scatter(1, inputs["a/places"], inputs["a/chosen"]), hidden)
    assert inputs["a/hidden_places"] == hidden.sum()
    # Other pixels behind the mask, and other words behind the mask token, change no answer.
    answers = task.logits(inputs)
    pixels = hidden.view(ROWS, 3, 3).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    noise = torch.randint(0, 256, batch["image"].shape, dtype=torch.uint8)
    unseen = task.logits({**inputs, "a": torch.where(pixels, noise, batch["image"])})
    seen = task.logits({**inputs, "a": torch.where(pixels, batch["image"], noise)})
    for side in "ab":
        torch.testing.assert_close(unseen[side], answers[side])
        assert (seen[side] - answers[side]).abs().max() > 1e-3  # both sides look at the image
    words = task.logits({**inputs, "b": torch.where(batch["text_mask"], 7, 0)})
    assert (words["a"] - answers["a"]).abs().max() > 1e-3
    b = {key.partition("/")[2]: value for key, value in inputs.items() if key.startswith("b/")}
    restored = torch.where(b["chosen"], b["target"], inputs["b"].gather(1, b["places"]))
    assert torch.equal(inputs["b"].scatter(1, b["places"], restored), batch["text"])


@pytest.mark.parametrize(
    ("form", "sides", "share_a", "share_b"),
    [
        ("flava", {}, 75 / 196, 0.15),
        ("beit3", {}, 0.4, 0.5),
        ("videobert", {}, 0.15, 0.15),
        ("beit3", {"a": None}, 0.0, 0.15),
        ("beit3", {"b": None}, 0.4, 0.0),
        ("beit3", {"mask_ratio_a": 0, "mask_ratio_b": 0.25}, 0.0, 0.25),
    ],
)
def test_rates_are_those_of_the_form(form, sides, share_a, share_b):
    task = _task("multiway", form=form, views={"area": None}, **sides)
    batch = tiny_batch(ROWS, size=32, length=60)
    inputs = task.transform(batch, Draws(0, 0, ROWS))
    assert ("a" in inputs) == ("a" in task.sides)
    assert ("b" in inputs) == ("b" in task.sides)
    assert inputs["a/hidden"].sum(1).max() == round(share_a * 64) if share_a else "a/hidden" not in inputs
    lengths = batch["text_mask"].sum(1)
    words = (batch["text"] > 4).sum(1)
    if share_b:
        expected = [min(w, max(1, round(share_b * n))) for n, w in zip(lengths.tolist(), words.tolist(), strict=True)]
        assert inputs["b/chosen"].sum(1).tolist() == expected
    else:
        assert "b/chosen" not in inputs
    outputs = task.predict(inputs)
    sides = {side for side, share in (("a", share_a), ("b", share_b)) if share}
    assert outputs.keys() == {f"{side}/{name}" for side in sides for name in ("log_likelihood_ratio", "right")}
    # Whole sides go through the encoder as they are, which a combination then runs once for several tasks.
    if "a" in task.sides and not share_a:
        assert inputs["a"] is batch["image"]


def test_padding_behind_a_sound_is_never_asked_for_nor_learned_from():
    task = _task(a="audio", mask_ratio_a=0.5, codes=3)
    batch = tiny_batch(ROWS, frames=12)
    inputs = task.transform(batch, Draws(0, 0, ROWS))
    valid = inputs["a_valid"]
    assert not valid.all()
    assert not (inputs["a/chosen"] & ~valid.gather(1, inputs["a/places"])).any()
    task.before_step(Step(0, lambda: [batch]))
    assert int(task.patches.codebook.counts.sum()) == int(valid.sum())
    assert task.patches.codebook.centers.isfinite().all()


TUBELETS = {"image_size": 12, "patch_size": 4, "num_frames": 12, "tubelet_size": 3}
LAYER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


@pytest.mark.parametrize("frames", [1, 3])
def test_of_a_clip_the_same_places_are_hidden_in_all_frames_and_no_answer_depends_on_them(frames):
    torch.manual_seed(0)
    encoders = tiny_pairs(a="video")
    if frames > 1:  # in place of a network that sees each frame alone
        encoders["video"] = create_encoder("transformers/videomae", "video", **TUBELETS, **LAYER)
    hyper = {"codes": [4, 5], "mask_ratio_a": 0.4, "views": {"area": None}}
    task, batch = create("masked_pair", encoders, a="video", **hyper), tiny_batch(ROWS)
    task.before_step(Step(0, lambda: [batch]))
    assert task.patches.codebook.counts.all()
    task.double().eval()
    inputs = task.transform(batch, Draws(0, 0, ROWS))
    hidden = inputs["a/hidden"].view(ROWS, 12 // frames, 3, 3)
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    assert hidden[:, 0].sum((1, 2)).max() == round(0.4 * 9)
    assert inputs["a/hidden_places"] == hidden.sum()

    # The targets are the codes of the pixels there, as the network sees them.
    normalize = task.encoder("video").normalize
    clips = (batch["video"].double() / 255 - normalize.mean[:, None, None]) / normalize.std[:, None, None]
    for row, time, y, x in hidden.nonzero().tolist():
        cube = clips[row, frames * time : frames * (time + 1), :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        slot = int((inputs["a/places"][row] == 9 * time + 3 * y + x).nonzero())
        assert inputs["a/chosen"][row, slot]
        assert inputs["a/target"][row, slot] == task.patches.codebook(cube.permute(0, 2, 3, 1).reshape(1, -1))

    inputs["a"] = (batch["video"].double() / 255).requires_grad_()
    answers = torch.cat([logits.flatten() for logits in task.logits(inputs).values()])
    (gradient,) = torch.autograd.grad(answers @ torch.randn_like(answers), [inputs["a"]])
    covered = hidden.repeat_interleave(frames, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    covered = covered[:, :, None].expand_as(gradient)
    assert torch.equal(task.concealed(inputs).hidden["a"].expand_as(gradient), covered)
    assert (gradient[covered] == 0).all()
    assert (gradient[~covered] != 0).all()


# What the levels mean.


def test_the_histogram_scores_one_and_the_most_frequent_code_makes_all_its_mistakes(monkeypatch):
    task, batch = _task(views={"area": None}), tiny_batch(64)
    batch["image"][:, :, :, :8] = 255  # blank patches
    task.before_step(Step(0, lambda: [batch]))
    inputs = task.transform(batch, Draws(0, 0, 64))
    task.double()
    blind = {
        "a": torch.zeros(int(inputs["a/hidden_places"]), CODES),
        "b": torch.zeros(int(inputs["b/hidden_places"]), 30),
    }
    monkeypatch.setattr(task, "logits", lambda inputs: blind)
    uniform = task(inputs)
    assert float(uniform["loss"]) == pytest.approx(task.chance(64).loss)
    assert float(uniform["loss"]) == pytest.approx(math.log(CODES) + math.log(30), rel=1e-6)
    codes, words = task.patches.codebook.counts + 1, task.words.unigram.counts + 1
    shares = {"a": (codes / codes.sum()).log(), "b": (words / words.sum()).log()}
    blind = {side: shares[side].expand_as(blind[side]) for side in "ab"}
    counted = task(inputs)
    for name in ("image", "text"):
        assert float(counted[f"{name}/relative_error"]) == pytest.approx(1, rel=1e-5)
    assert float(counted["image/relative_mistakes"]) == pytest.approx(1, rel=1e-5)
    # Blank patches make the histogram far better than 1 / K.
    assert counted["image/loss"] < 0.75 * uniform["image/loss"]
    assert counted["image/accuracy"] > 0.5
    assert counted["image/perplexity"] < 0.6 * CODES
    assert int(task.words.unigram.counts.sum()) == int((batch["text"] > 4).sum())


def test_the_codebook_is_learned_once_from_crops_as_they_are_trained_on():
    task, batch = _task(), tiny_batch(64)
    read = []

    def batches():
        for i in range(100):
            read.append(i)
            yield batch

    task.before_step(Step(0, batches))
    # 64 patches for each of 20 codes, 32 words for each of 30 tokens; a batch has 576 patches and some 750 words.
    assert read == [0, 1, 2]
    task.before_step(Step(1, batches))
    task.before_step(Step(0, batches))  # it has learned already, or what it was lent has
    _task().before_step(Step(1, batches))
    assert read == [0, 1, 2]
    again = _task()
    again.before_step(Step(0, lambda: [batch] * 3))
    assert torch.equal(task.patches.codebook.centers, again.patches.codebook.centers)
    assert "patches.codebook.centers" in task.state_dict()
    assert "words.unigram.counts" in task.state_dict()
    # Quantized patches are nearer to the picture than its mean is.
    patches = task.patches.vectors(task.sides["a"], batch, 0)
    error = (patches - task.patches.codebook.decode(task.patches.codebook(patches))).square().mean()
    assert error < 0.95 * patches.var()


def _colors(rows: int, step: int) -> dict[str, Tensor]:
    """Images and clips of one of three colors and the word for it, between start and end."""
    generator = torch.Generator().manual_seed(step)
    which = torch.randint(0, 3, (rows,), generator=generator)
    image = torch.zeros(rows, 3, 12, 12, dtype=torch.uint8)
    image[torch.arange(rows), which] = 255
    text = torch.stack([torch.full_like(which, 2), which + 10, torch.full_like(which, 3)], 1)
    clip = image[:, None].repeat(1, 2, 1, 1, 1)
    return {"image": image, "video": clip, "text": text, "text_mask": torch.ones_like(text, dtype=torch.bool)}


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "a"), [("joint", "image"), ("multiway", "image"), ("cross", "image"), ("joint", "video")]
)
def test_one_side_tells_the_other(kind, a):
    sides = {"mask_ratio_a": 0, "mask_ratio_b": 0.5} if kind == "cross" else {"mask_ratio_a": 0.8, "mask_ratio_b": 0.0}
    task = _task(kind, seed=4 if kind == "cross" else 0, a=a, codes=3, views={"area": None}, **sides)
    task.before_step(Step(0, lambda: [_colors(64, 999)]))
    optimizer = torch.optim.Adam(task.parameters(), lr=2e-2)
    for step in range(50):
        loss = task(task.transform(_colors(24, step), Draws(0, step, 24)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task.eval()
    inputs = task.transform(_colors(64, 1000), Draws(0, 1000, 64))
    name, side = ("text", "a") if kind == "cross" else (a, "b")
    assert task(inputs)[f"{name}/relative_error"] < 0.2
    other = {**inputs, side: inputs[side].roll(1, 0)}
    if kind == "cross":  # of the image a few patches are left, which tell as well
        assert task(other)["text/relative_error"] > 1


@pytest.mark.parametrize(
    ("kind", "hyper", "message"),
    [
        ("joint", {"mask_ratio_a": 0, "mask_ratio_b": 0}, "hides nothing"),
        ("joint", {"mask_ratio_a": 1.0}, "mask_ratio_a = 1.0 .* less than 1"),
        ("joint", {"a": None}, "a joint fusion reads pairs; .*multiway"),
        ("joint", {"fusion": None}, "without a fusion only patches"),
        ("joint", {"a": None, "fusion": None}, "masked_language"),
        ("joint", {"fusion": "text"}, "fusion = 'text' reads text; it should be an encoder"),
        ("joint", {"a": "text", "b": "image"}, "a = text and b = image, and the fusion 'fusion' reads image and text"),
        ("cross", {}, "a cross fusion says nothing of a; set mask_ratio_a: 0"),
        ("joint", {"codes": 1}, "codes = 1 .* greater than or equal to 2"),
        ("joint", {"codes": [12, 1]}, r"codes = \[12, 1\] should be int \| tuple\[int, ...\] from 2"),
        ("joint", {"codes": []}, r"codes = \[\] should be int"),
    ],
)
def test_what_cannot_work_is_told_when_built(kind, hyper, message):
    with pytest.raises(RecipeError, match=message):
        _task(kind, **hyper)


def test_networks_that_cannot_hide_anything_are_told_when_built():
    encoders = tiny_pairs()
    image = tiny_encoders()["image"]
    image.spec = {"model": "timm/resnet18"}
    with pytest.raises(RecipeError, match=r"timm/resnet18 has none; take a plain vision transformer"):
        create("masked_pair", {**encoders, "image": image})
    with pytest.raises(RecipeError, match="needs a mask token"):
        create("masked_pair", {**encoders, "text": TinyText(TinyTokenizer(mask_id=None))})
    task = _task(views={"area": None})
    with pytest.raises(RecipeError, match="a grid of 1 x 3 patches"):
        task.transform({**tiny_batch(2), "image": torch.zeros(2, 3, 4, 12, dtype=torch.uint8)}, Draws(0, 0, 2))
