"""A task whose right answers can be told: pictures of one color, texts that name it, networks that only average."""

from __future__ import annotations

import datasets
import torch
from torch import Tensor, nn

from mmssl.encoders.base import Encoder, Features
from mmssl.media.text import Tokenizer
from mmssl.objectives.base import Objective, Pair

COLORS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]])
NAMES = ("red", "green", "blue", "yellow", "cyan", "magenta")
LENGTH = 8
TOKENIZER = Tokenizer.train([f"a drawing of {name} paint." for name in NAMES] * 4, 300)


class Eye(Encoder):
    modality, dim = "image", 3

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        self.calls += len(x)
        pooled = x.flatten(2).float().mean(2) * self.one / 255
        return Features(pooled[:, None], pooled, (1,))


class Reader(Encoder):
    modality, dim, tokenizer = "text", 3, TOKENIZER

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENIZER.vocab_size, 3)
        self.table.weight.data.zero_()
        for name, color in zip(NAMES, COLORS, strict=True):
            ids, mask = TOKENIZER(name, LENGTH)
            (word,) = [int(i) for i in ids[mask] if int(i) not in TOKENIZER.special_ids]
            self.table.weight.data[word] = color / 255
        self.calls = 0

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        assert valid is not None
        self.calls += len(x)
        pooled = (self.table(x) * valid[..., None]).sum(1)
        return Features(pooled[:, None], pooled, (1,), valid[:, :1])


class Colors(Objective):
    """Compares by color; `match` sees the opposite order where `contrary`."""

    def __init__(self, embeds: bool = True, matches: bool = False, contrary: bool = False) -> None:
        super().__init__({"image": Eye(), "text": Reader()})
        self.embeds, self.matches, self.sign = embeds, matches, -1.0 if contrary else 1.0
        self.matched = 0

    def vector(self, features: Features) -> Tensor:
        return nn.functional.normalize(features.pooled - 0.5, dim=-1)

    def match(self, a: Features, b: Features) -> Tensor:
        assert not self.training
        self.matched += len(a.pooled)
        return self.sign * (self.vector(a) * self.vector(b)).sum(1)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        embed = (self.vector, self.vector) if self.embeds else None
        return (Pair("image", "text", embed, self.match if self.matches else None),)


def picture(color: int, size: int = 4) -> Tensor:
    return COLORS[color].to(torch.uint8)[:, None, None].expand(3, size, size).contiguous()


def rows(pairs: list[tuple[int, str]], **more: list) -> list[dict[str, Tensor]]:
    """Batches of three rows: the color of the picture, and the text."""
    texts = [TOKENIZER(text, LENGTH) for _, text in pairs]
    whole = {
        "image": torch.stack([picture(color) for color, _ in pairs]),
        "text": torch.stack([ids for ids, _ in texts]),
        "text_mask": torch.stack([mask for _, mask in texts]),
        "id": torch.arange(len(pairs)),
        **{key: torch.tensor(value) for key, value in more.items()},
    }
    return [{key: value[i : i + 3] for key, value in whole.items()} for i in range(0, len(pairs), 3)]


def table(pairs: list[tuple[int, str]], **more: list) -> datasets.Dataset:
    """The same as a data set with undecoded pictures."""
    from PIL import Image

    pictures = [Image.fromarray(picture(color).permute(1, 2, 0).numpy()) for color, _ in pairs]
    columns = {"image": pictures, "text": [text for _, text in pairs], **more}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
