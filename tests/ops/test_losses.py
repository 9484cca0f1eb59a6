"""Losses where rows meet, against formulas written out and open_clip's own, with gradients, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmssl.ops.losses import mean_over, nt_xent, off_diagonal, ranking, score_tokens, spread


def _unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)
    return z.requires_grad_()


def _simclr_repository(a: torch.Tensor, b: torch.Tensor, temperature: float) -> torch.Tensor:
    """objective.py of google-research/simclr: two cross-entropies of (B, 2B) logits, self masked by -1e9, summed."""
    rows = len(a)
    labels = F.one_hot(torch.arange(rows), 2 * rows).to(a.dtype)
    masks = torch.eye(rows, dtype=a.dtype) * 1e9
    aa, bb, ab = a @ a.T / temperature - masks, b @ b.T / temperature - masks, a @ b.T / temperature
    terms = [-(labels * torch.cat(x, 1).log_softmax(1)).sum(1).mean() for x in ((ab, aa), (ab.T, bb))]
    return terms[0] + terms[1]


def _nt_xent_by_hand(a: torch.Tensor, b: torch.Tensor, temperature: float) -> torch.Tensor:
    z = torch.cat([a, b])
    rows = len(a)
    terms = []
    for i in range(2 * rows):
        similarity = [z[i] @ z[k] / temperature for k in range(2 * rows)]
        others = torch.stack([s for k, s in enumerate(similarity) if k != i])
        terms.append(others.logsumexp(0) - similarity[(i + rows) % (2 * rows)])
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("reference", "factor"), [(_nt_xent_by_hand, 1), (_simclr_repository, 2)])
def test_nt_xent_is_the_papers_and_half_the_repositorys(reference, factor):
    a, b = _unit(6, 8), _unit(6, 8, seed=1)
    mine, _ = nt_xent(a, b, 0.1)
    theirs = reference(a, b, 0.1) / factor
    assert math.isclose(mine.item(), theirs.item(), rel_tol=1e-9)
    for ours, other in zip(torch.autograd.grad(mine, (a, b)), torch.autograd.grad(theirs, (a, b)), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)


def test_nt_xent_at_collapse_and_at_orthonormal_pairs():
    rows, temperature = 7, 0.3
    same = torch.ones(rows, 4, dtype=torch.float64) / 2
    assert math.isclose(nt_xent(same, same, temperature)[0], math.log(2 * rows - 1), rel_tol=1e-12)
    axes = torch.eye(rows, dtype=torch.float64)
    loss, accuracy = nt_xent(axes, axes, temperature)
    assert math.isclose(loss, math.log(1 + 2 * (rows - 1) * math.exp(-1 / temperature)), rel_tol=1e-12)
    assert accuracy == 1


def test_nt_xent_is_equal_under_swap_of_views_and_of_rows():
    a, b = _unit(5, 4), _unit(5, 4, seed=1)
    order = torch.tensor([3, 1, 4, 0, 2])
    loss, accuracy = nt_xent(a, b, 0.2)
    loss = loss.item()
    for other in (nt_xent(b, a, 0.2), nt_xent(a[order], b[order], 0.2)):
        assert math.isclose(loss, other[0].item(), rel_tol=1e-12)
        assert accuracy == other[1]


def test_mean_over_counts_only_what_is_valid():
    values, valid = torch.tensor([[1.0, 5.0], [3.0, 7.0]]), torch.tensor([[True, False], [True, True]])
    assert mean_over(values, valid, valid.sum()) == 11 / 3
    assert mean_over(values, torch.zeros_like(valid), torch.tensor(0)) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_tokens_are_scored_over_a_guess_and_not_where_none_is_chosen(smoothing):
    generator = torch.Generator().manual_seed(0)
    target, asked = torch.tensor([[1, 3, 0], [2, 2, 1]]), torch.tensor([[True, False, True], [False, True, True]])
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    ratio, right, *unsmoothed = score_tokens(logits, target, asked, smoothing).values()
    wanted = [((0, 0), 1), ((0, 2), 0), ((1, 1), 2), ((1, 2), 1)]
    assert not ratio[~asked].any()
    assert not right[~asked].any()
    for row, (place, token) in zip(logits.log_softmax(1), wanted, strict=True):
        own = (1 - smoothing) * row[token] + smoothing * row.mean()
        torch.testing.assert_close(ratio[place], math.log(5) + own)
        assert right[place] == (row.argmax() == token)
        assert all(float(plain[place]) == pytest.approx(float(math.log(5) + row[token])) for plain in unsmoothed)
    assert len(unsmoothed) == (smoothing > 0)
    assert not any(plain.requires_grad for plain in unsmoothed)
    guess = score_tokens(torch.zeros(4, 5), target, asked, smoothing)["log_likelihood_ratio"]
    torch.testing.assert_close(guess, torch.zeros(2, 3))
    (slope,) = torch.autograd.grad(ratio.sum(), logits)
    expected = (1 - smoothing) * F.one_hot(torch.tensor([1, 0, 2, 1]), 5) + smoothing / 5 - logits.softmax(1)
    torch.testing.assert_close(slope, expected)
    nothing = score_tokens(logits[:0], target, torch.zeros_like(asked))["log_likelihood_ratio"]
    assert nothing.requires_grad  # so that every process has a gradient
    assert not nothing.any()


def test_ranking_is_the_area_under_the_curve_of_partners():
    torch.manual_seed(0)
    a, b = torch.randn(9, 4), torch.randn(9, 4)
    cosine = torch.cosine_similarity(a[:, None], b[None], dim=-1)
    wins = [(cosine[i, i] > cosine[i, j]).item() for i in range(9) for j in range(9) if i != j]
    assert ranking(a, b).item() == pytest.approx(sum(wins) / len(wins))
    assert ranking(a, 3 * a).item() == 1
    assert ranking(torch.ones(5, 3), torch.ones(5, 3)).item() == 0.5
    assert ranking(a[:1], b[:1]).item() == 0.5


def test_spread_is_one_on_the_sphere_and_none_at_a_point():
    torch.manual_seed(0)
    assert spread(7 * torch.randn(20_000, 2, 64)).item() == pytest.approx(1, abs=0.01)
    assert spread(torch.ones(8, 64)).item() == pytest.approx(0, abs=1e-6)
    line = torch.zeros(8, 64)
    line[:, 3] = torch.tensor([1.0, -1.0] * 4)
    assert spread(line).item() == pytest.approx(1 / 8)


@pytest.mark.parametrize(("rows", "width"), [(6, 9), (9, 4), (1, 3)])
def test_off_diagonal_is_that_of_the_matrix(rows, width):
    a, b = _unit(rows, width), _unit(rows, width, seed=1)
    found = off_diagonal(a, b)
    matrix = a.T @ b
    expected = sum(matrix[i, j] ** 2 for i in range(width) for j in range(width) if i != j)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(value, (a, b)) for value in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_off_diagonal_in_single_precision():
    """White embeddings have next to nothing beside the diagonal: it must not drown in what is on it."""
    noise = torch.randn(512, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    white = torch.linalg.qr(noise).Q * 512**0.5 + 0.01 * noise
    found, exact = (float(off_diagonal(z / 512, z)) for z in (white.float(), white))
    assert found == pytest.approx(exact, abs=1e-3)
    assert exact < 1
