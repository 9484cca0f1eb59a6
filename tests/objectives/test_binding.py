"""Binding: one projection of the anchor, one loss a pair, and two that never met find each other."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import tiny_batch, tiny_encoders, tiny_world

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws


def _task(**hyper):
    torch.manual_seed(0)
    return create("binding", tiny_encoders(), **{"others": ["audio", "text"], "width": 8} | hyper)


@pytest.mark.usefixtures("double")
def test_loss_is_the_sum_over_the_others_and_the_anchor_has_one_projection():
    task = _task()
    inputs = task.transform(tiny_batch(6), Draws(0, 0, 6))
    outputs = task.predict(inputs)
    assert {"project_image", "project_audio", "project_text"} < dict(task.named_children()).keys()
    image = outputs["image"]
    expected = 0.0
    for other in ("audio", "text"):
        logits = image @ outputs[other].T / 0.05
        own = torch.arange(6)
        expected += (logits.log_softmax(1)[own, own] + logits.log_softmax(0)[own, own]).mean() / -2
    losses = task.loss(outputs, inputs)
    torch.testing.assert_close(losses["loss"], expected)
    names = {f"accuracy_{a}" for a in ("image_to_audio", "audio_to_image", "image_to_text", "text_to_image")}
    assert losses.keys() == names | {"loss"}
    flat = task.loss({key: torch.zeros_like(value) for key, value in outputs.items()}, inputs)
    assert float(flat["loss"]) == pytest.approx(task.chance(6).loss)


@pytest.mark.long
def test_two_that_never_met_are_found_above_chance():
    """Sounds with pictures in one source, texts with other pictures in another, and then texts find sounds."""
    task = _task(others={"audio": "heard", "text": "read"}, temperature=0.2, views={"area": None})
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)

    def found() -> float:
        with torch.no_grad():
            rows = tiny_world(300, seed=1000)
            pair = next(pair for pair in task.pairs if {pair.a, pair.b} == {"audio", "text"})
            sides = [
                embed(task.encoder(name)(rows[name], rows[f"{name}_mask"]))
                for name, embed in zip((pair.a, pair.b), pair.embed, strict=True)
            ]
            nearest = (sides[1] @ sides[0].T).argmax(1)
            return float((rows["topic"][nearest] == rows["topic"]).float().mean())

    before = found()
    for step in range(150):
        heard, read = tiny_world(32, seed=2 * step), tiny_world(32, seed=2 * step + 1)
        batch = {f"heard/{key}": value for key, value in heard.items() if not key.startswith("text")}
        batch |= {f"read/{key}": value for key, value in read.items() if not key.startswith("audio")}
        optimizer.zero_grad()
        task(task.transform(batch, Draws(0, step, 32)))["loss"].backward()
        optimizer.step()
    assert before < 0.4
    assert found() > 0.8, (before, found())


def test_each_pair_reads_its_own_source():
    task = _task(others={"audio": "heard", "text": "read"})
    assert task.needs == ("heard/image", "heard/audio", "read/image", "read/text")
    one, two = tiny_batch(4), tiny_batch(4, seed=1)
    batch = {f"heard/{k}": v for k, v in one.items()} | {f"read/{k}": v for k, v in two.items()}
    inputs = task.transform(batch, Draws(0, 0, 4))
    assert torch.equal(inputs["audio"], one["audio"])
    assert torch.equal(inputs["text"], two["text"])
    assert inputs["heard/image"].shape == inputs["read/image"].shape
    assert not torch.equal(inputs["heard/image"], inputs["read/image"])
    outputs = task.predict(inputs)
    assert outputs.keys() == {"heard/image", "audio", "read/image", "text"}
    assert len(task.preview(inputs, outputs)) == 6
    together = _task(others={"audio": "all", "text": "all", "video": "read"})
    assert together.needs == ("all/image", "all/audio", "all/text", "read/image", "read/video")


def test_the_anchors_own_space_keeps_what_is_bound():
    encoders = tiny_encoders()
    encoders["text"].freeze()
    task = create("binding", encoders, others=["audio"], bound=["text"], width=None)
    assert task.needs == ("image", "audio")
    assert [(pair.a, pair.b) for pair in task.pairs] == [("image", "audio"), ("image", "text"), ("audio", "text")]
    assert isinstance(task.project_image, torch.nn.Identity)
    assert isinstance(task.project_text, torch.nn.Identity)
    assert task.project_audio.weight.shape == (6, 5)


def test_refuses_what_cannot_work():
    with pytest.raises(RecipeError, match="should name one encoder or more besides the anchor 'image', each once"):
        _task(others=[])
    with pytest.raises(RecipeError, match="besides the anchor 'text'"):
        _task(anchor="text")
    with pytest.raises(RecipeError, match="'text' is in the anchor's space already only where"):
        _task(others=["audio"], bound=["text"], width=None)
    with pytest.raises(ValueError, match="needs an encoder named 'sound'"):
        _task(others=["sound"])
