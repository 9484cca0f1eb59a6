"""Sound augmentation on the device: one random draw a sample, whole batches at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.ops.augment import resize_matrix
from mmssl.ops.draws import Draws
from mmssl.ops.gather import gather, own_rows

Range = tuple[float, float]

# Canvas in which a spectrogram is cropped, relative to its own height (bands) and width (frames): BYOL-A's.
_CANVAS = (1.0, 1.5)


def random_windows(
    audio: Tensor,
    mask: Tensor | None,
    draws: Draws,
    views: int,
    size: int,
    *,
    attenuation: float = 6.0,
    noise: Range | None = (10.0, 40.0),
) -> tuple[Tensor, Tensor]:
    """Windows of each sound, softer and with noise; each view on its own.

    A window lies inside the valid samples wherever they are long enough for one.

    Args:
        audio: float (B, S).
        mask: bool (B, S), True for the valid samples, which come first; None where all are.
        draws: source of randomness.
        views: V, windows of each sound.
        size: of a window, in samples.
        attenuation: largest, in dB (uniform).
        noise: range of the ratio of signal to white noise, in dB (uniform); None for no noise.

    Returns:
        Windows, float (B, V, size), and their mask, bool (B, V, size); 0 where invalid.
    """
    rows, samples = audio.shape
    audio = audio.to(torch.get_default_dtype())
    lengths = mask.sum(1) if mask is not None else torch.full((rows,), samples, device=audio.device)
    free = (lengths - size).clamp(min=0)[:, None]
    start = (draws.uniform(views) * (free + 1)).long().minimum(free)
    place = start[..., None] + torch.arange(size, device=audio.device)
    inside = place < lengths[:, None, None]
    heard = audio.gather(1, place.clamp(max=samples - 1).flatten(1)).view(place.shape) * inside
    heard *= 10 ** (-draws.uniform(views, 1, high=attenuation) / 20)
    if noise is not None:
        power = heard.square().sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)
        ratio = 10 ** (draws.uniform(views, 1, low=noise[0], high=noise[1]) / 20)
        heard += draws.normal(views, size) * power.sqrt() / ratio * inside
    return heard, inside


def random_stretch(
    spectrograms: Tensor, mask: Tensor, draws: Draws, scale: Range = (0.6, 1.5)
) -> tuple[Tensor, Tensor]:
    """Crop each spectrogram in frequency and time and resize it back: other pitch and tempo (BYOL-A's resize crop).

    The crop is taken from a canvas 1.5 times as long, with the spectrogram in its middle and 0, the mean of a
    normalized spectrogram, around it. Bilinear, where the published code is bicubic.

    Args:
        spectrograms: normalized, (B, V, M, T).
        mask: bool (B, V, T), True for valid frames.
        draws: source of randomness.
        scale: smallest and largest height and width of the crop, relative to the spectrogram's (uniform).

    Returns:
        (B, V, M, T) and its mask; a frame is valid where most of what it shows is valid or canvas.
    """
    views, *extent = spectrograms.shape[1:]
    matrices, margins = [], []
    for size, canvas in zip(extent, _CANVAS, strict=True):
        margin = round((canvas - 1) / 2 * size)
        whole = size + 2 * margin
        length = (draws.uniform(views, low=scale[0], high=scale[1]) * size).round().long().clamp(1, whole).flatten()
        start = (draws.uniform(views).flatten() * (whole - length + 1)).long().minimum(whole - length)
        matrices.append(resize_matrix(start, length, whole, size).to(spectrograms.dtype))
        margins.append(margin)
    (bands, frames), (_, margin) = matrices, margins
    inner = frames[:, :, margin : margin + extent[1]]
    flat = spectrograms.flatten(0, 1)
    lost = inner @ (~mask).flatten(0, 1)[..., None].to(inner.dtype)
    return (bands @ flat @ inner.mT).view(spectrograms.shape), (lost[..., 0] < 0.5).view(mask.shape)


def mix_others(spectrograms: Tensor, mask: Tensor, draws: Draws, most: float) -> Tensor:
    """Another recording in the background: log((1 - r) exp(x) + r exp(z)), BYOL-A's log-mixup-exp.

    Niizumi et al. 2021, arXiv 2103.06695, section 3.1. The other one, z, is the same view of another row of the global
    batch, before it was mixed itself.

    Args:
        spectrograms: normalized logarithms, (B, V, M, T).
        mask: bool (B, V, T), True for valid frames; the others stay as they are.
        draws: source of randomness.
        most: r is uniform from 0 to this, and so is which of the other rows, each view on its own.

    Returns:
        (B, V, M, T); a row that has no other is mixed with itself, which changes nothing.
    """
    views, total = spectrograms.shape[1], draws.rows * draws.shares
    others = draws.integers(max(1, total - 1), views)
    share = draws.uniform(views, 1, 1, high=most).to(spectrograms.dtype)
    everyone, own = spectrograms, torch.arange(draws.rows, device=spectrograms.device)
    if draws.shares > 1:
        everyone, own = gather(spectrograms), own_rows(draws.rows, spectrograms.device)
    z = everyone[(own[:, None] + 1 + others) % total, torch.arange(views, device=spectrograms.device)]
    mixed = torch.logaddexp(spectrograms + (1 - share).log(), z + share.log())
    return torch.where(mask[:, :, None], mixed, spectrograms)


def resample(x: Tensor, speed: Fraction, cutoff: float, zeros: int = 32, beta: float = 12.0) -> Tensor:
    """Sounds played at another speed: pitch and tempo change together.

    The filter is one of the result: at any speed it lets the same frequencies of what is heard through, where a filter
    that depends on the speed leaves a band limit that tells it. A sinc under a Kaiser window, as torchaudio's.

    Args:
        x: (N, S).
        speed: above 1 for a shorter, higher sound.
        cutoff: middle of the filter's edge, as a share of half the sample rate; below the lowest speed of those that
            are to be alike, less the width of the edge, which is a fourth of it.
        zeros: zeros of the sinc on each side.
        beta: of the window.

    Returns:
        (N, n), sample i of which is that of `x` at `reach + i * speed`, see `reach`; as many as `x` is long enough for.
    """
    down, up, half = speed.numerator, speed.denominator, reach(speed, cutoff, zeros)
    place = torch.arange(-half, half + down, device=x.device, dtype=torch.float64)
    phase = torch.arange(up, device=x.device, dtype=torch.float64)[:, None] * down / up
    time = (place - phase) * (cutoff / float(speed))
    window = torch.i0(beta * (1 - (time / zeros).square()).clamp(min=0).sqrt()) / torch.i0(time.new_full((), beta))
    kernel = torch.sinc(time) * window * (time.abs() <= zeros) * (cutoff / float(speed))
    found = F.conv1d(x[:, None], kernel[:, None].to(x.dtype), stride=down)
    return found.mT.flatten(1)


def reach(speed: Fraction, cutoff: float, zeros: int = 32) -> int:
    """Samples on each side of a place that `resample` reads."""
    return math.ceil(zeros * speed / Fraction(cutoff))
