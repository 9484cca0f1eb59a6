"""An encoder of sounds in X-ARES: frames of a whole sound at a steady rate.

    # my_encoder.py, for: python -m xares.run my_encoder.py tasks/esc50_task.py
    from mmssl.suites import xares

    class MineEncoder(xares.XaresEncoder):
        def __init__(self):
            super().__init__("runs/mine")

Zhang et al. 2025, "X-ARES: A Comprehensive Framework for Assessing Audio Encoder Performance", arXiv 2505.16369. An
encoder there is a module from waveforms (B, S) to frames (B, T, D), with `sampling_rate`, `output_dim` and
`hop_size_in_ms`, and the name of its class ends in Encoder.

Known traps:
    - X-ARES decodes with `torchaudio.load`, which takes torchcodec and FFmpeg's libraries; without them it skips every
      sound with a warning, and then says that its data is empty.
    - X-ARES keeps embeddings and trained heads under the name of the class: give every run a class of its own.
    - Sounds there are as long as they are, and networks are made for the window that they were trained on: a sound is
      read in windows of that length, one after another, and the frames of all of them are handed over.
    - A network may say something of more than the window, for its spectrogram is filled up: those frames are left out,
      so that the rate is the same throughout.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.adaptation.probes.frames import moments_of
from mmssl.encoders.audio import AudioEncoder
from mmssl.errors import RecipeError, RunError
from mmssl.modules.mode import evaluating
from mmssl.suites import Given, open_model


class XaresEncoder(nn.Module):
    """Waveforms (B, S) in [-1, 1] -> frames (B, T, D), means over frequencies.

    Args:
        given: a run, its directory, its name on the Hub, an encoder, or a task.
        encoder: name of the one that is asked; the first one of sounds where left out.
        seconds: of a window; those of the run where left out.
        trust: import the objective or encoder of your own that a run's directory names.

    Attributes:
        sampling_rate: of the waveforms, in Hz.
        output_dim: D.
        hop_size_in_ms: from frame to frame.
        window: samples of a window.
        frames: in a window.

    Raises:
        RecipeError: for a network that reads no sounds, or no window of that length.
        RunError: for a run that cannot be read.
    """

    def __init__(
        self, given: Given, encoder: str | None = None, *, seconds: float | None = None, trust: bool = False
    ) -> None:
        super().__init__()
        model = open_model(given, encoder, trust=trust)
        asked = model.encoder
        if encoder is None:
            asked = next((one for one in model.encoders.values() if one.modality == "audio"), asked)
        if asked.modality != "audio":
            raise RecipeError(f"X-ARES asks encoders of sounds, and this one reads {asked.modality}")
        self.encoder = cast(AudioEncoder, asked)
        seconds = self.encoder.reading().audio.seconds if seconds is None else seconds
        self.sampling_rate, self.output_dim = self.encoder.rate, self.encoder.dim
        self.window = round(seconds * self.sampling_rate)
        if self.window < 1:
            raise RecipeError(f"seconds = {seconds}: expected a window of one sample at least")
        with evaluating(self.encoder), torch.no_grad():
            silence = torch.zeros(1, self.window, device=next(self.encoder.parameters()).device)
            moments = moments_of(self.encoder(silence), "audio").shape[1]
            length = self.window / self.sampling_rate
            share = length / self.encoder.span(silence)
        self.frames = min(moments, math.ceil(round(moments * share, 6)))
        self.hop_size_in_ms = 1000 * length / self.frames

    def forward(self, audio: Tensor) -> Tensor:
        """Frames of sounds, float32 (B, T, D), T as many as the sound's length takes.

        Args:
            audio: float (B, S), on any device.

        Raises:
            RunError: where frames are not finite.
        """
        device = next(self.encoder.parameters()).device
        rows, samples = audio.shape
        windows = max(1, math.ceil(samples / self.window))
        x = F.pad(audio.to(device), (0, windows * self.window - samples)).view(-1, self.window)
        valid = (torch.arange(windows * self.window, device=device) < samples).view(windows, -1).repeat(rows, 1)
        with evaluating(self.encoder), torch.no_grad():
            moments = moments_of(self.encoder(x, valid), "audio")[:, : self.frames].float()
        if not moments.isfinite().all():
            raise RunError("frames are not finite: training diverged, or the encoder's precision is too low")
        number = max(1, math.ceil(round(samples / self.window * self.frames, 6)))
        return moments.unflatten(0, (rows, windows)).flatten(1, 2)[:, :number]
