"""Sounds: a network of pictures on a log-mel spectrogram, or one of transformers on its own input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from mmssl.encoders._network import NetworkEncoder
from mmssl.encoders._spectrogram import FilterBanks, LogMel
from mmssl.encoders.backbones.base import Pretrained, create_backbone
from mmssl.encoders.base import Scale
from mmssl.errors import RecipeError
from mmssl.media.audio import decode_audio
from mmssl.ranges import AboveZero, Positive, Weight
from mmssl.recipe import Data

if TYPE_CHECKING:
    from mmssl.encoders.backbones._transformers_waves import WaveTransformer


class AudioEncoder(NetworkEncoder):
    """Waveforms (B, S), float in [-1, 1] -> Features.

    Networks of pictures read log-mel spectrograms, grid (mels, frames), and the audio spectrogram transformer Kaldi's
    filter banks; what they read is `spectrogram`. `forward`, `embed` and `layers` of such encoders take spectrograms
    (B, M, T) as well and tell the two apart by their number of dimensions, so that a task may augment spectrograms:
    `encoder(augment(encoder.spectrogram(x)))`. `valid` is (B, S) with a waveform and (B, T) with a spectrogram.
    Networks of waveforms have no spectrogram, and their grid is (1, frames); what their convolutions make of the sound
    are `frames`, which `embed` takes as well as waveforms.

    The default normalization is that of log(power mel + 1e-6) with AST's constants: mean -4.2677, twice the standard
    deviation 4.569 (AudioMAE, SSAST and Synchformer divide by 2·std, CAV-MAE by std).

    Args:
        model: `timm/...`, `torchvision/...`, `open_clip/...`, or `transformers/` and a model type:
            `audio-spectrogram-transformer` on its filter banks, `wav2vec2`, `hubert` or `wavlm` on waveforms, or one of
            an image network. Networks of timm and transformers get one input channel, the others see the spectrogram
            three times.
        pretrained: see `mmssl.encoders.create`.
        rate: sample rate in Hz; that of the data must be the same.
        n_fft: window in samples (400). This and what follows up to `std` is for networks of pictures.
        hop: samples from frame to frame (160).
        mels: number of mel bands M (64, HTK scale).
        f_min: lowest frequency in Hz (0).
        f_max: highest frequency in Hz; half the rate where left out.
        log: `ln` (default), or `db` for 10·log10.
        eps: added to the power before the logarithm (1e-6).
        mean: of the log spectrogram, subtracted (-4.2677; for filter banks, too).
        std: divided by (9.138; for filter banks, too).
        normalize: whether a waveform is set to mean 0 and variance 1 for a network of waveforms; where left out, as its
            weights expect, and with random ones it is.
        **kwargs: of the network's constructor. `img_size: [M, T]` gives a vision transformer of timm positions of its
            own for that grid; others are resampled from those.
    """

    modality = "audio"
    shapes: ClassVar[dict[int, str]] = {2: "(B, S)", 3: "(B, M, T)"}

    def __init__(
        self,
        model: str,
        *,
        pretrained: Pretrained = False,
        rate: Positive = 16_000,
        n_fft: Positive | None = None,
        hop: Positive | None = None,
        mels: Positive | None = None,
        f_min: Weight | None = None,
        f_max: AboveZero | None = None,
        log: Literal["ln", "db"] | None = None,
        eps: AboveZero | None = None,
        mean: float | None = None,
        std: AboveZero | None = None,
        normalize: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(create_backbone(model, "audio", pretrained, kwargs))
        self.rate = rate
        window = {"n_fft": n_fft, "hop": hop, "mels": mels, "f_min": f_min, "f_max": f_max}
        level = {"log": log, "eps": eps, "mean": mean, "std": std}
        given: dict[str, Any] = {key: value for key, value in (window | level).items() if value is not None}
        kind = self.backbone.reads
        self.front: LogMel | FilterBanks | None = None
        if kind == "waveforms":
            self.normalize = self.backbone.normalizes if normalize is None else normalize
            self.recipe: dict[str, Any] = {"rate": rate, "normalize": self.normalize}
        elif kind == "filter banks":
            config = self.backbone.net.config
            self.front = FilterBanks(
                rate, int(config.num_mel_bins), int(config.max_length), **_only(model, kind, given)
            )
            self.recipe = self.front.recipe
        else:
            self.front = LogMel(model, rate, self.backbone.patch_size, **given)
            self.recipe = self.front.recipe
        if self.front is not None and normalize is not None:
            raise RecipeError(f"{model}: 'normalize' is for networks of waveforms, and this one reads spectrograms")
        if self.front is None and given:
            raise RecipeError(f"{model}: '{next(iter(given))}' is for spectrograms, and this network reads waveforms")
        self.spec = {"model": model, "modality": "audio", **self.recipe, **self.backbone.kwargs}

    @property
    def has_spectrogram(self) -> bool:
        """Whether the network reads a spectrogram; one of waveforms has none."""
        return self.front is not None

    @property
    def _front(self) -> LogMel | FilterBanks:
        if self.front is None:
            raise RecipeError(
                f"{self.spec['model']} reads waveforms and has no spectrogram; take a network of pictures, such as "
                "timm/resnet18, or transformers/audio-spectrogram-transformer"
            )
        return self.front

    def spectrogram(self, x: Tensor) -> Tensor:
        """Waveforms (B, S) -> normalized spectrograms (B, M, T), T a whole number of patches.

        Raises:
            RecipeError: for a network of waveforms.
        """
        # A Fourier transform in half precision loses the quiet bands, and is not implemented on every device.
        with torch.autocast(x.device.type, enabled=False):
            spectrogram: Tensor = self._front(x)
        return spectrogram

    def valid_frames(self, valid: Tensor) -> Tensor:
        """Which samples are no padding (B, S) -> which frames of `spectrogram`, or `frames`, (B, T)."""
        return self.waves.valid_frames(valid) if self.front is None else self._front.frames(valid)

    @property
    def waves(self) -> WaveTransformer:
        """The network, of an encoder that reads waveforms.

        Raises:
            RecipeError: where it reads spectrograms.
        """
        if self.front is not None:
            raise RecipeError(
                f"{self.spec['model']} reads spectrograms; take a network of waveforms: transformers/wav2vec2, hubert "
                "or wavlm"
            )
        return cast("WaveTransformer", self.backbone)

    def frames(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Waveforms (B, S) -> what the transformer reads before it is projected, (B, N, C), and valid frames (B, N).

        Raises:
            RecipeError: for a network that reads spectrograms.
        """
        return self.waves.convolve(*self.checked(x, valid))

    def scale(self, row: Tensor) -> Scale:
        """See the base class: of a waveform (S,), or a spectrogram (M, T)."""
        if row.ndim == 1:
            return Scale(len(row) / self.rate)
        return Scale(row.shape[1] * self._front.hop / self.rate, self._front.bands)

    def span(self, x: Tensor, fps: float | None = None) -> float:
        """See the base class: of waveforms (B, S) or spectrograms (B, M, T)."""
        if self.front is None:
            return self.scale(x[0]).seconds
        return self.scale(self.prepare(x[:1].to(self.front.mean.device))[0][0, 0]).seconds

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the network reads: pictures (B, C, M, T) with their valid columns (B, T), or waveforms."""
        if self.front is None:
            return (x, valid) if self._are_frames(x) else self._waveform(x, valid)
        if x.ndim == 2:
            valid = None if valid is None else self.valid_frames(valid)
            x = self.spectrogram(x)
        else:
            x, valid = self.front.fit(x, valid)
        return x.unsqueeze(1).expand(-1, self.backbone.channels, -1, -1), valid

    def _are_frames(self, x: Tensor) -> bool:
        return x.ndim == 3 and x.shape[2] == self.waves.frame_width

    def _waveform(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if x.ndim != 2:
            raise RecipeError(f"{self.spec['model']} reads waveforms (B, S), not spectrograms")
        x = x.to(next(self.parameters()).dtype)
        if not self.normalize:
            return x, valid
        weight = torch.ones_like(x) if valid is None else valid.to(x.dtype)
        number = weight.sum(1, keepdim=True).clamp(min=1)
        x = (x - (x * weight).sum(1, keepdim=True) / number) * weight
        # The constant is transformers' own; padding stays 0.
        return x / (x.square().sum(1, keepdim=True) / number + 1e-7).sqrt(), valid

    def built_for(self) -> dict[str, Any]:
        """See the base class."""
        return {"rate": self.rate}

    def decode_one(self, cell: Any, data: Data) -> tuple[Tensor, Tensor]:
        """See the base class."""
        how, window = data.audio, self.window(data)
        if how.rate != self.rate:
            raise RecipeError(
                f"{self.spec['model']}: rate = {how.rate}, and the encoder hears {self.rate} samples a second"
            )
        if isinstance(cell, tuple) and len(cell) == 2:
            cell = {"array": cell[0], "sampling_rate": cell[1]}
        return decode_audio(cell, how.rate, how.seconds, window, channel=how.channel)

    def input_size(self) -> tuple[int, int, int]:
        """See the base class: those of the spectrogram."""
        sound = self.reading().audio
        silence = torch.zeros(1, round(sound.rate * sound.seconds), device=next(self.parameters()).device)
        if self.front is None:
            return 1, 1, silence.shape[1]
        mels, frames = self.spectrogram(silence).shape[-2:]
        return self.backbone.channels, mels, frames

    def normalization(self) -> dict[str, list[float]]:
        """See the base class: of filter banks; a spectrogram is made and normalized by the encoder."""
        if not isinstance(self.front, FilterBanks):
            return super().normalization()
        return {"mean": [self.recipe["mean"]], "std": [self.recipe["std"]]}

    def preprocessing(self) -> dict[str, Any]:
        """See the base class."""
        if self.front is None:
            scaled = ": (x - mean) / sqrt(variance + 1e-7), of each sound" if self.normalize else ""
            return {"input": f"mono in [-1, 1]{scaled}", **self.recipe}
        channels = self.backbone.channels
        return {"input": self.front.says, "mel": self.front.made_by, "channels": channels, **self.recipe}


def _only(model: str, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, which may say `mean` and `std` alone."""
    for key in given:
        if key not in ("mean", "std"):
            raise RecipeError(f"{model}: '{key}' cannot be chosen: the network has {kind} of its own")
    return given
