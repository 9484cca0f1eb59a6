"""How a recipe decodes rows of each modality: pictures, texts, sounds and clips to tensors of one size."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from mmssl.schema import Pixels, Positive, Section

MOST_CHANNEL = 255


class ImageDecode(Section):
    """How images are decoded.

    Attributes:
        size: side of the square, in pixels; the short side is resized to it and the center square is cut.
        fit: `pad` keeps the whole picture on a white square instead; `squeeze` resizes both sides to `size`, and random
            crops are cut from the whole picture in their right shape, as from the file. With 448 for crops of 224, 23 %
            of SimCLR's are enlarged where 27 % are when cut from ImageNet's files and 87 % from a `crop` of 256; it
            takes 3 x size^2 bytes a picture, 602 kB in place of 197 kB (a batch of 256: 154 MB in place of 50 MB).
        probe_size: side of what probes see of a picture, the center square; `size` where left out, and half of it with
            `squeeze`.
        extent: stored values that are black and white, for pictures of more than 8 bits a value, such as [0, 4095]
            where 12 bits are stored in 16; all values of the type where left out.
        alpha: what a fourth band is: transparency, shown on `white`, or something to `ignore`, such as infrared.
        max_pixels: pictures of more pixels count as undecodable.
    """

    size: Pixels = 64
    fit: Literal["crop", "pad", "squeeze"] = "crop"
    probe_size: Pixels | None = None
    extent: tuple[float, float] | None = None
    alpha: Literal["white", "ignore"] = "white"
    max_pixels: Positive = 2**26

    @field_validator("extent")
    @classmethod
    def _rises(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not (math.isfinite(value[1] - value[0]) and value[0] < value[1]):
            raise ValueError("should be two finite numbers, black first, such as [0, 4095]")
        return value

    @property
    def for_probes(self) -> ImageDecode:
        """How probes see pictures: whole, and in their right shape."""
        squeezed = self.fit == "squeeze"
        size = self.probe_size or (max(1, self.size // 2) if squeezed else self.size)
        return self.model_copy(update={"size": size, "fit": "crop" if squeezed else self.fit, "probe_size": None})


class TextDecode(Section):
    """How texts become rows of token ids.

    Attributes:
        length: number of ids in a row; longer texts are cut, shorter ones padded and masked.
        start: where in a longer text a row begins, anew at every reading: at its `first` word, at a `random` one, or
            at a random `sentence`, as tasks that compare sentences need it. Probes read from the beginning.
        pack: documents end to end in rows without padding, an end token after each; attention is not cut between them.
            Probes read them one by one.
    """

    length: Annotated[int, Field(ge=3, le=2**17)] = 64
    pack: bool = False
    start: Literal["first", "random", "sentence"] = "first"


def _named_or_number(value: Any) -> Any:
    if value in ("mean", "left", "right") or (type(value) is int and 0 <= value <= MOST_CHANNEL):
        return value
    raise ValueError(f"should be mean, left, right, or a number from 0 to {MOST_CHANNEL}")


class AudioDecode(Section):
    """Sample rate in Hz and window in seconds; shorter sounds are padded with silence and masked.

    `channel`: the `mean` of all, which is silence where two cancel each other, `left`, `right`, or a number from 0.
    """

    rate: Annotated[int, Field(gt=0, le=768_000)] = 16_000
    seconds: Annotated[float, Field(gt=0, le=3600)] = 2.0
    channel: Annotated[Literal["mean", "left", "right"] | int, BeforeValidator(_named_or_number)] = "mean"


class VideoDecode(Section):
    """Frame size in pixels, frame rate in 1/s and number of frames; the window is `frames / fps` seconds long."""

    size: Pixels = 64
    fps: Annotated[float, Field(gt=0, le=1000)] = 12.5
    frames: Annotated[int, Field(gt=0, le=2**14)] = 16
    fit: Literal["crop", "pad"] = "crop"
