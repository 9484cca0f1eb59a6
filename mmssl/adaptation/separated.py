"""Sounds that were taken apart, as files to listen to and a picture to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmssl.media.clip import write_clip

DPI = 150
QUIETEST = -60.0
"""dB below the loudest that are still seen."""


def write_sounds(folder: Path, name: str, parts: Mapping[str, Tensor], rate: int, n_fft: int, hop: int) -> None:
    """Write `name, part.wav` for each part, all in one loudness, and `name.png`, their spectrograms on one scale.

    Args:
        folder: made if missing.
        name: of the row.
        parts: name -> sound (S,).
        rate: in Hz.
        n_fft: samples of a window of the spectrograms.
        hop: samples from window to window.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    peak = max(float(sound.abs().max()) for sound in parts.values()) or 1.0
    figure = Figure(figsize=(3.2 * len(parts), 2.8), layout="constrained")
    every = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    window = torch.hann_window(n_fft)
    for axes, (part, sound) in zip(every, parts.items(), strict=True):
        samples = (0.9 / peak * sound).numpy().astype(np.float32)
        write_clip(folder / f"{name}, {part}.wav", None, 1, samples, rate, audio_codec="pcm_s16le")
        power = torch.stft(sound / peak, n_fft, hop, window=window, return_complex=True, normalized=True).abs()
        level = 20 * (power + 1e-8).log10()
        extent = (0, len(sound) / rate, 0, rate / 2000)
        axes.imshow(level, origin="lower", aspect="auto", extent=extent, vmin=QUIETEST, vmax=0, cmap="magma")
        axes.set_title(part, fontsize=9)
        axes.set_xlabel("seconds", fontsize=8)
        axes.tick_params(labelsize=8)
    every[0].set_ylabel("kHz", fontsize=8)
    figure.colorbar(every[0].images[0], ax=every, label="dB")
    figure.savefig(folder / f"{name}.png", dpi=DPI, facecolor="white")
