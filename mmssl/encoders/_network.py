"""What all encoders around one network share: it says what they are, and they say how raw input becomes its own."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmssl.encoders.backbones._files import write_json
from mmssl.encoders.backbones.base import Backbone
from mmssl.encoders.base import Encoder, Features, Input
from mmssl.errors import DataError
from mmssl.recipe import Data
from mmssl.schema import fill


class NetworkEncoder(Encoder):
    """Raw input, prepared, through one network.

    Args:
        backbone: the network.

    Attributes:
        shapes: of the tensors that it takes, by their number of dimensions.
    """

    shapes: ClassVar[dict[int, str]]

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.dim, self.width = backbone.dim, backbone.width
        self.subsets, self.patch_size = backbone.subsets, backbone.patch_size

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Raw input -> what the network reads, and which of its last axis is no padding; see `Backbone.forward`."""
        return x, valid

    @property
    def _takes(self) -> str:
        return " or ".join(self.shapes.values())

    def checked(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What `prepare` returns, of a tensor that has one of `shapes`.

        Raises:
            DataError: for another tensor, such as one picture (H, W, 3).
        """
        # A picture of one channel is spread over all of them by the normalization.
        planes = {1, self.backbone.channels} if self.modality in ("image", "video") else None
        if x.ndim not in self.shapes or (planes and x.shape[-3] not in planes):
            raise DataError(
                f"{self.spec['model']} takes tensors {self._takes}, and this one is {tuple(x.shape)}: "
                "encoder(encoder.read(things)) takes pictures, arrays, paths, texts and lists of them"
            )
        return self.prepare(x, valid)

    def read(self, things: Any, **settings: Any) -> Input:
        """See the base class."""
        data = self.reading()
        section = getattr(data, self.modality)
        where = f"{self.spec['model']}: read"
        changed = fill(type(section), section.model_dump() | settings, where)
        data = data.model_copy(update={self.modality: changed})
        cells = list(things) if _are_several(things) else [things]
        rows = []
        for number, cell in enumerate(cells):
            try:
                if isinstance(cell, Tensor):
                    raise DataError(f"tensors go to the encoder itself, encoder(x), as {self._takes}; read takes none")
                rows.append(self.decode_one(cell, data))
            except DataError as error:
                raise DataError(f"{where}: {f'number {number}: ' if len(cells) > 1 else ''}{error}") from error
        if not rows:
            raise DataError(f"{where}: there is nothing to read")
        x, valid = zip(*rows, strict=True)
        device = next(self.parameters()).device
        padded = any(part is not None for part in valid)
        return Input(torch.stack(x).to(device), torch.stack(valid).to(device) if padded else None)

    def reading(self) -> Data:
        """See the base class."""
        return self.decoding or Data.model_validate({"source": "files", self.modality: self.built_for()})

    def built_for(self) -> dict[str, Any]:
        """The decode settings that its network asks for, where no run says others."""
        return {}

    @staticmethod
    def window(data: Data) -> float:
        """Which part of a longer sound or clip is read, in [0, 1): as a probe does, so that two readings agree."""
        return 0.0 if data.start == "first" else 0.5

    def decode_one(self, cell: Any, data: Data) -> tuple[Tensor, Tensor | None]:
        """One thing as a row of what the encoder takes, and which of it is no padding; see `read`."""
        raise TypeError(f"{type(self).__name__} reads no files")

    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the pictures that the network reads, as its run decodes them."""
        size = getattr(getattr(self.reading(), self.modality), "size", self.backbone.size)
        return self.backbone.channels, size, size

    def preprocessing(self) -> dict[str, Any]:
        """What somebody has to know who uses the exported network without mmssl; JSON."""
        return {}

    def normalization(self) -> dict[str, list[float]]:
        """`mean` and `std`, one value a channel, that the network's library is to apply to what it reads."""
        return {"mean": [0.0] * self.backbone.channels, "std": [1.0] * self.backbone.channels}

    def embed(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """See the base class; places are in rows, from the lowest band of a sound and the first frame of a clip."""
        if self.width is None and not self.subsets:
            return super().embed(x, hidden, mask_token)
        return self.backbone.embed(self.checked(x)[0], hidden, mask_token)

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Features:
        """See the base class."""
        return self.backbone.encode(tokens, valid)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        """See the base class."""
        features: Features = self.backbone(*self.checked(x, valid))
        return features

    def layers(self, x: Tensor, valid: Tensor | None = None) -> dict[str, Features]:
        """See the base class."""
        return self.forward_layers(x, valid)[1]

    def forward_layers(self, x: Tensor, valid: Tensor | None = None) -> tuple[Features, dict[str, Features]]:
        """See the base class."""
        return self.backbone.forward_layers(*self.checked(x, valid))

    def attention(self, x: Tensor, valid: Tensor | None = None) -> Tensor | None:
        """See the base class."""
        return self.backbone.attention(*self.checked(x, valid))

    def export(self, directory: Path) -> None:
        """Write the network's native files, and `preprocessing.json` in the same directory; see the base class."""
        directory = Path(directory)
        preprocessing = {"modality": self.modality, "model": self.spec["model"], **self.preprocessing()}
        if self.decoding is not None:
            preprocessing["decoding"] = getattr(self.decoding, self.modality).model_dump(mode="json", exclude_none=True)
        preprocessing["origin"] = dict(self.origin)
        about = {"origin": self.origin, "input_size": self.input_size(), "decoding": preprocessing.get("decoding", {})}
        self.backbone.export(directory, {**self.preprocessing(), **self.normalization(), **about})
        write_json(directory / "preprocessing.json", preprocessing)


def _are_several(things: Any) -> bool:
    """Whether these are things to read one by one; `(array, rate)` is one sound."""
    sound = isinstance(things, tuple) and len(things) == 2 and isinstance(things[1], Real)
    return isinstance(things, list | tuple | Iterator) and not sound
