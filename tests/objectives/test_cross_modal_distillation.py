"""Cross-modal distillation: what teachers say, from where they come, and the divergence from it."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from tiny_encoders import tiny_batch, tiny_encoders
from torch import nn

import mmssl
from mmssl.errors import RecipeError
from mmssl.hub import load_classifier
from mmssl.modules.classifier import PictureClassifier
from mmssl.objectives import create
from mmssl.objectives.base import Step
from mmssl.ops.draws import Draws
from mmssl.recipe import Data

SMALL = {"model": "timm/test_resnet", "num_classes": 5}


class Tiny(nn.Module):
    """Answers by the mean color alone."""

    classes = 4

    def __init__(self, sharpness: float = 4.0) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.register_buffer("directions", torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))

    def load(self) -> None:
        """It has its weights."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        colors = pictures.to(self.directions.dtype).mean((2, 3)) / (1 if pictures.is_floating_point() else 255)
        return (self.sharpness * (colors - 0.5) @ self.directions * 10).softmax(1)


def _task(monkeypatch, teachers=("tint",), **hyper):
    monkeypatch.setattr(
        "mmssl.objectives.correspondence.cross_modal_distillation.PictureClassifier", lambda given: Tiny()
    )
    torch.manual_seed(0)
    return create("cross_modal_distillation", tiny_encoders(), teachers={name: {} for name in teachers}, **hyper)


@pytest.mark.usefixtures("double")
def test_loss_is_the_divergence_from_what_the_teachers_say(monkeypatch):
    task, batch = _task(monkeypatch, ("tint", "hue")), tiny_batch(6)
    task.before_step(Step(0, lambda: (tiny_batch(16, seed=k) for k in range(3))))
    inputs = task.transform(batch, Draws(0, 0, 6))
    by_frame = torch.stack([Tiny()(batch["video"][:, t]) for t in range(12)], dim=1)
    torch.testing.assert_close(inputs["tint/posterior"], by_frame.mean(1))
    outputs = task.predict(inputs)
    losses = task.loss(outputs, inputs)
    oracle = sum(
        F.kl_div(outputs[name].log_softmax(1), inputs[f"{name}/posterior"], reduction="batchmean")
        for name in ("tint", "hue")
    )
    torch.testing.assert_close(losses["loss"], oracle)
    entropies = stats.entropy(inputs["hue/posterior"].numpy().T, outputs["hue"].detach().softmax(1).numpy().T)
    prior = torch.cat([Tiny()(tiny_batch(16, seed=k)["video"].flatten(0, 1)) for k in range(3)]).mean(0)
    torch.testing.assert_close(task.prior_hue, prior)
    constant = stats.entropy(inputs["hue/posterior"].numpy().T, prior.numpy()[:, None].repeat(6, 1))
    assert float(losses["hue/relative_error"]) == pytest.approx(entropies.sum() / constant.sum())
    average = {name: prior.log().expand(6, -1) for name in ("tint", "hue")}
    assert float(task.loss(average, inputs)["tint/relative_error"]) == pytest.approx(1)
    assert task.chance(6).metrics == {"tint/relative_error": 1.0, "hue/relative_error": 1.0}
    assert len(task.preview(inputs, outputs)) == 6


@pytest.mark.long
@pytest.mark.usefixtures("double")
def test_a_student_of_what_it_can_hear_does_better_than_the_average_and_one_of_noise_does_not(monkeypatch):
    task = _task(monkeypatch, source="image")
    task.before_step(Step(0, lambda: (tiny_batch(64, seed=k) for k in range(4))))

    def rows(seed: int, *, heard: bool) -> dict[str, torch.Tensor]:
        batch = tiny_batch(64, seed=seed)
        level = torch.randint(2, (64, 1), generator=torch.Generator().manual_seed(seed))
        batch["image"] = (batch["image"] // 2 + 127 * level[:, :, None, None]).to(torch.uint8)
        loud = level if heard else level.flip(0)
        batch["audio"] = batch["audio"] * (0.05 + 0.95 * loud)
        return batch

    for heard in (True, False):
        task = _task(monkeypatch, source="image")
        task.before_step(Step(0, lambda heard=heard: (rows(seed, heard=heard) for seed in range(90, 94))))
        optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], 2e-2)
        for step in range(60):
            optimizer.zero_grad()
            task(task.transform(rows(step, heard=heard), Draws(0, step, 64)))["loss"].backward()
            optimizer.step()
        with torch.no_grad():
            error = float(task(task.transform(rows(1000, heard=heard), Draws(0, 0, 64)))["tint/relative_error"])
        assert error < 0.7 if heard else error > 0.9


def test_a_published_classifier_answers_as_timm_does():
    torch.manual_seed(0)
    teacher = PictureClassifier({**SMALL, "pretrained": False})
    pictures = tiny_batch(3, size=32)["image"]
    config = timm.data.resolve_model_data_config(teacher.net.net)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    expected = teacher.net.net.eval()((pictures / 255 - mean) / std).softmax(1)
    assert teacher.classes == 5
    torch.testing.assert_close(teacher.train()(pictures), expected)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.long
def test_a_saved_classifier_answers_as_it_does(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(16):
        place = tmp_path / "pictures" / ("train" if i < 12 else "test") / ("dark", "light")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        noise = generator.normal(60 + 120 * (i % 2), 30, (16, 16, 3))
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(place / f"{i}.png")
    encoder = mmssl.encoder("timm/test_resnet", "image")
    quick = {"baseline": False, "seeds": 1, "steps": 4, "batch_rows": 8, "decay": (1.0,)}
    how = Data(source="files", image={"size": 16})
    mmssl.adapt(encoder, str(tmp_path / "pictures"), data=how, probe="finetune", save=tmp_path / "it", **quick)
    pictures = tiny_batch(5, size=16)["image"]
    teacher = PictureClassifier({"folder": str(tmp_path / "it")})
    torch.testing.assert_close(teacher(pictures), load_classifier(tmp_path / "it").answer({"image": pictures}))
    encoders = {"audio": tiny_encoders()["audio"]}
    task = create(
        "cross_modal_distillation", encoders, teachers={"own": {"folder": str(tmp_path / "it")}}, source="image"
    )
    assert task.needs == ("image", "audio")
    assert task.heads["own"].out_features == 2


def test_refuses_what_cannot_work(tmp_path):
    def build(teacher, **hyper):
        return create("cross_modal_distillation", tiny_encoders(), teachers={"it": teacher}, **hyper)

    with pytest.raises(RecipeError, match=r"a classifier is \{model: timm/NAME, pretrained: true\} or"):
        build({"pretrained": True})
    with pytest.raises(RecipeError, match="published are timm's, and open_clip/ViT-B-32 is open_clip's"):
        build({"model": "open_clip/ViT-B-32"})
    with pytest.raises(RecipeError, match="timm has no network 'resnet5000'"):
        build({"model": "timm/resnet5000"})
    with pytest.raises(RecipeError, match="holds no classifier; mmssl adapt RUN --probe finetune --save"):
        build({"folder": str(tmp_path)})
    with pytest.raises(RecipeError, match="the student 'video' reads video as its teachers do"):
        build(SMALL, student="video")
    with pytest.raises(RecipeError, match="teachers should hold a name and a classifier"):
        create("cross_modal_distillation", tiny_encoders(), teachers={})
