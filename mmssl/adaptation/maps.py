"""Feature maps: what an encoder says at each place of a picture, row by row.

Maps of all rows are large (10,000 rows of 14 x 14 places and 384 channels take 3 GB), so they are kept only where they
fit, and otherwise computed anew, batch by batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mmssl.adaptation.features import inputs_of
from mmssl.adaptation.probes.base import RawRows
from mmssl.adaptation.rows import Split, in_order
from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import DataError, RecipeError, nearest
from mmssl.modules.mode import evaluating

KEPT_BYTES = 2**30
"""Most bytes of maps that are kept, of all encoders together."""


def maps_of(encoder: Encoder, batch: Mapping[str, Tensor], depths: Sequence[str]) -> dict[str, Tensor]:
    """Depth -> map (B, D, h, w), with the encoder's mode and gradient as they are.

    Args:
        encoder: of pictures.
        batch: with its key, on any device.
        depths: names of `Encoder.layers`.

    Raises:
        RecipeError: for a depth that is not there.
    """
    key, _ = inputs_of(encoder)
    layers = encoder.layers(batch[key].to(next(encoder.parameters()).device))
    _need(depths, layers)
    return {depth: as_map(layers[depth]) for depth in depths}


def as_map(features: Features) -> Tensor:
    """Tokens (B, h * w, D) in their places, (B, D, h, w)."""
    return features.tokens.transpose(1, 2).unflatten(2, features.grid)


def resolutions(layers: Mapping[str, Features], most: float = math.inf) -> list[str]:
    """The deepest of the depths of each resolution, shallow to deep.

    Of a plain transformer that is the last block alone, of a convolutional network the end of each stage.

    Args:
        layers: of `Encoder.layers`.
        most: places in a row; finer depths are left out, unless all are.

    Raises:
        RecipeError: where tokens have no places in the picture.
    """
    deepest: dict[tuple[int, ...], str] = {}
    for name, features in layers.items():
        if len(features.grid) != 2:
            raise RecipeError(f"depth '{name}' has tokens of a grid {features.grid}, and maps take two dimensions")
        deepest.pop(features.grid, None)
        deepest[features.grid] = name
    coarse = [name for grid, name in deepest.items() if grid[-1] <= most]
    return coarse or list(deepest.values())[-1:]


def choose_depths(layers: Mapping[str, Features], named: Sequence[str], most: float) -> list[str]:
    """The depths of these names, or else `resolutions`; raises RecipeError for one that is not there."""
    usual = resolutions(layers, most)
    _need(named, layers)
    return list(named) or usual


def _need(depths: Sequence[str], layers: Mapping[str, Features]) -> None:
    for name in depths:
        if name not in layers:
            raise RecipeError(
                f"depths: there is no depth '{name}'{nearest(name, layers)}; there are {', '.join(layers)}"
            )


class MapRows(RawRows):
    """Rows as maps of one encoder, which stays as it is.

    Args:
        encoder: see `RawRows`.
        split: likewise.
        ids: likewise.
        depths: of which there are maps.
        kept: depth -> maps of some rows, (M, D, h, w); None where they are computed when they are read.
        places: of `ids` among the M, int64 (N,).
    """

    def __init__(
        self,
        encoder: Encoder,
        split: Split,
        ids: Tensor,
        depths: Sequence[str],
        kept: Mapping[str, Tensor] | None = None,
        places: Tensor | None = None,
    ) -> None:
        super().__init__(encoder, split, ids)
        self.depths, self.kept = tuple(depths), kept
        self.places = torch.arange(len(ids)) if places is None else places

    def __getitem__(self, index: Tensor) -> MapRows:
        return MapRows(self.encoder, self.split, self.ids[index], self.depths, self.kept, self.places[index])

    def read(self, picks: Iterable[Tensor]) -> Iterator[Batch]:
        """Batches with a map under the name of each depth, and `id`."""
        if self.kept is not None:
            for index in picks:
                own = self.places[index]
                yield {"id": self.ids[index], **{depth: self.kept[depth][own] for depth in self.depths}}
            return
        for batch in super().read(picks):
            with evaluating(self.encoder), torch.no_grad():
                yield {"id": batch["id"], **maps_of(self.encoder, batch, self.depths)}


def read_maps(
    encoders: Sequence[Encoder],
    split: Split,
    ids: Tensor,
    depths: Sequence[str] = (),
    *,
    layers: bool = False,
    keep: bool = True,
    finest: float = 0.0,
    batch_size: int = 256,
) -> tuple[list[dict[str, MapRows]], Tensor]:
    """Rows as each encoder sees them, in one pass: those of several depths together, and of each depth where asked for.

    Args:
        encoders: of one architecture.
        split: where the rows are.
        ids: their numbers, int64 (N,), ascending.
        depths: that are probed together; `resolutions` where left out.
        layers: every depth as well.
        keep: keep the maps, where they fit.
        finest: least distance of the places of those that are not named, in pixels.
        batch_size: rows that are encoded at a time.

    Returns:
        {"depth" or "depth+depth": rows} for each encoder, and the numbers of the rows that can be decoded.

    Raises:
        RecipeError: for a depth that is not there, or tokens that have no places.
        DataError: where no row can be decoded.
    """
    read: list[Tensor] = []
    groups: list[tuple[str, ...]] = []
    parts: list[dict[str, list[Tensor]]] = [{} for _ in encoders]
    with evaluating(*encoders), torch.no_grad():
        for batch in split.read(in_order(ids.numpy(), batch_size)):
            read.append(batch["id"])
            if not groups:
                key, _ = inputs_of(encoders[0])
                first = encoders[0].layers(batch[key][:1].to(next(encoders[0].parameters()).device))
                groups = [tuple(choose_depths(first, depths, batch[key].shape[-1] / max(finest, 1e-9)))]
                groups += [(name,) for name in first if layers and (name,) != groups[0]]
                wanted = list(dict.fromkeys(name for group in groups for name in group))
                row = sum(4 * first[name].tokens.numel() for name in wanted)
                keep = keep and row * len(ids) * len(encoders) <= KEPT_BYTES
            if keep:
                for encoder, lists in zip(encoders, parts, strict=True):
                    for depth, maps in maps_of(encoder, batch, wanted).items():
                        lists.setdefault(depth, []).append(maps.float().cpu())
    if not read:
        raise DataError(f"{split.where}: no row can be decoded")
    rows = torch.cat(read)
    found = []
    for encoder, lists in zip(encoders, parts, strict=True):
        kept = {depth: torch.cat(some) for depth, some in lists.items()} if keep else None
        found.append({"+".join(group): MapRows(encoder, split, rows, group, kept) for group in groups})
    return found, rows
