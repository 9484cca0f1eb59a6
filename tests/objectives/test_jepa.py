"""JEPA: what is hidden is not read, targets are the teacher's of the whole, and collapse shows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.base import EMBEDDINGS
from mmssl.objectives.reconstruction.jepa import JEPA
from mmssl.ops.draws import Draws
from mmssl.ops.masking import draw_rectangles, take

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
CLIPS = {"image_size": 32, "patch_size": 8, "num_frames": 4, "hidden_size": 16, "num_hidden_layers": 1}
SMALL = {"predictor_depth": 1, "predictor_width": 16, "predictor_heads": 2, "views": {"area": None}}
ROWS = 4

pytestmark = pytest.mark.usefixtures("double")


def task(form: str = "ijepa", **hyper: Any) -> JEPA:
    torch.manual_seed(0)
    if form == "ijepa":
        encoder = create_encoder("timm/vit_tiny_patch16_224", "image", **VIT)
        return create("jepa", {"image": encoder}, **(SMALL | hyper))
    clips = create_encoder("transformers/videomae", "video", **CLIPS, num_attention_heads=2, intermediate_size=32)
    return create("jepa", {"video": clips}, encoder="video", form="vjepa", **(SMALL | hyper))


def batch(form: str = "ijepa", rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (3, 32, 32) if form == "ijepa" else (4, 3, 32, 32)
    pixels = torch.randint(0, 256, (rows, *shape), dtype=torch.uint8, generator=generator)
    return {"image" if form == "ijepa" else "video": pixels}


@pytest.mark.parametrize("area", [(0.15, 0.2), (0.7, 0.7)])
def test_rectangles_are_whole_of_their_area_and_anywhere(area):
    drawn = draw_rectangles((14, 12), 3, area, (0.75, 1.5), Draws(0, 0, 400)).unflatten(2, (14, 12))
    rows, columns = drawn.any(3), drawn.any(2)
    assert torch.equal(drawn, rows[..., None] & columns[:, :, None])  # what is between its sides is in it
    for along in (rows, columns):
        assert torch.all((along[..., 1:] & ~along[..., :-1]).sum(2) + along[..., 0].long() == 1)  # in one piece
    tall, wide = rows.sum(2).double(), columns.sum(2).double()
    share = (tall * wide / (14 * 12)).mean()
    assert abs(share - sum(area) / 2) < 0.02 if area[1] < 0.5 else share <= area[1] + 0.02
    if area[1] < 0.5:
        assert (tall / wide).min() > 0.6
        assert (tall / wide).max() < 2.0
        assert torch.all(drawn.flatten(0, 1).double().mean(0) > 0)  # corners, too


@pytest.mark.parametrize("form", ["ijepa", "vjepa"])
def test_nothing_of_a_hidden_block_is_read(form):
    built = task(form)
    made = built.transform(batch(form, 50), Draws(0, 0, 50))
    places = 64 if form == "ijepa" else 16
    for number in range(len(built.ways)):
        seen, hidden = made[f"seen_{number}"], made[f"hidden_{number}"].flatten(1)
        counts = made[f"valid_{number}"].flatten(1).any(1)
        assert counts.double().mean() > 0.9
        both = (seen[:, :, None] == hidden[:, None]).any((1, 2))
        assert not torch.any(both & counts)
        if form == "vjepa":  # the same places in both pairs of frames
            for one in (seen, hidden):
                first, second = one[:, : one.shape[1] // 2], one[:, one.shape[1] // 2 :]
                assert torch.equal(first + places, second)


def test_a_row_without_anything_to_read_does_not_count():
    torch.manual_seed(0)
    encoder = create_encoder("timm/vit_tiny_patch16_224", "image", **(VIT | {"img_size": 8}))
    built = create("jepa", {"image": encoder}, **SMALL)
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    inputs = built.transform({"image": pixels}, Draws(0, 0, 40))  # of four places four are hidden, some twice
    counts = inputs["valid_0"].flatten(1).any(1)
    assert 0 < counts.sum() < 40
    assert inputs["scored_0"] == inputs["valid_0"].sum()
    some = {key: value[counts] if value.ndim else value for key, value in inputs.items()}
    torch.testing.assert_close(built(inputs)["loss"], built(some)["loss"])


@pytest.mark.parametrize("form", ["ijepa", "vjepa"])
def test_the_loss_is_that_of_the_teacher_s_normalized_tokens_of_the_whole(form):
    built = task(form)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    given = built.transform(batch(form), Draws(0, 0, ROWS))
    outputs = built.predict(given)
    encoder, teacher = built.encoders[built.name], built.teacher["encoder"]
    whole = teacher(given[built.modality]).tokens
    whole = (whole - whole.mean(2, keepdim=True)) / (whole.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    losses = []
    for number in range(len(built.ways)):
        seen, hidden = given[f"seen_{number}"], given[f"hidden_{number}"]
        context = encoder.encode(take(encoder.embed(given[built.modality]), seen))
        total, count = 0.0, 0
        for block in range(hidden.shape[1]):
            made = built.predictor(context, seen, hidden[:, block], (8, 8) if form == "ijepa" else (2, 4, 4))
            for row in range(ROWS):
                wrong = made[row] - whole[row, hidden[row, block]]
                small = wrong.abs() < 1
                each = torch.where(small, wrong.square() / 2, wrong.abs() - 0.5) if form == "ijepa" else wrong.abs()
                counts = given[f"valid_{number}"][row, block]
                total, count = total + (each.mean(1) * counts).sum(), count + int(counts.sum())
        losses.append(total / count)
    torch.testing.assert_close(built.loss(outputs, given)["loss"], torch.stack(losses).mean())


def test_hidden_pixels_reach_the_targets_alone():
    built = task()
    inputs = built.transform(batch(), Draws(0, 0, ROWS))
    mask = built.concealed(inputs).hidden["image"]
    other = inputs | {"image": torch.where(mask, 1 - inputs["image"], inputs["image"])}
    a, b = built.predict(inputs), built.predict(other)
    torch.testing.assert_close(a["prediction_0"], b["prediction_0"])
    assert (a["target_0"] - b["target_0"]).abs().max() > 1e-3


def test_one_answer_to_everything_is_the_level_and_alike_rows_show():
    built = task("vjepa").train()
    given = built.transform(batch("vjepa"), Draws(0, 0, ROWS))
    outputs = built.predict(given)
    built.loss(outputs, given)
    built.after_step(0.0)
    told = [outputs[f"target_{number}"][given[f"valid_{number}"]] for number in range(2)]
    torch.testing.assert_close(built.mean.value, torch.cat(told).mean(0))
    built.eval()
    assert built.loss(outputs, given)["relative_error"] != 1
    for number in range(2):
        outputs[f"prediction_{number}"] = built.mean.value.expand_as(outputs[f"target_{number}"])
    assert built.loss(outputs, given)["relative_error"].item() == pytest.approx(
        built.chance(ROWS).metrics["relative_error"]
    )
    assert built.drawn_together(given)[EMBEDDINGS].shape == (ROWS, 1, built.encoders["video"].dim)
    torch.testing.assert_close(built.drawn_together(given)[EMBEDDINGS][:, 0], outputs["taught"])
    outputs["taught"] = outputs["taught"][:1].expand(ROWS, -1)
    assert built.loss(outputs, given)["spread"].item() == pytest.approx(0, abs=1e-6)


def test_the_teacher_follows_along_a_line_and_leaves_the_run():
    built = task(momentum=0.9)
    before = copy.deepcopy(built.teacher["encoder"].state_dict())
    with torch.no_grad():
        for parameter in built.encoders["image"].parameters():
            parameter.add_(1.0)
    built.after_step(0.5)  # half of the way from 0.9 to 1
    for name, parameter in built.teacher["encoder"].named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.05)
    assert built.exported["image"] is built.teacher["encoder"]
    given = built.transform(batch(), Draws(0, 0, ROWS))
    built(given)["loss"].backward()
    assert all(parameter.grad is None for parameter in built.teacher.parameters())


def test_what_cannot_be_is_said_when_the_task_is_built():
    with pytest.raises(RecipeError, match="does not read patch by patch"):
        create("jepa", {"image": create_encoder("timm/test_resnet", "image")})
    with pytest.raises(RecipeError, match="multiple of 4"):
        task(predictor_width=18)
    built = task()
    with pytest.raises(RecipeError, match="cannot be cut into patches"):
        built.transform({"image": batch()["image"][..., :30, :30]}, Draws(0, 0, ROWS))


def test_padding_of_a_sound_is_neither_read_nor_predicted_nor_attended_to():
    torch.manual_seed(0)
    encoder = create_encoder("timm/vit_tiny_patch16_224", "audio", **(VIT | {"img_size": [16, 32]}), mels=16)
    built = create("jepa", {"audio": encoder}, encoder="audio", **SMALL)
    sound = torch.rand(ROWS, 31 * 160, generator=torch.Generator().manual_seed(1)) - 0.5
    mask = torch.arange(sound.shape[1]).expand(ROWS, -1) < torch.tensor([[4960], [2400], [1700], [4960]])
    given = built.transform({"audio": sound, "audio_mask": mask}, Draws(0, 0, ROWS))
    sounding, bands = given["sounding"], 16 // VIT["patch_size"]
    assert torch.equal(sounding[1].view(bands, -1).any(0), sounding[1].view(bands, -1).all(0))  # whole columns of time
    assert [int(row.view(bands, -1)[0].sum()) for row in sounding] == [8, 4, 3, 8]
    counts = given["valid_0"].flatten(1).any(1)
    assert counts[0]
    assert torch.all(sounding.gather(1, given["seen_0"])[counts])
    assert torch.all(sounding.gather(1, given["hidden_0"].flatten(1))[given["valid_0"].flatten(1)])
    padding = ~sounding.view(ROWS, bands, -1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    other = given | {"audio": torch.where(padding, 3.0, given["audio"])}
    a, b = built.predict(given), built.predict(other)
    torch.testing.assert_close(a["prediction_0"][counts], b["prediction_0"][counts])
    torch.testing.assert_close(a["taught"], b["taught"])
    valid = given["valid_0"]
    torch.testing.assert_close(a["target_0"][valid], b["target_0"][valid])
    torch.testing.assert_close(built.loss(a, given)["loss"], built.loss(b, other)["loss"])
    whole = built.transform({"audio": sound}, Draws(0, 0, ROWS))
    assert "sounding" not in whole
    assert whole["scored_0"] > given["scored_0"]
