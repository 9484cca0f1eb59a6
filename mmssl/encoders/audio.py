"""Sounds: an image network of timm, torchvision or open_clip on a log-mel spectrogram."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.encoders.backbones import Pretrained, build_errors, create_vision, write_json
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError


class AudioEncoder(Encoder):
    """Waveforms (B, S), float in [-1, 1], or spectrograms (B, M, T) as `spectrogram` makes them -> Features.

    `forward`, `embed` and `layers` tell the two apart by their number of dimensions, so that a task may augment
    spectrograms: `encoder(augment(encoder.spectrogram(x)))`. `valid` is (B, S) with a waveform and (B, T) with a
    spectrogram. Frame `t` is centered on sample `t * hop`.

    The default normalization is that of log(power mel + 1e-6) with AST's constants: mean -4.2677, twice the standard
    deviation 4.569 (AudioMAE, SSAST and Synchformer divide by 2·std, CAV-MAE by std).

    Args:
        model: `timm/...`, `torchvision/...` or `open_clip/...`. timm's networks get one input channel, the others see
            the spectrogram three times.
        pretrained: see `mmssl.encoders.create`.
        rate: sample rate in Hz; that of the data must be the same.
        n_fft: window in samples.
        hop: samples from frame to frame.
        mels: number of mel bands M (HTK scale).
        f_min: lowest frequency in Hz.
        f_max: highest frequency in Hz; half the rate where left out.
        log: `ln`, or `db` for 10·log10.
        eps: added to the power before the logarithm.
        mean: of the log spectrogram, subtracted.
        std: divided by.
        **kwargs: of the network's constructor. `img_size: [M, T]` gives a vision transformer positions of its own for
            that grid; others are resampled from those.
    """

    modality = "audio"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str,
        *,
        pretrained: Pretrained = False,
        rate: int = 16_000,
        n_fft: int = 400,
        hop: int = 160,
        mels: int = 64,
        f_min: float = 0.0,
        f_max: float | None = None,
        log: Literal["ln", "db"] = "ln",
        eps: float = 1e-6,
        mean: float = -4.2677,
        std: float = 9.138,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        from torchaudio.transforms import MelSpectrogram

        if model.startswith("timm/"):
            kwargs.setdefault("in_chans", 1)
        self.backbone = create_vision(model, pretrained, kwargs)
        self.patch_size = self.backbone.patch_size
        if self.patch_size and mels % self.patch_size[0]:
            raise RecipeError(f"{model}: mels = {mels} cannot be cut into patches of {self.patch_size[0]}")
        if std <= 0 or eps <= 0:
            raise RecipeError(f"{model}: std and eps are above 0")
        self.rate, self.hop, self.mels, self.log, self.eps = rate, hop, mels, log, eps
        with build_errors(model):
            self.mel = MelSpectrogram(rate, n_fft, hop_length=hop, n_mels=mels, f_min=f_min, f_max=f_max)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.dim, self.subsets, self.width = self.backbone.dim, self.backbone.subsets, self.backbone.width
        self.recipe = {
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
        self.spec = {"model": model, "modality": "audio", **self.recipe, **self.backbone.kwargs}

    def _scale(self, power: Tensor) -> Tensor:
        level = torch.log(power + self.eps)
        if self.log == "db":
            level = level * (10 / math.log(10))
        return (level - self.mean) / self.std

    def _pad(self, spectrogram: Tensor) -> Tensor:
        """Silence at the end up to a whole number of patches."""
        extra = -spectrogram.shape[2] % self.patch_size[1] if self.patch_size else 0
        if not extra:
            return spectrogram
        silence = self._scale(torch.zeros_like(spectrogram[:, :, :1]))
        return torch.cat([spectrogram, silence.expand(-1, -1, extra)], dim=2)

    def spectrogram(self, x: Tensor) -> Tensor:
        """Waveforms (B, S) -> normalized log-mel spectrograms (B, M, T), T = S // hop + 1.

        For a network of patches T is rounded up to whole patches with silence.
        """
        # A Fourier transform in half precision loses the quiet bands, and is not implemented on every device.
        with torch.autocast(x.device.type, enabled=False):
            return self._pad(self._scale(self.mel(x.to(self.mean.dtype))))

    def valid_frames(self, valid: Tensor) -> Tensor:
        """Of samples (B, S) -> of frames (B, S // hop + 1): those with one within half a hop of their center."""
        frames = valid.shape[1] // self.hop + 1
        near = F.pad(valid.unsqueeze(1).float(), (self.hop // 2, self.hop))
        return F.max_pool1d(near, self.hop, self.hop)[:, 0, :frames] > 0

    def _picture(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the network reads, (B, C, M, T), and its valid columns (B, T)."""
        if x.ndim == 2:
            valid = None if valid is None else self.valid_frames(valid)
            x = self.spectrogram(x)
        else:
            x = self._pad(x.to(self.mean.dtype))
        if valid is not None:
            valid = F.pad(valid, (0, x.shape[2] - valid.shape[1]))
        return x.unsqueeze(1).expand(-1, self.backbone.channels, -1, -1), valid

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Waveforms or spectrograms -> tokens (B, h·w, width), row by row from the lowest band; see the base class."""
        return self.backbone.embed(self._picture(x, None)[0], hidden, mask_token)

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        """Any subset of the tokens of `embed` -> Features; see the base class."""
        return self.backbone.encode(tokens, valid)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Waveforms or spectrograms -> Features, grid (mels, frames); a token is valid where one of its frames is."""
        features: Features = self.backbone(*self._picture(x, valid))
        return features

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        """See the base class."""
        return self.backbone.layers(*self._picture(x, valid))

    def export(self, directory: Path) -> None:
        """Write the network's native files, and `preprocessing.json` beside them; see the base class."""
        channels = self.backbone.channels
        # To its library the network reads spectrograms that are normalized already.
        picture = {"mean": [0.0] * channels, "std": [1.0] * channels}
        self.backbone.export(Path(directory), picture)
        preprocessing = {
            "modality": "audio",
            "model": self.spec["model"],
            "input": "mono in [-1, 1]: (log(mel power + eps) - mean) / std",
            "mel": "torchaudio.transforms.MelSpectrogram(rate, n_fft, None, hop, f_min, f_max, n_mels=mels)",
            "channels": channels,
            **self.recipe,
        }
        write_json(Path(directory) / "preprocessing.json", preprocessing)
