"""Encoders that learn nothing: what a probe finds in the input itself, the row that every network has to beat."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from mmssl.encoders.base import Encoder, Features

SIDE = 16  # cells of a picture's side
MELS = 64


class RawInput(Encoder):
    """The input, shrunk to a vector; `dim` is its width.

    - image: 16 x 16 colors, each the mean of its cell;
    - video: 8 x 8 colors of the mean frame, and the mean change between frames there;
    - audio: mean and deviation over time of 64 log-mel bands;
    - text: how often each token occurs, as its share.

    Args:
        modality: out of these.
        rate: of sounds, in Hz.
        tokenizer: of texts.
    """

    def __init__(self, modality: str, *, rate: int = 16000, tokenizer: Any = None) -> None:
        super().__init__()
        self.modality, self.tokenizer = modality, tokenizer
        widths = {"image": 3 * SIDE**2, "video": 2 * 3 * (SIDE // 2) ** 2, "audio": 2 * MELS}
        self.dim = tokenizer.vocab_size if modality == "text" else widths[modality]
        self.mel = MelSpectrogram(rate, n_fft=1024, n_mels=MELS) if modality == "audio" else None
        self.place = nn.Parameter(torch.empty(0))  # that it has a device

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """One token a row, float32 (B, 1, dim)."""
        pooled = getattr(self, f"_{self.modality}")(x, valid)
        return Features(pooled[:, None], pooled, (1,))

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        """None: the vector is all there is."""
        return {}

    def _image(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return F.adaptive_avg_pool2d(x.float() / 255, SIDE).flatten(1)

    def _video(self, x: Tensor, valid: Tensor | None) -> Tensor:
        small = F.adaptive_avg_pool2d(x.float().flatten(0, 1) / 255, SIDE // 2).unflatten(0, x.shape[:2])
        change = (small[:, 1:] - small[:, :-1]).abs().mean(1) if small.shape[1] > 1 else torch.zeros_like(small[:, 0])
        return torch.cat([small.mean(1).flatten(1), change.flatten(1)], 1)

    def _audio(self, x: Tensor, valid: Tensor | None) -> Tensor:
        assert self.mel is not None  # of a sound
        bands = (self.mel(x) + 1e-6).log()
        return torch.cat([bands.mean(-1), bands.std(-1, correction=0)], 1)

    def _text(self, x: Tensor, valid: Tensor | None) -> Tensor:
        counted = torch.ones_like(x, dtype=torch.float32) if valid is None else valid.float()
        counts = torch.zeros(len(x), self.dim, device=x.device).scatter_add_(1, x, counted)
        return counts / counts.sum(1, keepdim=True).clamp_min(1)
