"""data2vec: targets as the published code makes them, of every kind of input; what is hidden; collapse shows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import tiny_batch, tiny_encoders, tiny_patches, tiny_waves
from torch import Tensor

from mmssl.audit.gradients import leaks
from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.base import Step
from mmssl.objectives.reconstruction.data2vec import Data2Vec
from mmssl.ops.draws import Draws

ROWS = 4
KINDS = ("patches", "spectrogram", "words", "waves")
VIT = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}

pytestmark = pytest.mark.usefixtures("double")


def task(kind: str = "patches", **hyper: Any) -> Data2Vec:
    torch.manual_seed(0)
    if kind == "patches":
        encoder = create_encoder("timm/vit_tiny_patch16_224", "image", **VIT)
        return create("data2vec", {"image": encoder}, **({"views": {"area": None}} | hyper))
    if kind == "spectrogram":
        return create("data2vec", {"audio": tiny_patches()["audio"]}, encoder="audio", **hyper)
    if kind == "words":
        return create("data2vec", {"text": tiny_encoders()["text"]}, encoder="text", **({"mask_ratio": 0.3} | hyper))
    return create("data2vec", {"audio": tiny_waves()}, encoder="audio", **({"mask_length": 2} | hyper))


def batch(kind: str = "patches", rows: int = ROWS) -> dict[str, Tensor]:
    keys = {"patches": ("image",), "words": ("text", "text_mask")}.get(kind, ("audio", "audio_mask"))
    return {key: value for key, value in tiny_batch(rows, size=24).items() if key in keys}


def moved(built: Data2Vec) -> Data2Vec:
    """With a teacher that is another network than the student."""
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_targets_and_loss_are_those_of_the_published_code(kind):
    layers = {"patches": 2}.get(kind)
    built = moved(task(kind, layers=layers))
    inputs = built.transform(batch(kind), Draws(0, 0, ROWS))
    outputs = built.predict(inputs)
    teacher = built.teacher["encoder"]
    x, mask = inputs.get("whole", inputs[built.needs[0]]), inputs.get("audio_mask", inputs.get("text_mask"))
    if kind == "words":
        mask = inputs["valid"]
    depths = [at.tokens for name, at in teacher.layers(x, None if kind == "spectrogram" else mask).items() if
              name != "embeddings"]  # fmt: skip
    depths = depths[{"patches": -2, "waves": -1}.get(kind, 0) :]  # of two layers two thirds, of one all
    for row in range(ROWS):
        valid = inputs["valid"][row]
        if kind == "waves":
            mean = sum(F.instance_norm(tokens[row, valid].T[None])[0].T for tokens in depths) / len(depths)
        else:
            normed = [F.layer_norm(tokens[row, valid], tokens.shape[2:]) for tokens in depths]
            mean = sum(normed) / len(normed)
            mean = mean if kind == "words" else F.layer_norm(mean, mean.shape[1:])
        torch.testing.assert_close(outputs["taught"][row, valid], mean)
    wrong, hidden = [], 0
    beta = {"words": 4.0, "waves": 0.0}.get(kind, 2.0)
    for row in range(ROWS):
        for slot in range(inputs["places"].shape[1]):
            if inputs["chosen"][row, slot]:
                target = outputs["taught"][row, inputs["places"][row, slot]]
                each = outputs["prediction"][row, slot] - target
                small = each.abs() < beta
                wrong.append(torch.where(small, each**2 / (2 * beta), each.abs() - beta / 2) if beta else each**2)
                hidden += 1
    assert hidden == inputs["scored"]
    torch.testing.assert_close(built.loss(outputs, inputs)["loss"], torch.stack(wrong).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_sees_nothing_of_what_is_hidden(kind):
    built = moved(task(kind))
    inputs = built.transform(batch(kind), Draws(0, 0, ROWS))
    assert inputs["chosen"].sum() > 0
    if kind == "waves":  # frames overlap, and its convolutions refuse the audit's gradients
        hidden, token = inputs["hidden"], torch.full_like(built.masked.mask_token, 5.0)
        network = built.encoder("audio")
        embedded = network.embed(network.frames(inputs["audio"])[0], hidden, token)
        assert torch.equal((embedded == 5.0).all(2), hidden)
        return
    found = {leak.what: leak for leak in leaks(built, batch(kind))}
    assert not [leak for leak in found.values() if leak.leaks]
    assert "what is hidden" in found
    key = "whole" if kind == "words" else built.needs[0]
    (mask,) = built.concealed(inputs).hidden.values()
    other = inputs | {key: torch.where(mask, inputs[key].flip(1), inputs[key])}
    first, second = built.predict(inputs), built.predict(other)
    torch.testing.assert_close(first["prediction"], second["prediction"])
    assert (first["target"] - second["target"]).abs().max() > 1e-3


def test_shares_of_places_are_those_of_the_paper():
    built = task()
    hidden = built.transform(batch(rows=60), Draws(0, 0, 60))["hidden"]
    assert hidden.double().mean().item() == pytest.approx(0.6, abs=0.03)
    frames = tiny_batch(60, frames=60)
    waves = task("waves", mask_length=10)
    inputs = waves.transform({"audio": frames["audio"]}, Draws(0, 0, 60))
    assert inputs["hidden"].double().mean().item() == pytest.approx(0.49, abs=0.05)


def test_one_answer_to_everything_is_the_level_and_alike_rows_show():
    built = moved(task("waves"))
    inputs = [built.transform(batch("waves"), Draws(0, step, ROWS)) for step in range(2)]
    outputs = [built.predict(one) for one in inputs]
    built.train()
    for number, (said, given) in enumerate(zip(outputs, inputs, strict=True), 1):
        built.loss(said, given)
        built.after_step(0.0)
        seen = torch.cat([o["taught"][i["valid"]].mean(0)[None] for o, i in zip(outputs, inputs, strict=True)][:number])
        torch.testing.assert_close(built.mean.value, seen.mean(0))  # as many valid frames in both
    built.eval()
    said, given = outputs[0], inputs[0]
    assert built.loss(said, given)["spread"] > 0.1
    said["prediction"] = built.mean.value.expand_as(said["prediction"])
    level = built.chance(ROWS).metrics["relative_error"]
    assert built.loss(said, given)["relative_error"].item() == pytest.approx(level)
    # The same of every row, though not of every place.
    said["taught"] = said["taught"][:1].expand(ROWS, -1, -1)
    assert built.loss(said, given)["spread"].item() == pytest.approx(0, abs=1e-9)
    assert said["taught"].std(1).min() > 0.01


def test_the_teacher_follows_and_the_student_leaves_the_run():
    built = task("words", momentum=(0.8, 0.9))
    before = copy.deepcopy(built.teacher["encoder"].state_dict())
    with torch.no_grad():
        for parameter in built.encoders["text"].parameters():
            parameter.add_(1.0)
    built.after_step(0.15)  # half of the way from 0.8 to 0.9
    for name, parameter in built.teacher["encoder"].named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.15)
    built.before_step(Step(0, data=list))  # of a task that joins late, whose student has learned
    for name, parameter in built.teacher["encoder"].named_parameters():
        torch.testing.assert_close(parameter, before[name] + 1.0)
    assert built.exported["text"] is built.encoders["text"]
    built(built.transform(batch("words"), Draws(0, 0, ROWS)))["loss"].backward()
    assert all(parameter.grad is None for parameter in built.teacher.parameters())
    assert [built.momentum, task().momentum] == [(0.8, 0.9), (0.9998, 0.9998)]


@pytest.mark.parametrize("kind", KINDS)
def test_preview(kind):
    built = task(kind)
    inputs = built.transform(batch(kind), Draws(0, 0, ROWS))
    with torch.no_grad():
        panels = built.preview(inputs, built.predict(inputs))
    assert [panel.title for panel in panels][1:] == ["seen", "prediction"]
    assert all(len(panel.cells) == ROWS for panel in panels)


def test_what_cannot_be_is_said():
    with pytest.raises(RecipeError, match="does not read patch by patch"):
        create("data2vec", {"image": create_encoder("timm/test_resnet", "image")})
    with pytest.raises(RecipeError, match="reads image or text or audio"):
        create("data2vec", {"video": tiny_encoders()["video"]}, encoder="video")
    built = task(layers=4)
    inputs = built.transform(batch(), Draws(0, 0, ROWS))
    with pytest.raises(RecipeError, match="layers = 4, and timm/vit_tiny_patch16_224 has 3"):
        built.predict(inputs)
    with pytest.raises(RecipeError, match="cannot be cut into patches"):
        task().transform({"image": batch()["image"][..., :22, :22]}, Draws(0, 0, ROWS))
