"""The measure of a separated sound, and the ideal mask."""

from __future__ import annotations

import warnings

import mir_eval.separation
import numpy as np
import pytest
import torch

from mmssl.ops.sound_separation import ratio_mask, si_sdr, unit_loudness


def test_a_known_value_and_the_written_out_formula():
    found, truth = torch.tensor([2.5, 0.0, 2.0, 8.0]).double(), torch.tensor([3.0, -0.5, 2.0, 7.0]).double()
    assert si_sdr(found, truth).item() == pytest.approx(18.4030, abs=1e-4)
    dice = np.random.default_rng(0)
    a, b = dice.normal(size=(2, 3, 50))
    for one, other, value in zip(a, b, si_sdr(torch.from_numpy(a), torch.from_numpy(b)), strict=True):
        part = (one @ other) / (other @ other) * other
        noise = one - part
        assert value.item() == pytest.approx(10 * np.log10((part @ part) / (noise @ noise)), abs=1e-6)


def test_it_is_mir_evals_ratio_where_the_filter_has_one_tap():
    """BSS Eval's SDR forgives any filter of so many taps (512 in its public call), SI-SDR a single factor."""
    dice = np.random.default_rng(1)
    truth = dice.normal(size=700)
    found = 0.3 * truth + 0.2 * np.roll(truth, 3) + 0.1 * dice.normal(size=700)
    ours = si_sdr(torch.from_numpy(found), torch.from_numpy(truth)).item()
    parts = mir_eval.separation._bss_decomp_mtifilt(truth[None], found, 0, 1)
    assert ours == pytest.approx(mir_eval.separation._bss_source_crit(*parts)[0], abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is to be removed from mir_eval 0.9
        (forgiving,), *_ = mir_eval.separation.bss_eval_sources(truth[None], found[None], compute_permutation=False)
    assert forgiving > ours + 3


def test_loudness_means_nothing_and_silence_is_finite():
    found, truth = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).double()
    assert si_sdr(3 * found, truth).item() == pytest.approx(si_sdr(found, truth).item(), abs=1e-5)
    assert si_sdr(truth, truth) > 80
    assert si_sdr(torch.zeros(4), truth[:4].float()).isfinite()
    assert unit_loudness(torch.zeros(2, 4)).abs().max() == 0
    assert unit_loudness(5 * truth).square().mean().item() == pytest.approx(1, abs=1e-6)


def test_equal_parts_get_half_and_a_part_alone_all():
    mask = ratio_mask(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 3.0]))
    assert mask.tolist() == pytest.approx([0.5, 1.0, 0.0], abs=1e-6)
