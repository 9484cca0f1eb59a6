"""The statistic of SIGReg against the definition with complex numbers, and its two levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmssl.ops.normality import collapsed_level, draw_directions, epps_pulley, normal_level

ROWS = 9


def by_definition(x: np.ndarray) -> np.ndarray:
    """N times the integral of |mean exp(itx) - exp(-t^2/2)|^2 exp(-t^2/2) from -3 to 3."""
    t = np.linspace(-3, 3, 33)
    empirical = np.exp(1j * x[..., None] * t).mean(0)
    distance = np.abs(empirical - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
    return len(x) * np.trapezoid(distance, t, axis=-1)


def sample(rows: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_value_and_gradient_are_those_of_the_definition():
    x = (1.5 * sample(ROWS, 2, 3) + 0.4).requires_grad_()
    found = epps_pulley(x)
    np.testing.assert_allclose(found.detach().numpy(), by_definition(x.detach().numpy()), rtol=1e-12)
    found.sum().backward()
    small = 1e-6
    for place in ((0, 0, 0), (3, 1, 2), (8, 0, 1)):
        moved = []
        for step in (small, -small):
            other = x.detach().clone()
            other[place] += step
            moved.append(by_definition(other.numpy()).sum())
        assert x.grad[place].item() == pytest.approx((moved[0] - moved[1]) / (2 * small), rel=1e-6)


@pytest.mark.parametrize("rows", [8, 64])
def test_a_gaussian_has_its_level_on_average_whatever_the_number_of_rows(rows):
    found = epps_pulley(sample(rows, 20_000))
    error = found.std() / len(found) ** 0.5
    assert error < 0.01
    assert abs(found.mean() - normal_level(found)) < 3 * error
    assert normal_level(found).item() == pytest.approx(1.053, abs=1e-3)


def test_one_point_has_its_level_and_so_much_more_than_a_gaussian():
    found = epps_pulley(torch.zeros(64, 1, dtype=torch.float64)).item()
    assert found == pytest.approx(collapsed_level(64), rel=1e-12)
    assert found == pytest.approx(by_definition(np.zeros((64, 1))).item(), rel=1e-12)
    assert found == pytest.approx(0.402 * 64, rel=1e-2)


@pytest.mark.parametrize(
    "change", [lambda x: 0.5 * x, lambda x: x + 1, lambda x: x.sign()], ids=["narrow", "off", "two"]
)
def test_what_is_no_standard_normal_is_far_from_it(change):
    assert epps_pulley(change(sample(500, 1))).item() > 5 * normal_level(torch.zeros(())).item()


def test_directions_are_unit_vectors_of_a_step():
    first, again, other = (draw_directions(5, 2000, step) for step in (3, 3, 4))
    torch.testing.assert_close(first.norm(dim=0), torch.ones(2000))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    torch.testing.assert_close(first @ first.T / 2000, torch.eye(5) / 5, atol=0.02, rtol=0)
