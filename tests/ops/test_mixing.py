"""Mixup and CutMix say what their papers do, of the same rows on any number of processes."""

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from mmssl.ops.draws import Draws
from mmssl.ops.mixing import cutmix, draw_beta, draw_partners, mix_rows, mixup


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_beta_distributed(alpha):
    share = draw_beta(Draws(0, 0, 2000), alpha)
    assert kstest(share.double().numpy(), beta(alpha, alpha).cdf).pvalue > 0.01
    halves = [draw_beta(Draws(0, 0, 1000, share=half, shares=2), alpha) for half in range(2)]
    assert torch.equal(torch.cat(halves), share)


def test_partners_are_a_permutation():
    partner = draw_partners(Draws(0, 0, 50))
    assert sorted(partner.tolist()) == list(range(50))
    assert partner.tolist() != list(range(50))
    assert not torch.equal(partner, draw_partners(Draws(0, 1, 50)))


def test_mixup_is_the_formula():
    random = np.random.default_rng(0)
    x, other, share = random.random((4, 3, 5, 6)), random.random((4, 3, 5, 6)), random.random(4)
    found = mixup(*map(torch.from_numpy, (x, other, share)))
    for i in range(4):
        np.testing.assert_allclose(found[i], share[i] * x[i] + (1 - share[i]) * other[i])


@pytest.mark.parametrize("shape", [(3, 20, 40), (2, 3, 20, 40)])  # a picture, a clip
def test_cutmix_is_the_formula(shape):
    random = np.random.default_rng(0)
    share, center = random.random(40), random.random((40, 2))
    x, other = torch.zeros(40, *shape), torch.ones(40, *shape)
    found, kept = cutmix(x, other, torch.from_numpy(share), torch.from_numpy(center))
    for i in range(40):
        expected = np.zeros(shape[-2:])
        (top, bottom), (left, right) = (
            [
                int(np.clip(np.round(center[i, axis] * extent + sign * extent * np.sqrt(1 - share[i]) / 2), 0, extent))
                for sign in (-1, 1)
            ]
            for axis, extent in enumerate(shape[-2:])
        )
        expected[top:bottom, left:right] = 1
        assert np.array_equal(found[i].numpy(), np.broadcast_to(expected, shape))
        assert kept[i] == pytest.approx(1 - expected.mean())
    middle, kept = cutmix(x[:1], other[:1], torch.tensor([0.75]), torch.tensor([[0.5, 0.5]]))
    assert middle[0].mean() == pytest.approx(0.25)
    assert float(kept) == 0.75


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_labels_are_mixed_as_pictures_are(alphas):
    labels = torch.eye(32)
    x = labels[:, :, None, None].expand(-1, -1, 16, 16)  # a picture that shows which row it is
    mixed, soft = mix_rows(x, labels, Draws(0, 3, 32), by_mixup=alphas[0], by_cutmix=alphas[1])
    torch.testing.assert_close(mixed.mean((2, 3)), soft, atol=1e-5, rtol=0)
    torch.testing.assert_close(soft.sum(1), torch.ones(32))
    blended = ((mixed > 0) & (mixed < 1)).flatten(1).any(1)
    assert blended.all() if not alphas[1] else (blended.any() == bool(alphas[0])) and not blended.all()
    assert (soft.amax(1) < 1).float().mean() > 0.7
    again, _ = mix_rows(x, labels, Draws(0, 3, 32), by_mixup=alphas[0], by_cutmix=alphas[1])
    assert torch.equal(mixed, again)
