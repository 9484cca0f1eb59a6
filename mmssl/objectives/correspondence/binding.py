"""Binding: which picture does this sound, this text or this clip belong to, all of them in one space?

Girdhar et al. 2023, "ImageBind: One Embedding Space To Bind Them All", arXiv 2305.05665. One modality is the anchor,
and each of the others is paired with it alone, by the symmetric cross-entropy of CLIP at a fixed temperature. Two of
the others then meet in the space without a single pair of them: sounds are found by texts. The rows may hold all
modalities, or each pair comes from a data source of its own, as in the paper. There the anchor is a frozen CLIP, whose
text tower is in its space already: `frozen: true` of both encoders, `width: null`, `bound: [text]`.

Known traps. One projection of the anchor serves all pairs: with one for each pair there are as many spaces. Two of the
others meet only in what the anchor has in common with both: what sound and text share and no picture shows is not
bound. A temperature that is learned is none to share; the published audio tower has 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch, sub_batch
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import RecipeError
from mmssl.modules.side import Side
from mmssl.modules.views import Crop
from mmssl.objectives.base import Chance, Objective, Pair, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.pairs import info_nce
from mmssl.ranges import Temperature, Width

VIEWS = {"area": (0.9, 1.0)}


class Binding(Objective):
    """Match each of several modalities with the anchor, among all rows of the global batch.

    Args:
        encoders: holds all of them.
        others: names of the encoders that are paired with the anchor; or name -> data source of that pair.
        anchor: name of the encoder that all are paired with.
        bound: names of frozen encoders that are in the anchor's own space already, such as the text tower of the same
            CLIP: they are compared with the others, and read nothing in training.
        width: of the shared space, into which each encoder has a linear map; None for the anchor's own, into which only
            encoders of another width are mapped.
        temperature: divides the cosine.
        views: of images and clips: how they are cropped, see `Crop`.
    """

    meets = "loss"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        others: list[str] | dict[str, str],
        anchor: str = "image",
        bound: Sequence[str] = (),
        width: Width | None = 512,
        temperature: Temperature = 0.05,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders)
        if not others or anchor in others or len(set(others)) < len(others):
            raise RecipeError(
                f"binding: others = {list(others)} should name one encoder or more besides the anchor '{anchor}', each "
                "once"
            )
        self.anchor, self.temperature = anchor, temperature
        self.sources = dict(others) if isinstance(others, dict) else dict.fromkeys(others, "")
        crop = Crop.of(VIEWS, views)
        self.sides: dict[str, list[Side]] = {}
        for name, source in self.sources.items():
            if source not in self.sides:
                self.sides[source] = [Side(self._key(source), anchor, self.encoder(anchor), crop)]
            self.sides[source].append(Side(name, name, self.encoder(name), crop))
        self.needs = tuple(
            f"{source}/{side.modality}" if source else side.modality
            for source, sides in self.sides.items()
            for side in sides
        )
        space = self.encoder(anchor).dim if width is None else width
        for name in bound:
            if width is not None or name in (anchor, *others) or not self.encoder(name).frozen:
                raise RecipeError(
                    f"binding: '{name}' is in the anchor's space already only where neither is trained or mapped into "
                    "another: it should be frozen (frozen: true) and none of the others, with width: null"
                )
            if self.encoder(name).dim != space:
                raise RecipeError(f"binding: '{name}' has width {self.encoder(name).dim}, and the anchor {space}")
        self.names = (anchor, *others, *bound)
        for name in self.names:
            own = self.encoder(name).dim
            bare = width is None and own == space
            self.add_module(f"project_{name}", nn.Identity() if bare else nn.Linear(own, space, bias=False))

    def _key(self, source: str) -> str:
        """Of the anchor's side of a source."""
        return f"{source}/{self.anchor}" if source else self.anchor

    def _accuracies(self, other: str) -> tuple[str, str]:
        return f"accuracy_{self.anchor}_to_{other}", f"accuracy_{other}_to_{self.anchor}"

    def chance(self, rows: int) -> Chance:
        """One row among B, for each of the others."""
        names = [name for other in self.sources for name in self._accuracies(other)]
        return Chance(len(self.sources) * math.log(rows), dict.fromkeys(names, 1 / rows))

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Of each encoder what it reads, under its name, the anchor's under `source/name` where there are several.

        With `_valid` at the end of its name what of it is no padding; see `Side`.
        """
        inputs: Batch = {}
        for source, sides in self.sides.items():
            rows = sub_batch(batch, source) if source else batch
            for side in sides:
                inputs |= side.read(rows, draws)
        return inputs

    def embed(self, name: str, features: Features) -> Tensor:
        """What the encoder of that name makes of its rows -> unit vectors (B, width) in the shared space."""
        return F.normalize(self.get_submodule(f"project_{name}")(features.pooled), dim=-1)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Each two encoders, also those that were never trained together."""
        found = []
        for a, b in combinations(self.names, 2):
            maps = self.get_submodule(f"project_{a}"), self.get_submodule(f"project_{b}")
            linear = all(isinstance(one, nn.Linear) for one in maps)
            project = cast(tuple[nn.Linear, nn.Linear], maps) if linear else None
            found.append(Pair(a, b, embed=(partial(self.embed, a), partial(self.embed, b)), project=project))
        return tuple(found)

    def predict(self, inputs: Batch) -> Batch:
        """Unit vectors (B, width) of each entry of the inputs."""
        sides = [side for group in self.sides.values() for side in group]
        return {side.key: self.embed(side.name, side.features(inputs)) for side in sides}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The sum of the cross-entropies of all pairs, and retrieval accuracy in both directions of each."""
        losses: list[Tensor] = []
        logs: dict[str, Tensor] = {}
        for other, source in self.sources.items():
            anchors = outputs[self._key(source)]
            scale = anchors.new_full((), 1 / self.temperature)
            loss, *accuracies = info_nce(anchors, outputs[other], scale)
            losses.append(loss)
            logs |= dict(zip(self._accuracies(other), accuracies, strict=True))
        return {"loss": torch.stack(losses).sum(), **logs}

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Of each source the anchor, each of the others, and which of them is the nearest among the rows shown."""
        panels = []
        for source, (first, *others) in self.sides.items():
            panels.append(Panel(first.key, first.cells(inputs), scale=first.scale(inputs)))
            for side in others:
                cells, scale = side.cells(inputs), side.scale(inputs)
                nearest = (outputs[self._key(source)] @ outputs[side.key].T).argmax(1).tolist()
                right = [
                    i == row or (isinstance(cells[i], str) and cells[i] == cells[row]) for row, i in enumerate(nearest)
                ]
                panels.append(Panel(side.name, cells, scale=scale))
                panels.append(Panel(f"nearest {side.name}", [cells[i] for i in nearest], right, scale))
        return panels
