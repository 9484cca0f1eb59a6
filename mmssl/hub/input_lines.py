"""Plain PyTorch from decoded rows to what a network reads, for those who use it without mmssl."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mmssl.encoders._spectrogram import FilterBanks
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder


class InputLines(NamedTuple):
    """Python that makes `x`, a batch of what the network reads.

    Attributes:
        given: the variable with the decoded rows: `pictures`, `clips` or `sounds`.
        constants: lines that are run once.
        lines: lines that end in `x = ...`.
    """

    given: str
    constants: list[str]
    lines: list[str]


def input_lines(encoder: Encoder) -> InputLines:
    """For an encoder of pictures, clips or sounds around a network of another library."""
    if isinstance(encoder, AudioEncoder):
        return _of_sounds(encoder)
    values: Any = encoder
    kept, shape = values.normalization(), values.input_size()
    constants = [f"mean, std = (torch.tensor(v)[:, None, None] for v in ({kept['mean']}, {kept['std']}))"]
    if encoder.modality == "image":
        return InputLines("pictures", constants, [_rows(shape), "x = (pictures / 255 - mean) / std"])
    lines = [_rows((values.reading().video.frames, *shape)), "x = (clips / 255 - mean) / std"]
    if encoder.spec.get("difference"):
        lines.append("x = torch.cat([torch.zeros_like(x[:, :1]), x.diff(dim=1)], dim=1)")
    if values.layout == "(B, 3, T, H, W)":
        lines.append("x = x.transpose(1, 2)")
    return InputLines("clips", constants, lines)


def _rows(shape: tuple[int, ...]) -> str:
    return f"# uint8 (B, {', '.join(map(str, shape))})"


def _of_sounds(encoder: AudioEncoder) -> InputLines:
    how, kept, constants = encoder.reading().audio, encoder.recipe, list[str]()
    lines = [f"# float32 (B, {round(how.rate * how.seconds)}) in [-1, 1], {how.rate} samples a second"]
    if not encoder.has_spectrogram:
        scaled = "(sounds - sounds.mean(1, keepdim=True)) / (sounds.var(1, correction=0, keepdim=True) + 1e-7).sqrt()"
        return InputLines("sounds", [], [*lines, f"x = {scaled if encoder.normalize else 'sounds'}"])
    front, scale = encoder.front, f"- {kept['mean']!r}) / {kept['std']!r}"
    if isinstance(front, FilterBanks):
        constants.append("from torchaudio.compliance.kaldi import fbank")
        arguments = f'sample_frequency={front.rate}, window_type="hanning", num_mel_bins={front.mels}'
        lines += [
            f"banks = torch.stack([fbank(sound[None], {arguments}) for sound in sounds])[:, :{front.length}]",
            f"x = (torch.nn.functional.pad(banks, (0, 0, 0, {front.length} - banks.shape[1])) {scale}",
        ]
        return InputLines("sounds", constants, lines)
    assert front is not None  # it has a spectrogram
    names = {"n_fft": "n_fft", "hop": "hop_length", "mels": "n_mels", "f_min": "f_min", "f_max": "f_max"}
    arguments = ", ".join(f"{name}={kept[key]!r}" for key, name in names.items())
    constants += ["import torchaudio", f"mel = torchaudio.transforms.MelSpectrogram({kept['rate']}, {arguments})"]
    log, level = "torch.log", math.log(kept["eps"])
    if kept["log"] == "db":
        log, level = "10 * torch.log10", 10 * math.log10(kept["eps"])
    lines.append(f"x = ({log}(mel(sounds) + {kept['eps']!r}) {scale}")
    if front.patch:
        silence = (level - kept["mean"]) / kept["std"]
        lines.append(f"x = torch.nn.functional.pad(x, (0, -x.shape[2] % {front.patch[1]}), value={silence!r})")
    return InputLines("sounds", constants, [*lines, f"x = x[:, None].expand(-1, {encoder.backbone.channels}, -1, -1)"])
