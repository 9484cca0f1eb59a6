"""Sound augmentation: windows of what was there, at the stated level of noise; spectrograms cropped as by hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy import stats

from mmssl.ops.augment_audio import mix_others, random_stretch, random_windows
from mmssl.ops.draws import Draws


def test_a_window_is_a_softer_piece_of_the_valid_sound():
    n, samples, size = 300, 100, 40
    audio = torch.arange(1.0, samples + 1).expand(n, -1)
    lengths = torch.randint(20, samples + 1, (n,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(samples) < lengths[:, None]
    windows, inside = random_windows(audio * mask, mask, Draws(0, 0, n), 2, size, noise=None)
    assert torch.equal(inside.sum(-1), lengths.clamp(max=size)[:, None].expand(-1, 2))
    assert (windows[~inside] == 0).all()
    gain = windows[..., 1] - windows[..., 0]  # the ramp rises by 1 a sample
    start = windows[..., 0] / gain
    torch.testing.assert_close(start, start.round(), atol=1e-3, rtol=0)
    assert (start + size - 1 <= lengths.clamp(min=size)[:, None] + 0.5).all()
    level = -20 * gain.flatten().log10()
    assert stats.kstest(level.double().numpy(), "uniform", (0, 6)).pvalue > 1e-4


def test_starts_are_uniform_and_views_differ():
    audio = torch.arange(1.0, 101).expand(2000, -1)
    windows, _ = random_windows(audio, None, Draws(1, 0, 2000), 2, 81, attenuation=0, noise=None)
    starts = windows[..., 0].long() - 1
    assert stats.chisquare(torch.bincount(starts.flatten(), minlength=20).numpy()).pvalue > 1e-4
    assert (starts[:, 0] == starts[:, 1]).float().mean() < 0.1


def test_noise_has_its_level():
    n, samples = 200, 4000
    audio = torch.sin(torch.arange(samples) * 0.1).expand(n, -1)
    clean, _ = random_windows(audio, None, Draws(2, 0, n), 1, samples, noise=None)
    noisy, _ = random_windows(audio, None, Draws(2, 0, n), 1, samples, noise=(10, 40))
    power = (noisy - clean).square().mean(-1)
    ratio = 10 * (clean.square().mean(-1) / power).log10().flatten()
    assert stats.kstest(ratio.double().numpy(), "uniform", (10, 30)).pvalue > 1e-4
    silent, _ = random_windows(torch.zeros(2, 50), None, Draws(2, 0, 2), 1, 50)
    assert (silent == 0).all()


def test_stretch_is_a_resized_crop_of_the_canvas():
    generator = torch.Generator().manual_seed(0)
    bands, frames = 12, 20
    spectrograms = torch.randn(30, 2, bands, frames, generator=generator)
    mask = torch.ones(30, 2, frames, dtype=torch.bool)
    found, valid = random_stretch(spectrograms, mask, Draws(3, 0, 30), (0.6, 1.5))
    assert valid.all()
    # The same draws, by hand: lengths and starts in frequency, then in time.
    draws = Draws(3, 0, 30)
    canvas = F.pad(spectrograms, (5, 5))
    boxes = []
    for size, whole in ((bands, bands), (frames, frames + 10)):
        length = (draws.uniform(2, low=0.6, high=1.5) * size).round().long().clamp(1, whole)
        boxes.append((((draws.uniform(2)) * (whole - length + 1)).long(), length))
    for row in range(30):
        for view in range(2):
            (top, tall), (left, wide) = ((int(s[row, view]), int(n[row, view])) for s, n in boxes)
            piece = canvas[row, view, top : top + tall, left : left + wide]
            expected = F.interpolate(piece[None, None], (bands, frames), mode="bilinear", antialias=True)[0, 0]
            torch.testing.assert_close(found[row, view], expected, atol=1e-5, rtol=0)


def test_stretch_moves_the_mask_with_the_sound():
    mask = torch.arange(40) < 25
    ones = mask.float().expand(50, 1, 8, 40)
    found, valid = random_stretch(ones, mask.expand(50, 1, 40), Draws(4, 0, 50), (1.0, 1.0))
    assert math.isclose(float(found.max()), 1, abs_tol=1e-6)
    # Canvas before and after the spectrogram counts as valid silence, its padding does not.
    assert (~valid).any(-1).all()
    assert (found[:, 0, 0][~valid[:, 0]] < 0.5).all()


def test_others_are_mixed_in_by_their_exponents_and_padding_is_left_alone():
    rows, views = 5, 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, views, 3, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 3, 4, 2, 1])[:, None, None]
    found = mix_others(x, mask.expand(-1, views, -1), Draws(5, 0, rows), 0.4)
    draws = Draws(5, 0, rows)
    steps, share = draws.integers(rows - 1, views), draws.uniform(views, high=0.4).double()
    for row in range(rows):
        for view in range(views):
            z, r = x[(row + 1 + steps[row, view]) % rows, view], share[row, view]
            expected = ((1 - r) * x[row, view].exp() + r * z.exp()).log()
            torch.testing.assert_close(found[row, view], torch.where(mask[row], expected, x[row, view]))
    alone = mix_others(x[:1], mask[:1].expand(-1, views, -1), Draws(5, 0, 1), 0.4)
    torch.testing.assert_close(alone, x[:1])


def test_every_other_row_is_mixed_in_equally_often_and_never_the_row_itself():
    # exp(-1e3) is 0: what is left of a row is the logarithm of its share, in the band of its number.
    rows = 8
    each = torch.full((rows, rows), -1e3, dtype=torch.float64).fill_diagonal_(0)[:, None, :, None]
    partners, levels = [], []
    for step in range(150):
        mixed = mix_others(each, torch.ones(rows, 1, 1, dtype=torch.bool), Draws(0, step, rows), 0.4)[:, 0, :, 0].exp()
        own = mixed.diagonal()
        others = mixed - torch.diag(own)
        torch.testing.assert_close(others.sum(1), 1 - own)
        assert (others > 0).sum() == rows
        partners.append(others.argmax(1))
        levels.append(1 - own)
    distance = (torch.stack(partners) - torch.arange(rows)) % rows
    counts = torch.bincount(distance.flatten(), minlength=rows)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 1e-4
    assert stats.kstest(torch.cat(levels).numpy(), "uniform", (0, 0.4)).pvalue > 1e-4
