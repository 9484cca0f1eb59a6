"""Sound speed: resampling is torchaudio's, white noise says nothing of its speed, windows begin at one moment."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torchaudio
from scipy.signal import welch
from sklearn.linear_model import LogisticRegression
from tiny_encoders import tiny_encoders

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.augment_audio import reach, resample
from mmssl.ops.draws import Draws


def task(**hyper):
    torch.manual_seed(0)
    return create("sound_speed", {"audio": tiny_encoders()["audio"]}, **hyper)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("speed", [Fraction(7, 10), Fraction(6, 5), Fraction(7, 5)])
def test_resampling_is_that_of_torchaudio(speed):
    x, cutoff = torch.randn(2, 3000), 0.6
    found, half = resample(x, speed, cutoff), reach(speed, cutoff)
    lowest = min(speed.numerator, speed.denominator)
    theirs = torchaudio.functional.resample(
        x[:, half:],
        speed.numerator,
        speed.denominator,
        lowpass_filter_width=32,
        rolloff=cutoff * speed.denominator / lowest,
        resampling_method="sinc_interp_kaiser",
        beta=12.0,
    )
    inside = slice(200, found.shape[1] - 200)  # theirs begins with silence
    torch.testing.assert_close(found[:, inside], theirs[:, : found.shape[1]][:, inside], rtol=0, atol=1e-7)


@pytest.mark.usefixtures("double")
def test_a_tone_is_played_at_each_speed_from_one_moment_on():
    objective, rate = task(), 16_000
    time = torch.arange(rate) / rate
    tone = torch.sin(2 * torch.pi * 500 * time).expand(3, -1)
    inputs = objective.transform({"audio": tone}, Draws(0, 0, 3))
    assert inputs["audio"].shape == (3, 5, int(0.5 * rate / 1.4))
    power = np.abs(np.fft.rfft(inputs["audio"].numpy() * np.hanning(inputs["audio"].shape[2])))
    heard = power.argmax(-1) * rate / inputs["audio"].shape[2]
    np.testing.assert_allclose(heard, np.tile([350, 425, 500, 600, 700], (3, 1)), atol=2)
    assert float((inputs["audio"][:, :, 0] - inputs["audio"][:, :1, 0]).abs().max()) < 1e-3
    torch.testing.assert_close(inputs["audio"].square().mean(2), torch.full((3, 5), 0.01))


def spectra(windows):
    """Of each window, (N, bands), log power, and log power of the whole."""
    _, power = welch(windows, nperseg=128, axis=-1)
    return np.log(np.concatenate([power, windows.var(-1, keepdims=True)], axis=-1) + 1e-12)


def accuracy_on_noise(windows):
    """Of logistic regression on spectra, of rows that it has not seen."""
    found = spectra(windows)
    found = (found - found.mean((0, 1))) / (found.std((0, 1)) + 1e-6)
    half = len(found) // 2
    speeds = np.tile(np.arange(5), (len(found), 1))
    model = LogisticRegression(C=0.01, max_iter=500)
    model.fit(found[:half].reshape(half * 5, -1), speeds[:half].ravel())
    return model.score(found[half:].reshape(half * 5, -1), speeds[half:].ravel())


@pytest.mark.long
@pytest.mark.usefixtures("double")
def test_white_noise_says_nothing_of_its_speed():
    rows = 80
    noise = torch.randn(rows, 5, 4000, generator=torch.Generator().manual_seed(0)) * 0.1
    objective = task()
    # Another noise for each speed, so that windows of a row have nothing in common.
    each = [objective.transform({"audio": noise[:, k]}, Draws(0, 0, rows))["audio"][:, k] for k in range(5)]
    windows = torch.stack(each, 1).numpy()
    assert accuracy_on_noise(windows) == pytest.approx(0.2, abs=4 * (0.16 / (rows // 2 * 5)) ** 0.5)
    # The usual filter, at the lower of both rates, is found at once.
    usual = [
        torchaudio.functional.resample(noise[:, k], speed.numerator, speed.denominator)[:, : windows.shape[2]]
        for k, speed in enumerate(objective.speeds)
    ]
    assert accuracy_on_noise(torch.stack(usual, 1).numpy()) > 0.5


def test_what_cannot_work_is_said():
    with pytest.raises(RecipeError, match="should be two or more that differ by a twentieth"):
        task(speeds=[1.0, 1.01])
    with pytest.raises(RecipeError, match=r"do not fit into sounds of 300; raise data\.audio\.seconds"):
        task().transform({"audio": torch.zeros(2, 300)}, Draws(0, 0, 2))
