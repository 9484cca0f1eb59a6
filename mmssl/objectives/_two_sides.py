"""What tasks have in common that compare the two sides of a pair."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.modules.side import both_sides
from mmssl.modules.views import Crop
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws


class TwoSides(Objective):
    """A pair of encoders.

    Args:
        encoders: holds both.
        a: name of the first.
        b: name of the second.
        crop: of images.

    Attributes:
        sides: `a` and `b` -> the side of the pair.
        accuracies: names of the accuracies of retrieval from a to b and from b to a.
    """

    def __init__(self, encoders: Mapping[str, Encoder], a: str, b: str, crop: Crop) -> None:
        super().__init__(encoders)
        self.a, self.b = a, b
        self.sides = both_sides(a, b, self.encoder, crop)
        self.needs = tuple(dict.fromkeys(side.modality for side in self.sides.values()))
        self.accuracies = f"accuracy_{a}_to_{b}", f"accuracy_{b}_to_{a}"

    def read(self, batch: Batch, draws: Draws) -> Batch:
        """Both sides, images cropped: `a`, `b`, and which of them is valid; see `Side`."""
        return self.sides["a"].read(batch, draws) | self.sides["b"].read(batch, draws)

    def embed(self, key: str, features: Features) -> Tensor:
        """What the encoder of side `a` or `b` makes of it -> unit vectors (B, width), by `project_a` or `project_b`."""
        return F.normalize(self.get_submodule(f"project_{key}")(features.pooled), dim=-1)
