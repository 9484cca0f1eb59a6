"""The small networks of an audit, one a modality, that stand in for a recipe's own.

An audit asks whether a task can be answered at all, of many kinds of data, on a processor: a network that sees local
statistics, and roughly where and when they are, is enough for every artifact that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from mmssl.encoders import create as create_encoder
from mmssl.encoders.base import Encoder, Features, masked_mean
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.objectives import create
from mmssl.objectives.base import Objective
from mmssl.recipe import Recipe

FUSION = "transformers/bert"
SMALL_FUSION: dict[str, Any] = {
    **{"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "initializer_range": 0.1,
}


class SmallNetwork(Encoder):
    """Three convolutions of stride 2, averaged over quarters of the picture: local statistics, and roughly where."""

    modality = "image"

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, kernel, stride=2, padding=kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()
                )
                for a, b, kernel in zip(widths, widths[1:], (5, 3, 3), strict=False)
            )
        )
        self.convolutions.to(memory_format=torch.channels_last)  # a third faster on a CPU
        self.dim = 4 * widths[-1]

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Maps of an eighth of the size, each place four times to be as wide as the quarters; see `Encoder`."""
        x = x / 255 if x.dtype == torch.uint8 else x
        maps = self.convolutions((4 * (x - 0.5)).contiguous(memory_format=torch.channels_last))
        pooled = F.adaptive_avg_pool2d(maps, 2).flatten(1)
        return Features(maps.flatten(2).mT.repeat(1, 1, 4), pooled, tuple(maps.shape[-2:]))


class SmallClipNetwork(Encoder):
    """`SmallNetwork` on every frame: what it sees, what has changed since the first frame, and how much at each step.

    A token a frame, grid (T, 1, 1); pooled over time.
    """

    modality = "video"

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.frame = SmallNetwork(width)
        self.dim = 3 * self.frame.dim

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Clips (B, T, 3, H, W), as for `VideoEncoder`."""
        seen = self.frame(x.flatten(0, 1)).pooled.unflatten(0, x.shape[:2])
        since, step = seen - seen[:, :1], seen.diff(dim=1, prepend=seen[:, :1]).abs()
        pooled = torch.cat([seen.mean(1), since[:, -1], step.mean(1)], 1)
        return Features(torch.cat([seen, since, step], 2), pooled, (x.shape[1], 1, 1))


class SmallSoundNetwork(Encoder):
    """Two convolutions over time on log-mel bands; grid (1, T).

    Args:
        rate: of sounds, in Hz.
        width: of a token.
    """

    modality = "audio"

    def __init__(self, rate: int, width: int = 64) -> None:
        super().__init__()
        self.rate, self.dim = rate, width
        self.mel = MelSpectrogram(rate, n_fft=512, hop_length=max(1, rate // 100), n_mels=32)
        self.convolutions = nn.Sequential(
            *(nn.Conv1d(32, width, 5, 2, 2, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Conv1d(width, width, 3, 2, 1, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """Waveforms (B, S), as for `AudioEncoder`."""
        over_time = self.convolutions((self.mel(x) + 1e-6).log() / 4)
        return Features(over_time.mT, over_time.mean(2), (1, over_time.shape[2]))


class SmallTextNetwork(Encoder):
    """Bags of words, lengths and border words of the two parts of a pair, through one hidden layer.

    Its first token says all of that; the others repeat it.

    Args:
        tokenizer: of the recipe's own encoder.
        width: of an embedding.
    """

    modality = "text"
    embeds_segments = True

    def __init__(self, tokenizer: Tokenizer, width: int = 32) -> None:
        super().__init__()
        self.tokenizer, self.dim = tokenizer, 2 * width
        self.embedding = nn.Embedding(tokenizer.vocab_size, width)
        self.hidden = nn.Sequential(nn.Linear(6 * width + 2, self.dim), nn.ReLU(), nn.LayerNorm(self.dim))

    @property
    def token_embedding(self) -> Tensor:
        """Weight (V, D_in) of the input embedding."""
        return self.embedding.weight

    def forward(self, x: Tensor, valid: Tensor | None = None, segments: Tensor | None = None) -> Features:
        """Ids int64 (B, L), `valid` and `segments` as for `TextEncoder` -> Features, grid (L,)."""
        valid = torch.ones_like(x, dtype=torch.bool) if valid is None else valid
        second = torch.zeros_like(valid) if segments is None else segments > 0
        words, parts = self.embedding(x), []
        for part in (valid & ~second, valid & second):
            place = torch.arange(x.shape[1], device=x.device)
            first = torch.where(part, place, x.shape[1] - 1).amin(1)
            last = torch.where(part, place, 0).amax(1)
            # The special token at an end is the same in all texts; what is next to it is a word.
            borders = [words.gather(1, at[:, None, None].expand(-1, 1, words.shape[2]))[:, 0] for at in (first, last)]
            length = part.sum(1, keepdim=True).to(words.dtype) / 16
            parts += [masked_mean(words, part), *borders, length]
        pooled = self.hidden(torch.cat(parts, 1))
        return Features(pooled[:, None].expand(-1, x.shape[1], -1), pooled, (x.shape[1],), valid)


def stand_in(
    recipe: Recipe,
    tokenizers: Mapping[str, Tokenizer] | None = None,
    seed: int = 0,
    hearing: Callable[[int], Encoder] = SmallSoundNetwork,
) -> Objective:
    """The recipe's task over small networks, with fresh weights.

    Args:
        recipe: of one source.
        tokenizers: name of a text encoder -> its own, for a task that reads texts.
        seed: of the weights.
        hearing: sample rate in Hz -> the network of sounds.

    Raises:
        RecipeError: for several sources, and where the task needs an encoder of another kind.
    """
    if len(recipe.sources()) > 1:
        raise RecipeError("rows without structure stand for one source, and this recipe has several")
    torch.manual_seed(seed)
    rate = next(iter(recipe.sources().values())).audio.rate
    networks: dict[str, Encoder] = {}
    # A fusion is told the widths of what it reads.
    for name, given in sorted(recipe.encoders.items(), key=lambda item: item[1].get("modality", item[0]) == "fusion"):
        match given.get("modality", name):
            case "image":
                networks[name] = SmallNetwork()
            case "video":
                networks[name] = SmallClipNetwork()
            case "audio":
                networks[name] = hearing(rate)
            case "text" if tokenizers and name in tokenizers:
                networks[name] = SmallTextNetwork(tokenizers[name])
            case "fusion" if given["model"] == FUSION:
                read = {one: networks[one].dim for one in given.get("reads", networks)}
                networks[name] = create_encoder(FUSION, "fusion", reads=read, **SMALL_FUSION)
            case other:
                raise RecipeError(f"no small network stands in for {given['model']}, which reads {other}")
    hyper = {key: value for key, value in recipe.objective.items() if key != "name"}
    return create(recipe.objective["name"], networks, **hyper)
