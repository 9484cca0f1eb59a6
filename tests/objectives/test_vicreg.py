"""VICReg: the published code's form and the paper's."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.invariance.vicreg import EPS
from mmssl.ops.draws import Draws

ROWS, WIDTH = 12, 5


def _task(**hyper):
    return create("vicreg", tiny_encoders(), **({"hidden": 9, "width": WIDTH} | hyper))


def _embeddings() -> torch.Tensor:
    z = torch.randn(ROWS, 2, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (z * torch.linspace(0.3, 1.5, WIDTH, dtype=torch.float64) + 3).requires_grad_()


def _by_hand(z: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    """Each term from torch.cov, torch.var and loops over rows: equations 1, 3, 4 and 5 of the paper, or the code's."""
    first, second = z.unbind(1)
    distances = torch.stack([((a - b) ** 2).sum() for a, b in zip(first, second, strict=True)])
    variance, covariance = [], []
    for view in (first, second):
        deviation = (view.var(0, correction=1) + 1e-4) ** 0.5
        variance.append(torch.clamp(1 - deviation, min=0).sum() / WIDTH)
        matrix = torch.cov(view.T)
        covariance.append(sum(matrix[i, j] ** 2 for i in range(WIDTH) for j in range(WIDTH) if i != j) / WIDTH)
    if form == "official":
        return {
            "invariance": distances.mean() / WIDTH,
            "variance": (variance[0] + variance[1]) / 2,
            "covariance": covariance[0] + covariance[1],
        }
    return {
        "invariance": distances.mean(),
        "variance": variance[0] + variance[1],
        "covariance": covariance[0] + covariance[1],
    }


@pytest.mark.parametrize("form", ["official", "paper"])
def test_terms_and_gradient(form):
    z, again = _embeddings(), _embeddings()
    losses = _task(form=form).loss({"z": z}, {})
    expected = _by_hand(again, form)
    for name, value in expected.items():
        assert value > 0.01
        torch.testing.assert_close(losses[name], value)
    whole = 25 * expected["invariance"] + 25 * expected["variance"] + expected["covariance"]
    torch.testing.assert_close(losses["loss"], whole)
    losses["loss"].backward()
    whole.backward()
    torch.testing.assert_close(z.grad, again.grad)


@pytest.mark.parametrize(("form", "hinge"), [("official", 0.99), ("paper", 1.98)])
def test_collapse(form, hinge):
    task = _task(form=form)
    losses = task.loss({"z": torch.full((ROWS, 2, WIDTH), 7.0, dtype=torch.float64)}, {})
    assert losses["variance"] == pytest.approx(hinge)
    assert losses["loss"] == pytest.approx(25 * hinge)
    assert task.chance(ROWS).loss == pytest.approx(25 * hinge)
    assert losses["invariance"] == losses["covariance"] == 0
    assert losses["spread"] == pytest.approx(EPS**0.5)
    assert losses["ranking"] == 0.5


def test_a_collapse_of_lengths_alone_is_seen():
    """Nearly one point, although the directions from the origin are all over the sphere."""
    z = torch.randn(64, 2, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert _task().loss({"z": 1e-3 * z}, {})["spread"] < 0.02
    assert _task().loss({"z": 3 * z}, {})["spread"] > 0.98


def test_varied_views_that_agree_and_do_not_repeat_cost_nothing():
    noise = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    white = torch.linalg.qr(noise - noise.mean(0)).Q * 39**0.5 * 1.01
    losses = _task().loss({"z": white[:, None].expand(-1, 2, -1)}, {})
    assert losses["loss"] < 1e-10
    assert losses["ranking"] == 1


def test_views_may_be_swapped():
    task, z = _task(), _embeddings().detach()
    torch.testing.assert_close(task.loss({"z": z.flip(1)}, {})["loss"], task.loss({"z": z}, {})["loss"])


def test_weights_are_those_of_the_recipe():
    z = _embeddings().detach()
    losses = _task(invariance=2.0, variance=3.0, covariance=5.0).loss({"z": z}, {})
    terms = 2 * losses["invariance"] + 3 * losses["variance"] + 5 * losses["covariance"]
    torch.testing.assert_close(losses["loss"], terms)


@pytest.mark.parametrize("encoder", ["image", "audio"])
def test_embeddings_of_both_modalities(encoder):
    task = _task(encoder=encoder)
    assert task.needs == (encoder,)
    assert task.meets == "loss"
    inputs = task.transform(tiny_batch(5), Draws(0, 0, 5))
    assert task.predict(inputs)["z"].shape == (5, 2, WIDTH)
    panels = task.preview(inputs, {"z": torch.eye(5)[:, None].expand(5, 2, 5)})
    assert all(torch.equal(a, b) for a, b in zip(panels[1].cells, panels[2].cells, strict=True))


def test_published_settings_of_the_views():
    first, second = _task().views.settings
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)


def test_refuses_other_modalities_and_forms():
    with pytest.raises(RecipeError, match="reads text"):
        _task(encoder="text")
    with pytest.raises(RecipeError, match="form"):
        _task(form="lightly")
