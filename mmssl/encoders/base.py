"""The contract of every encoder: one modality in, tokens of one width out.

An encoder *is* a backbone of timm, torchvision, open_clip or transformers, unchanged inside, so that it can leave as
one. Around it is only what has to travel with the weights: normalization constants, the spectrogram recipe, the
tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.errors import DataError
from mmssl.recipe import Data


class Features(NamedTuple):
    """What an encoder says about a batch.

    Attributes:
        tokens: (B, N, D), one vector a place.
        pooled: (B, D), one vector a row.
        grid: extent of the tokens: (h, w) for images, (mels, frames) for spectrograms, (t, h, w) for video, (n,) for
            text; `()` for a subset, which has none.
        valid: bool (B, N), True where a token is valid; None where all are.
    """

    tokens: Tensor
    pooled: Tensor
    grid: tuple[int, ...]
    valid: Tensor | None = None


class Input(NamedTuple):
    """What `Encoder.read` makes of files, and an encoder takes: `encoder(input)`, or `encoder.layers(*input)`.

    Attributes:
        x: a row a thing, as `mmssl.batch` says, on the encoder's device.
        valid: bool, False where `x` is padding; None where none is.
    """

    x: Tensor
    valid: Tensor | None = None


class Scale(NamedTuple):
    """What the axes of a sound's picture measure.

    Attributes:
        seconds: from its left end to its right one.
        bands: middle of each band of a spectrogram in Hz, lowest first; empty for a waveform.
    """

    seconds: float
    bands: tuple[float, ...] = ()


class Encoder(nn.Module):
    """One modality in, tokens of one width out.

    Attributes:
        modality: key of the batch that it reads: `image`, `text`, `audio` or `video`; `fusion` where it reads two other
            encoders and no data.
        dim: width D of tokens and pooled vectors.
        subsets: whether `encode` takes any subset of the tokens of `embed` (transformers do, convolutional networks do
            not). A masked task asks this when it is built.
        patch_size: extent of a token, where tokens are patches that do not overlap: (h, w) in pixels, (frames, h, w)
            for video; else None.
        width: of the mask token of `embed`, where there is one; a tower of open_clip has one apart from `dim`. An
            encoder with a width and without `subsets` can hide tokens, and leave none out.
        spec: the arguments of `mmssl.encoder` that build this network again with random weights.
        frozen: whether it learns nothing; see `freeze`.
        decoding: how the run that it is of reads files; None where it is of none.
        origin: where the weights are from, in words: `started_from`, and of a run its `task` and `license`.
    """

    modality: str
    dim: int
    subsets: bool = False
    patch_size: tuple[int, ...] | None = None
    width: int | None = None
    spec: dict[str, Any]
    frozen: bool = False
    decoding: Data | None = None
    origin: Mapping[str, str] = MappingProxyType({})
    _passes: list[tuple[tuple[Any, ...], Any]] | None = None  # of `one_pass`: what was handed over, what came back

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """`forward`, of tensors or of what `read` returned; or what it returned before where `one_pass` is on."""
        if inputs and isinstance(inputs[0], Input):
            inputs = (*inputs[0], *inputs[1:])
        if inputs and not isinstance(inputs[0], Tensor | Features | None):
            raise DataError(
                f"{self.spec['model']} takes tensors, and {type(inputs[0]).__name__} is none: "
                "encoder(encoder.read(things)) takes pictures, arrays, paths, texts and lists of them"
            )
        if self._passes is None:
            return super().__call__(*inputs, **options)
        # A pass without gradient serves no task that wants one.
        given = (torch.is_grad_enabled(), *inputs, *(part for item in options.items() for part in item))
        for before, result in self._passes:
            if len(before) == len(given) and all(a is b for a, b in zip(before, given, strict=True)):
                return result
        result = super().__call__(*inputs, **options)
        self._passes.append((given, result))
        return result

    def freeze(self, frozen: bool = True) -> Self:
        """Stay as it is, or learn again: no gradient, so no optimizer and no weight decay, and always evaluation mode.

        What is frozen also keeps BatchNorm's running statistics and drops nothing, whatever `train` is called with.
        """
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.train(not frozen)
        return self

    def train(self, mode: bool = True) -> Self:
        """See `torch.nn.Module.train`; one that is frozen stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def read(self, things: Any, **settings: Any) -> Input:
        """Files and what is like them -> what the encoder takes, decoded as its run decodes them.

        Args:
            things: one, or a list, tuple or iterator of them. Pictures: a path, bytes, a PIL image, or an array (H, W),
                (H, W, 3). Texts: strings. Sounds: a path, bytes, `(array, rate)` or `{"array", "sampling_rate"}`.
                Clips: a path, bytes, or `{"frames", "fps"}`. Of longer sounds and clips the middle is read, of longer
                texts the beginning.
            **settings: of the section of a recipe's `data` that is named after the modality, in place of the run's:
                `size` and `fit` of pictures, `length` of texts, `seconds` of sounds, `size`, `fps` and `frames` of
                clips. Without a run pictures and clips have the size that the network was built for, texts 64 ids or
                as many as it takes, sounds 2 s, and clips 16 frames, or as many as it takes, at 12.5 a second.

        Raises:
            DataError: naming the thing and what is wrong with it.
            RecipeError: for a setting that does not exist or does not fit.
        """
        raise TypeError(f"{type(self).__name__} reads no files")

    def scale(self, row: Tensor) -> Scale | None:
        """What the axes of a picture of `row`, one of what the encoder takes, measure; None where they have no unit."""
        return None

    def span(self, x: Tensor, fps: float | None = None) -> float | None:
        """Seconds from the start of `x` over which its tokens are spread; None where they have none. See `times`."""
        return None

    def times(self, x: Tensor, grid: tuple[int, ...], fps: float | None = None) -> Tensor:
        """Start and end of each token in seconds from the start of `x`, float64 (N, 2).

        Tokens share the time of what the network reads evenly, and may have seen more than their own part. Where a
        spectrogram is filled up to whole patches or to the length that the network was built for, the last ones lie
        after the end of the sound. What `read` shows of a longer file starts at half of what is left out.

        Args:
            x: sounds or clips, as `forward` takes them.
            grid: of their `Features`, or of one of the `layers`.
            fps: frames a second of clips; what `read` takes where left out.

        Raises:
            TypeError: where tokens are in no time: of pictures and texts, and of a subset.
        """
        seconds = self.span(x, fps)
        if seconds is None or not grid:
            raise TypeError(f"{self.spec['model']}: tokens of {self.modality} with a grid {grid} have no seconds")
        axis = 0 if self.modality == "video" else len(grid) - 1
        edges = torch.linspace(0, seconds, grid[axis] + 1, dtype=torch.float64)
        sizes = [1] * len(grid)
        sizes[axis] = grid[axis]
        return torch.stack([edges[:-1], edges[1:]], 1).view(*sizes, 2).expand(*grid, 2).reshape(-1, 2)

    def fitting(self, data: Data) -> Data:
        """How a task decodes its rows -> how this network alone reads them; a task may show it a part of more."""
        return data

    def reading(self) -> Data:
        """How `read` decodes: as the run does, or as suits the network; see there."""
        raise TypeError(f"{type(self).__name__} reads no files")

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Raw input -> position-aware tokens (B, N, ...), of which any subset may go to `encode`.

        Args:
            x: see `forward`.
            hidden: bool (B, N), True where `mask_token` replaces what is seen there; it gets the position.
            mask_token: (width,).

        Raises:
            TypeError: for a backbone that has no such tokens.
        """
        raise TypeError(
            f"{self.spec['model']} has no tokens that can be left out; "
            "a masked task needs a plain vision transformer, such as timm/vit_tiny_patch16_224"
        )

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        """Any subset of the tokens of `embed`, (B, n, width), -> Features.

        Args:
            tokens: of `embed`.
            valid: bool (B, n), False where a token is padding: it is attended to by none.
        """
        raise TypeError(f"{self.spec['model']} has no tokens that can be left out")

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Raw input -> Features.

        Args:
            x: see `mmssl.batch`; floats in [0, 1] in place of uint8 where it was augmented.
            valid: bool, False where `x` is padding.
        """
        return self.encode(self.embed(x), valid)

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        """Every depth, shallow to deep: {name: Features}.

        Tokens (B, N, D) are in their places, `pooled` (B, D) is their mean over the valid ones; N, D and grid are the
        depth's own.
        """
        raise TypeError(f"{type(self).__name__} names no layers")

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """What `forward` and `layers` return; encoders around one network run it once for both."""
        return self(x, valid), self.layers(x, valid)

    def attention(self, x: Tensor, valid: Tensor | None = None) -> Tensor | None:
        """Attention from the class token to each place in the last layer, (B, N); None where that cannot be told."""
        return None

    def export(self, directory: Path) -> None:
        """Write native files into `directory` (made if missing): what the backbone's library loads without mmssl."""
        raise TypeError(f"{type(self).__name__} has no native form")


@contextmanager
def one_pass(encoders: Iterable[Encoder]) -> Iterator[None]:
    """Within it an encoder that is handed the very same tensors again returns the Features of the first time.

    So two tasks of a combination share one forward and one backward pass: the gradient of both arrives at those
    Features as a sum. They share dropout's masks too, and BatchNorm counts the rows once.
    """
    encoders = list(encoders)
    for encoder in encoders:
        encoder._passes = []
    try:
        yield
    finally:
        for encoder in encoders:
            encoder._passes = None


def attendable(valid: Tensor) -> Tensor:
    """(B, N) bool: a row without any valid place counts as valid throughout, so that no softmax or mean is empty."""
    return valid | ~valid.any(dim=1, keepdim=True)


def masked_mean(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """(B, N, D) -> (B, D), the mean over places where `valid` (B, N) is True."""
    if valid is None:
        return tokens.mean(dim=1)
    weight = attendable(valid).unsqueeze(2).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1)


def at_depth(tokens: Tensor, grid: tuple[int, ...], valid: Tensor | None = None) -> Features:
    """Tokens of one depth as Features: pooled is the mean over valid places."""
    return Features(tokens, masked_mean(tokens, valid), grid, valid)


def hide(tokens: Tensor, hidden: Tensor | None, mask_token: Tensor | None) -> Tensor:
    """(B, N, D) with `mask_token` (D,) where `hidden` (B, N) is True; neither means that nothing is hidden.

    Raises:
        ValueError: where one of the two is missing.
    """
    if hidden is None and mask_token is None:
        return tokens
    if hidden is None or mask_token is None:
        raise ValueError("embed: hidden and mask_token come together")
    return torch.where(hidden.unsqueeze(2), mask_token.to(tokens.dtype), tokens)


def places(valid: Tensor | None, grid: tuple[int, ...]) -> Tensor | None:
    """Valid columns (B, W) -> valid places of a grid (..., w), (B, N): those over a valid column."""
    if valid is None:
        return None
    kept = F.adaptive_max_pool1d(valid.unsqueeze(1).float(), grid[-1]) > 0
    return kept.expand(-1, math.prod(grid[:-1]), -1).flatten(1)
