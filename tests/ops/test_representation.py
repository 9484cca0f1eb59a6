"""Rank, dead dimensions, alignment and uniformity of features whose values are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmssl.ops.representation import alignment, dead_share, effective_rank, lidar, spectrum_decay, uniformity


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_as_many_equal_directions_have_that_rank(rank: int) -> None:
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
    assert effective_rank(7 * basis[:, :rank] @ basis[:rank]) == pytest.approx(rank, rel=1e-5)


def test_rank_is_that_of_the_paper() -> None:
    """Garrido et al. 2023, equation 1, with numpy and their epsilon."""
    x = np.random.default_rng(0).normal(size=(40, 9)) * np.arange(1, 10) + 2
    values = np.linalg.svd(x, compute_uv=False)
    p = values / np.abs(values).sum() + 1e-7
    assert float(effective_rank(torch.from_numpy(x))) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)


@pytest.mark.parametrize("x", [torch.ones(8, 3), torch.randn(8, 1) * torch.ones(3)])
def test_a_point_and_a_line_have_rank_1(x: torch.Tensor) -> None:
    assert effective_rank(x) == pytest.approx(1, abs=1e-4)


def test_zeros_have_the_least_rank_and_are_dead() -> None:
    assert effective_rank(torch.zeros(4, 3)) == 1
    assert dead_share(torch.zeros(4, 3)) == 1


def test_dead_dimensions_are_counted_whatever_the_scale() -> None:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    x[:, :2] = torch.tensor([0.0, 5.0])
    for scale in (1e-4, 1.0, 1e4):
        assert dead_share(scale * x) == 0.25
    assert dead_share(torch.full((32, 8), 0.1)) == 1


def test_alignment_is_the_squared_distance_of_directions() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert alignment(a, 5 * a) == pytest.approx(0, abs=1e-7)
    assert alignment(a, a.flip(1)) == pytest.approx(2)
    assert alignment(a, -a) == pytest.approx(4)


def test_uniformity_is_0_at_a_point_and_that_of_the_paper_elsewhere() -> None:
    assert uniformity(torch.ones(5, 4)) == pytest.approx(0, abs=1e-6)
    x = np.random.default_rng(0).normal(size=(20, 6))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [math.exp(-2 * ((a - b) ** 2).sum()) for i, a in enumerate(unit) for b in unit[:i]]
    assert float(uniformity(torch.from_numpy(x))) == pytest.approx(math.log(np.mean(pairs)), rel=1e-6)
    sphere = torch.randn(400, 256, generator=torch.Generator().manual_seed(0))
    assert uniformity(sphere) == pytest.approx(-4, abs=0.05)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_decay_of_a_planted_spectrum_is_found(alpha):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(400, 100, generator=generator, dtype=torch.float64)).Q
    basis = torch.linalg.qr(basis - basis.mean(0)).Q
    scales = torch.arange(1, 101, dtype=torch.float64) ** (-alpha / 2)
    assert spectrum_decay(basis * scales) == pytest.approx(alpha, abs=1e-6)


@pytest.mark.parametrize("directions", [0, 1, 2, 4])
def test_too_few_directions_have_no_decay(directions):
    assert spectrum_decay(torch.randn(20, directions) @ torch.randn(directions, 50)).isnan()


@pytest.mark.parametrize("delta", [1e-4, 0.1])
def test_lidar_is_that_of_the_paper(delta: float) -> None:
    """Thilak et al. 2024, matrix by matrix with numpy and their epsilon."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(30, 1, 6)) * np.arange(1, 7)
    views = rows + random.normal(size=(30, 5, 6)) * [0.1, 2, 0.5, 1, 3, 0.2] + 4
    means = [row.mean(0) for row in views]
    center = np.mean(means, axis=0)
    between, within = np.zeros((6, 6)), delta * np.eye(6)
    for row, mean in zip(views, means, strict=True):
        between += np.outer(mean - center, mean - center) / 30
        for view in row:
            within += np.outer(view - mean, view - mean) / 150
    values, axes = np.linalg.eigh(within)
    root = axes @ np.diag(values**-0.5) @ axes.T
    shares = np.linalg.eigvalsh(root @ between @ root)
    shares = shares / shares.sum() + 1e-7
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert float(lidar(torch.from_numpy(views), delta)) == pytest.approx(expected, rel=1e-5)


def test_lidar_does_not_count_what_augmentation_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, noise = (torch.randn(400, n, 8, generator=generator) for n in (1, 6))
    steady = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])
    views = rows * steady + noise * (1 - steady)  # three directions say which row it is, five which view
    assert effective_rank(views.flatten(0, 1)) > 7
    assert lidar(views) == pytest.approx(3, abs=0.2)
    assert lidar(rows.expand(-1, 6, -1)) == pytest.approx(8, abs=0.2)
    assert lidar(torch.ones(4, 3, 2)) == 1
