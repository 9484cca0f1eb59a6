"""Spectrograms that belong to an encoder: torchaudio's log-mel, and the filter banks of Kaldi that AST reads."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoders.backbones.base import build_errors
from mmssl.errors import RecipeError

KALDI_LOWEST = 20.0  # Hz, its own default


def middles(mels: int, low: float, high: float) -> tuple[float, ...]:
    """Of `mels` bands from `low` to `high` Hz, evenly spread on the HTK mel scale: where each weighs most, in Hz."""
    ends = [math.log1p(hertz / 700) for hertz in (low, high)]
    return tuple(700 * math.expm1(ends[0] + (ends[1] - ends[0]) * i / (mels + 1)) for i in range(1, mels + 1))


class LogMel(nn.Module):
    """Waveforms (B, S) -> (log(mel power + eps) - mean) / std, (B, M, T); frame `t` is centered on sample `t * hop`.

    For a network of patches T = S // hop + 1 is rounded up to whole patches with silence. The constants are buffers:
    they are saved with the weights and are not trained.

    Args:
        model: for errors.
        rate: see `AudioEncoder`, as all others.
        patch: of the network, if it has patches.
        n_fft: window in samples.
        hop: samples from frame to frame.
        mels: number of bands.
        f_min: lowest frequency in Hz.
        f_max: highest frequency in Hz.
        log: `ln` or `db`.
        eps: added to the power.
        mean: subtracted.
        std: divided by.
    """

    mean: Tensor
    std: Tensor
    says = "mono in [-1, 1]: (log(mel power + eps) - mean) / std"
    made_by = "torchaudio.transforms.MelSpectrogram(rate, n_fft, None, hop, f_min, f_max, n_mels=mels)"

    def __init__(
        self,
        model: str,
        rate: int,
        patch: tuple[int, ...] | None,
        *,
        n_fft: int = 400,
        hop: int = 160,
        mels: int = 64,
        f_min: float = 0.0,
        f_max: float | None = None,
        log: Literal["ln", "db"] = "ln",
        eps: float = 1e-6,
        mean: float = -4.2677,
        std: float = 9.138,
    ) -> None:
        super().__init__()
        from torchaudio.transforms import MelSpectrogram

        if patch and mels % patch[0]:
            raise RecipeError(f"{model}: mels = {mels} cannot be cut into patches of {patch[0]}")
        if std <= 0 or eps <= 0:
            raise RecipeError(f"{model}: std and eps are above 0")
        self.hop, self.log, self.eps, self.patch = hop, log, eps, patch
        with build_errors(model):
            self.mel = MelSpectrogram(rate, n_fft, hop_length=hop, n_mels=mels, f_min=f_min, f_max=f_max)
        self.bands = middles(mels, f_min, rate / 2 if f_max is None else f_max)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.recipe: dict[str, Any] = {
            "rate": rate,
            "n_fft": n_fft,
            "hop": hop,
            "mels": mels,
            "f_min": f_min,
            "f_max": f_max,
            "log": log,
            "eps": eps,
            "mean": mean,
            "std": std,
        }

    def _scale(self, power: Tensor) -> Tensor:
        level = torch.log(power + self.eps)
        if self.log == "db":
            level = level * (10 / math.log(10))
        return (level - self.mean) / self.std

    def fit(self, spectrogram: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Silence at the end up to a whole number of patches, which is not `valid`."""
        spectrogram = spectrogram.to(self.mean.dtype)
        extra = -spectrogram.shape[2] % self.patch[1] if self.patch else 0
        if extra:
            silence = self._scale(torch.zeros_like(spectrogram[:, :, :1]))
            spectrogram = torch.cat([spectrogram, silence.expand(-1, -1, extra)], dim=2)
        if valid is not None:
            valid = F.pad(valid, (0, spectrogram.shape[2] - valid.shape[1]))
        return spectrogram, valid

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.fit(self._scale(self.mel(x.to(self.mean.dtype))))[0]

    def frames(self, valid: Tensor) -> Tensor:
        """Of samples (B, S) -> of frames (B, T): those with a valid sample within half a hop of their center."""
        number = valid.shape[1] // self.hop + 1
        near = F.pad(valid.unsqueeze(1).float(), (self.hop // 2, self.hop))
        kept = F.max_pool1d(near, self.hop, self.hop)[:, 0, :number] > 0
        return F.pad(kept, (0, -number % self.patch[1] if self.patch else 0))


class FilterBanks(nn.Module):
    """Waveforms (B, S) -> Kaldi's log-mel filter banks as AST's feature extractor makes them, (B, M, T).

    Gong, Chung & Glass 2021, "AST: Audio Spectrogram Transformer", arXiv 2104.01778: windows of 25 ms every 10 ms, cut
    or filled with zeros to T = `frames` frames, then (level - mean) / std.

    Args:
        rate: in Hz.
        mels: number of bands M.
        length: number of frames T.
        mean: subtracted.
        std: divided by; AST's is twice the standard deviation of AudioSet.
    """

    mean: Tensor
    std: Tensor
    says = "mono in [-1, 1]: filter banks, zeros up to max_length frames, then (x - mean) / std"
    made_by = (
        "torchaudio.compliance.kaldi.fbank(x[None], sample_frequency=rate, window_type='hanning', num_mel_bins=...)"
    )

    def __init__(
        self, rate: int, mels: int, length: int, *, mean: float = -4.2677393, std: float = 2 * 4.5689974
    ) -> None:
        super().__init__()
        self.rate, self.mels, self.length = rate, mels, length
        self.window, self.hop = rate * 25 // 1000, rate // 100
        self.bands = middles(mels, KALDI_LOWEST, rate / 2)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.recipe: dict[str, Any] = {"rate": rate, "mean": mean, "std": std}

    def fit(self, spectrogram: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The first T frames, and filled up where there are fewer; what is filled in is not `valid`."""
        spectrogram = spectrogram.to(self.mean.dtype)[:, :, : self.length]
        extra = self.length - spectrogram.shape[2]
        nothing = (-self.mean / self.std).expand(*spectrogram.shape[:2], extra)
        if valid is not None:
            valid = F.pad(valid[:, : self.length], (0, max(0, self.length - valid.shape[1])))
        return torch.cat([spectrogram, nothing], dim=2), valid

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        from torchaudio.compliance.kaldi import fbank

        if x.shape[1] < self.window:
            raise RecipeError(f"filter banks need {self.window} samples at least, got {x.shape[1]}; raise seconds")
        rows = [
            fbank(row[None], sample_frequency=self.rate, window_type="hanning", num_mel_bins=self.mels)
            for row in x.to(self.mean.dtype)
        ]
        return self.fit((torch.stack(rows).mT - self.mean) / self.std)[0]

    def frames(self, valid: Tensor) -> Tensor:
        """Of samples (B, S) -> of frames (B, T): those with a valid sample in their window."""
        valid = F.pad(valid, (0, max(0, self.window - valid.shape[1])))
        kept = F.max_pool1d(valid.unsqueeze(1).float(), self.window, self.hop)[:, 0] > 0
        return F.pad(kept[:, : self.length], (0, max(0, self.length - kept.shape[1])))
