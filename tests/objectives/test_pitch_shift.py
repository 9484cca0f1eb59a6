"""Pitch shift: tones are where they should be, no sample is heard twice, and white noise says nothing of its shift."""

import numpy as np
import pytest
import torch
import torchaudio
from scipy.signal import hilbert, welch
from sklearn.linear_model import LogisticRegression
from tiny_encoders import tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws

RATE = 8000
SHIFTS = (-4, -2, 0, 2, 4)


def task(**hyper):
    torch.manual_seed(0)
    audio = tiny_encoders()["audio"]
    audio.rate = RATE
    return create("pitch_shift", {"audio": audio}, **hyper)


@pytest.mark.usefixtures("double")
def test_a_tone_is_heard_at_each_pitch_for_the_same_time():
    objective = task(grain=0.4, window=0.9)
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(2 * RATE) / RATE).expand(3, -1)
    inputs = objective.transform({"audio": tone}, Draws(0, 0, 3))
    assert inputs["audio"].shape == (3, 5, 2 * objective.grain)
    grain = inputs["audio"][:, :, objective.crossfade : objective.grain].numpy()  # of one grain alone
    power = np.abs(np.fft.rfft(grain * np.hanning(grain.shape[2]), n=8 * RATE))
    expected = 440 * 2 ** (np.array(SHIFTS) / 12)
    np.testing.assert_allclose(power.argmax(-1) / 8, np.tile(expected, (3, 1)), rtol=0.002)
    torch.testing.assert_close(inputs["audio"].square().mean(2), torch.full((3, 5), 0.01))


@pytest.mark.long
@pytest.mark.usefixtures("double")
def test_no_sample_is_heard_twice_and_all_shifts_hear_the_same_moments():
    objective = task()
    samples = 4 * objective.step
    places = torch.arange(0, samples, 7)
    impulses = torch.zeros(len(places), samples)
    impulses[torch.arange(len(places)), places] = 1
    objective.window = 1.0  # no room to begin elsewhere; one row's delays for all
    draws = Draws(0, 0, 1)
    delays = (draws.uniform(), draws.uniform(4))

    class Same:
        def uniform(self, *shape: int) -> torch.Tensor:
            return delays[len(shape)].expand(len(places), *shape)

    heard = objective.transform({"audio": impulses}, Same())["audio"] != 0
    loud = objective.transform({"audio": impulses}, Same())["audio"].abs()
    grains = (loud / loud.amax(-1, keepdim=True).clamp(min=1e-9) > 0.05).unflatten(2, (3, -1))
    later = grains[:, :, :, objective.crossfade :].any(-1)  # in the body of which grains
    assert later.sum(-1).max() == 1
    assert heard.any()
    for k in range(5):
        assert all(later[:, k].sum(0) > 30)  # every grain hears some
    # What the slowest hears of a grain the fastest hears, too.
    assert (later[:, 0] <= later[:, 4]).float().mean() > 0.98


def measured(windows: np.ndarray) -> np.ndarray:
    """Of each window, (N, F): spectrum, power over time, spectrum of the envelope, and correlation with its past."""
    _, power = welch(windows, nperseg=128, axis=-1)
    envelope = np.abs(hilbert(windows, axis=-1))
    slow = np.abs(np.fft.rfft(envelope - envelope.mean(-1, keepdims=True), axis=-1))[..., 1:60]
    whole = np.abs(np.fft.rfft(windows, n=2 * windows.shape[-1], axis=-1)) ** 2
    past = np.fft.irfft(whole, axis=-1)[..., :400]
    level = np.log(windows.reshape(*windows.shape[:-1], 24, -1).var(-1) + 1e-12)
    parts = [np.log(power + 1e-12), level, slow, past / past[..., :1]]
    return np.concatenate(parts, axis=-1)


def accuracy(windows: np.ndarray) -> float:
    """Of logistic regression, of rows that it has not seen."""
    found = measured(windows)
    found = (found - found.mean((0, 1))) / (found.std((0, 1)) + 1e-6)
    half, number = len(found) // 2, found.shape[1]
    shifts = np.tile(np.arange(number), (len(found), 1))
    model = LogisticRegression(C=0.003, max_iter=300)
    model.fit(found[:half].reshape(half * number, -1), shifts[:half].ravel())
    return float(model.score(found[half:].reshape(half * number, -1), shifts[half:].ravel()))


@pytest.mark.long
def test_white_noise_says_nothing_of_its_shift_and_the_usual_ways_do():
    rows, objective = 120, task()
    noise = torch.randn(rows, 5, 2 * RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    # Another noise for each shift, so that windows of a row have nothing in common.
    each = [objective.transform({"audio": noise[:, k]}, Draws(0, 0, rows))["audio"][:, k] for k in range(5)]
    windows = torch.stack(each, 1)
    windows = windows[..., : windows.shape[2] // 24 * 24].numpy()
    spread = (0.16 / (rows // 2 * 5)) ** 0.5
    assert accuracy(windows) == pytest.approx(0.2, abs=4 * spread)
    usual = torch.stack(
        [torchaudio.functional.pitch_shift(noise[:, k], RATE, shift) for k, shift in enumerate(SHIFTS)], 1
    )[..., : windows.shape[2]]
    assert accuracy(usual.numpy()) > 0.5


def test_what_cannot_work_is_said():
    with pytest.raises(RecipeError, match="should be two or more that differ"):
        task(shifts=[2, 2])
    with pytest.raises(RecipeError, match=r"crossfade = 0\.2 should be no longer than grain = 0\.1"):
        task(crossfade=0.2)
    with pytest.raises(RecipeError, match=r"holds 1 grains of \d+, and two are needed; raise data\.audio\.seconds"):
        task(window=0.5).transform({"audio": torch.zeros(2, RATE // 2)}, Draws(0, 0, 2))
