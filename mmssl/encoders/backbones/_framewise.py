"""A network of pictures as one of clips: each frame alone, then pooled over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.encoders.backbones._temporal import TemporalTransformer
from mmssl.encoders.backbones.base import Backbone
from mmssl.encoders.base import Features, at_depth, attendable, masked_mean


class Framewise(Backbone):
    """Clips (B, C, T, H, W) through a network of pictures.

    A token that is left out is missing in its frame alone, and frames of fewer tokens than others are padded. So that
    `encode` knows which frame a token is of, `embed` puts its number into one more channel, the last: exact up to 256
    frames in bfloat16. How many tokens the fullest frame has is asked of the device, once a pass.

    Args:
        frame: the network of pictures.
        temporal: how the vectors of frames become one: their `mean` or `max`, or the mean of what a
            `TemporalTransformer` makes of them. Tokens are those of single frames with each.
    """

    reads = "clips"

    def __init__(self, frame: Backbone, temporal: Literal["mean", "max"] | TemporalTransformer) -> None:
        super().__init__()
        self.frame, self.model, self.kwargs, self.temporal = frame, frame.model, frame.kwargs, temporal
        self.dim, self.width, self.subsets = frame.dim, frame.width, frame.subsets and frame.padding
        self.channels, self.mean, self.std = frame.channels, frame.mean, frame.std
        self.size = frame.size
        self.patch_size = None if frame.patch_size is None else (1, *frame.patch_size)

    @property
    def native(self) -> Backbone:
        """The network of pictures."""
        return self.frame

    def _pool(self, frames: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, D), over the frames that are `seen`, bool (B, T)."""
        if self.temporal == "max":
            hidden = torch.zeros_like(frames[:, :, :1], dtype=torch.bool) if seen is None else ~seen[:, :, None]
            return frames.masked_fill(hidden, -torch.inf).amax(dim=1)
        return masked_mean(frames, seen)

    def _clip(self, frames: Tensor, seen: Tensor | None = None) -> Tensor:
        """Likewise, of what the network of pictures pools."""
        if isinstance(self.temporal, TemporalTransformer):
            frames = self.temporal(frames, seen)
        return self._pool(frames, seen)

    @staticmethod
    def _over_time(frames: Features, number: int, pool: Callable[[Tensor], Tensor]) -> Features:
        """Features of B·T frames -> of B clips of T frames."""
        tokens = frames.tokens.unflatten(0, (-1, number)).flatten(1, 2)
        valid = None if frames.valid is None else frames.valid.unflatten(0, (-1, number)).flatten(1, 2)
        pooled = pool(frames.pooled.unflatten(0, (-1, number)))
        return Features(tokens, pooled, (number, *frames.grid), valid)

    @staticmethod
    def _frames(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Clips (B, C, T, H, W) and columns (B, W) -> frames (B·T, C, H, W) and theirs (B·T, W)."""
        frames = x.transpose(1, 2).flatten(0, 1)
        return frames, None if valid is None else valid.repeat_interleave(x.shape[2], dim=0)

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Clips -> tokens (B, T·h·w, width + 1), frame by frame, the last channel the number of the frame."""
        number = x.shape[2]
        if hidden is not None:
            hidden = hidden.unflatten(1, (number, -1)).flatten(0, 1)
        tokens = self.frame.embed(self._frames(x, None)[0], hidden, mask_token).unflatten(0, (-1, number))
        index = torch.arange(number, device=x.device, dtype=tokens.dtype)[:, None, None]
        tokens = torch.cat([tokens, index.expand(*tokens.shape[:3], 1)], dim=3)
        return tokens.flatten(1, 2)

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        """Any subset of the tokens of `embed`; a frame of which none is left does not count in the pooled vector."""
        frame = tokens[:, :, -1].detach().long()
        tokens = tokens[:, :, :-1]
        kept = torch.ones_like(frame, dtype=torch.bool) if valid is None else valid
        # As many slots a frame as the fullest has; a token's slot is how many of its frame came before it.
        number = int(frame.amax()) + 1
        same = F.one_hot(frame, number)
        slot = (same.cumsum(dim=1) - 1).gather(2, frame[:, :, None])[:, :, 0]
        slots = int(slot.amax()) + 1
        place = frame * slots + slot
        packed = tokens.new_zeros(len(tokens), number * slots, tokens.shape[2])
        packed = packed.scatter(1, place[:, :, None].expand_as(tokens), tokens)
        there = torch.zeros_like(packed[:, :, 0], dtype=torch.bool).scatter(1, place, kept)
        full = packed.shape[1] == tokens.shape[1] and valid is None
        features = self.frame.encode(
            packed.unflatten(1, (number, slots)).flatten(0, 1),
            None if full else there.unflatten(1, (number, slots)).flatten(0, 1),
        )
        back = features.tokens.unflatten(0, (-1, number)).flatten(1, 2)
        seen = attendable(there.unflatten(1, (number, slots)).any(dim=2))
        pooled = self._clip(features.pooled.unflatten(0, (-1, number)), None if full else seen)
        return Features(back.gather(1, place[:, :, None].expand(-1, -1, back.shape[2])), pooled, (), valid)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Clips -> Features; see the base class."""
        return self._over_time(self.frame(*self._frames(x, valid)), x.shape[2], self._clip)

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """Depths are those of the network of pictures, then those of the transformer over time; see the base class."""
        number = x.shape[2]
        last, shallow = self.frame.forward_layers(*self._frames(x, valid))
        depths = {name: self._over_time(value, number, self._pool) for name, value in shallow.items()}
        if isinstance(self.temporal, TemporalTransformer):
            later = self.temporal.depths(last.pooled.unflatten(0, (-1, number)))
            depths |= {f"temporal.{name}": at_depth(value, (number, 1, 1)) for name, value in later.items()}
        return self._over_time(last, number, self._clip), depths

    def export(self, directory: Path, preprocessing: Mapping[str, Any]) -> None:
        """The network of pictures alone, as its library writes it."""
        self.frame.export(directory, preprocessing)
