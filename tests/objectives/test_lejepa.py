"""LeJEPA: the loss by its definition, its levels, directions of a step, and which crops count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.base import Step
from mmssl.ops.draws import Draws
from mmssl.ops.normality import collapsed_level, normal_level

ROWS, CROPS, WIDTH = 12, 4, 5
SMALL = {"hidden": 9, "width": WIDTH, "directions": 30, "local_crops": 2, "local_views": {"size": 8}}


def _task(**hyper):
    torch.manual_seed(0)
    return create("lejepa", tiny_encoders(), **(SMALL | hyper))


def _embeddings(rows: int = ROWS) -> torch.Tensor:
    z = torch.randn(rows, CROPS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (z * torch.linspace(0.3, 1.5, WIDTH, dtype=torch.float64) + 0.3).requires_grad_()


def _by_hand(z: torch.Tensor, directions: torch.Tensor, weight: float) -> torch.Tensor:
    """Loops over crops and directions, with complex numbers, as the paper's listing but for the frequencies."""
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    normal = torch.exp(-(t**2) / 2)
    statistics = []
    for crop in z.unbind(1):
        for direction in directions.double().unbind(1):
            empirical = torch.exp(1j * (crop @ direction)[:, None] * t).mean(0)
            statistics.append(len(z) * torch.trapezoid((empirical - normal).abs() ** 2 * normal, t))
    centers = (z[:, 0] + z[:, 1]) / 2
    distances = [((crop - centers) ** 2).mean() for crop in z.unbind(1)]
    return weight * sum(statistics) / len(statistics) + (1 - weight) * sum(distances) / len(distances)


@pytest.mark.parametrize("weight", [0.05, 0.6])
def test_loss_and_gradient(weight):
    task, z, again = _task(sigreg=weight), _embeddings(), _embeddings()
    losses = task.loss({"z": z}, {})
    expected = _by_hand(again, task.directions, weight)
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    expected.backward()
    assert again.grad.abs().max() > 1e-3
    torch.testing.assert_close(z.grad, again.grad)


def test_a_collapse_and_a_gaussian_have_their_levels():
    task = _task()
    flat = task.loss({"z": torch.zeros(64, CROPS, WIDTH, dtype=torch.float64)}, {})
    assert flat["loss"].item() == pytest.approx(task.chance(64).loss)
    assert flat["sigreg"].item() == pytest.approx(collapsed_level(64))
    assert flat["invariance"] == flat["spread"] == 0
    normal = torch.randn(2048, 1, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fine = task.loss({"z": normal.expand(-1, CROPS, -1)}, {})
    assert fine["sigreg"].item() == pytest.approx(float(normal_level(normal)), rel=0.3)
    assert fine["sigreg_ratio"].item() == pytest.approx(1, rel=0.3)
    assert fine["spread"] > 0.95
    assert fine["loss"] < task.chance(2048).loss / 100


def test_directions_are_those_of_the_step_and_no_weights():
    task, same = _task(), _task()
    before = task.directions.clone()
    task.before_step(Step(7, data=list))
    assert (task.directions - before).abs().max() > 0.1
    same.before_step(Step(3, data=list))
    same.before_step(Step(7, data=list))
    assert torch.equal(task.directions, same.directions)
    assert not [name for name in task.state_dict() if "directions" in name]


def test_small_crops_move_toward_large_ones_and_large_ones_count():
    z = torch.zeros(ROWS, CROPS, WIDTH, dtype=torch.float64)
    z[:, 0] = 1.0  # the centers are 1/2
    assert _task().loss({"z": z}, {})["invariance"].item() == pytest.approx(0.25)
    z[:, 2:] = 0.5
    assert _task().loss({"z": z}, {})["invariance"].item() == pytest.approx(0.125)


@pytest.mark.parametrize(("encoder", "local"), [("image", {"size": 8}), ("audio", None)])
def test_embeddings_of_both_modalities(encoder, local):
    task = _task(encoder=encoder, local_views=local)
    assert task.needs == (encoder,)
    assert task.meets == "loss"
    inputs = task.transform(tiny_batch(5), Draws(0, 0, 5))
    assert task.predict(inputs)["z"].shape == (5, CROPS, WIDTH)
    panels = task.preview(inputs, {"z": torch.eye(5)[:, None].expand(5, CROPS, 5)})
    assert [panel.title for panel in panels] == ["large crop 1", "large crop 2", "small crops", "nearest large crop 2"]
    assert panels[-1].right == [True] * 5
    assert set(task.drawn_together(inputs)) == {encoder, "embeddings"}
    assert task.drawn_together(inputs)["embeddings"].shape == (5, 2, WIDTH)


def test_published_settings_of_the_crops():
    task = create("lejepa", {"image": create_encoder("timm/test_vit", "image")}, hidden=8)
    large, small = task.views.settings, task.local_views.settings
    assert [(view.area, view.solarize, view.blur) for view in large] == [((0.3, 1.0), 0.2, 0.5)] * 2
    assert [view.area for view in small] == [(0.05, 0.3)] * 6
    assert np.isclose(task.sigreg, 0.05)
    image = {"image": torch.zeros(1, 3, 224, 224, dtype=torch.uint8)}
    assert task.transform(image, Draws(0, 0, 1))["views"].shape == (1, 2, 3, 224, 224)


@pytest.mark.parametrize("encoder", ["text", "video"])
def test_refuses_other_modalities(encoder):
    with pytest.raises(RecipeError, match=f"reads {encoder}"):
        _task(encoder=encoder)
