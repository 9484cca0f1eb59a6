"""One side of a pair: the encoder that reads it, what of a batch that is, and how a preview shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features, Scale
from mmssl.encoders.fusion import FusionEncoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop
from mmssl.modules.vocabulary import decode_rows
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws

SIDES = ("a", "b")


class Side:
    """One side of a pair.

    The inputs of a task hold it under its key, `a` or `b`, and `a_valid` or `b_valid`, False for padding, where the
    batch has a mask.

    Args:
        key: `a` or `b`.
        name: of the encoder.
        encoder: the network, whose parameters are the task's.
        crop: of images and clips.
    """

    def __init__(self, key: str, name: str, encoder: Encoder, crop: Crop) -> None:
        self.key, self.name, self.encoder, self.crop = key, name, encoder, crop
        self.modality = encoder.modality

    def read(self, batch: Batch, draws: Draws) -> Batch:
        """What the encoder reads, images and clips cropped, and what of it is valid."""
        x = batch[self.modality]
        if self.modality in ("image", "video"):
            x = self.crop(x, draws, batch.get(f"{self.modality}_aspect"))
        return self.entries(x, batch.get(f"{self.modality}_mask"))

    def entries(self, x: Tensor, valid: Tensor | None) -> Batch:
        """Both under their keys."""
        return {self.key: x} | ({} if valid is None else {f"{self.key}_valid": valid})

    def features(self, inputs: Batch) -> Features:
        """What the encoder makes of it."""
        features: Features = self.encoder(inputs[self.key], inputs.get(f"{self.key}_valid"))
        return features

    def valid(self, inputs: Batch) -> Tensor:
        """Bool like the side's inputs, False for padding."""
        return inputs.get(f"{self.key}_valid", torch.ones_like(inputs[self.key], dtype=torch.bool))

    def cells(self, inputs: Batch) -> list[Tensor | str]:
        """One a row for a preview: pictures in [0, 1], sounds, or lines of text."""
        if self.modality == "text":
            tokenizer = cast(TextEncoder, self.encoder).tokenizer
            return [*decode_rows(tokenizer, inputs[self.key], self.valid(inputs))]
        return list(as_floats(inputs[self.key]) if self.modality in ("image", "video") else inputs[self.key])

    def scale(self, inputs: Batch) -> Scale | None:
        """What the axes of the cells measure."""
        return self.encoder.scale(inputs[self.key][0])


def both_sides(a: str, b: str, encoder: Callable[[str], Encoder], crop: Crop) -> dict[str, Side]:
    """The sides `a` and `b`: the encoders of these names."""
    return {key: Side(key, name, encoder(name), crop) for key, name in zip(SIDES, (a, b), strict=True)}


def find_fusion(task: str, name: str, fusion: Encoder, a: str | None, b: str | None) -> FusionEncoder:
    """The encoder called `name` as a fusion of the encoders `a` and `b`, either of which may be None.

    Raises:
        RecipeError: where it is none, or reads others.
    """
    if not isinstance(fusion, FusionEncoder):
        raise RecipeError(
            f"{task}: fusion = '{name}' reads {fusion.modality}; it should be an encoder "
            f"{{modality: fusion, model: transformers/bert, reads: [{a}, {b}]}}"
        )
    if any(own not in (None, read) for own, read in zip((a, b), fusion.reads, strict=True)):
        raise RecipeError(f"{task}: a = {a} and b = {b}, and the fusion '{name}' reads {' and '.join(fusion.reads)}")
    return fusion
