"""What tasks have in common that look for the key of a query in a queue: MoCo v2, and what is built on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.modules.views import Given
from mmssl.objectives.invariance._two_views import TwoViews
from mmssl.ops.draws import Draws
from mmssl.ops.gather import gather, own_rows, process_share
from mmssl.ops.losses import found

Read = Callable[[Features], Tensor]


class ShuffledKeys(TwoViews):
    """The first view asks, and a copy of the encoder makes keys of the second, in other groups of rows.

    Rows that share BatchNorm statistics with a query are not those that share them with its key: see `moco`.

    Args:
        encoders: holds the encoder.
        encoder: its name.
        views: what the recipe says of the views.
        groups: of rows that share BatchNorm statistics, over all processes; None where these are synchronized.
        **published: as of `TwoViews`.
    """

    compared = "q"
    meets = "loss"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        encoder: str,
        views: Given,
        groups: int | None,
        **published: Sequence[Mapping[str, Any]],
    ) -> None:
        super().__init__(encoders, encoder, views, **published)
        self.local_norms = groups is not None
        normed = any(isinstance(module, _BatchNorm) for module in self.encoder(encoder).modules())
        self.groups = groups if groups is not None and normed else 1

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Both views; with groups, `place` (B,) in [0, 1) too: what the keys are ordered by."""
        inputs = super().transform(batch, draws)
        return inputs if self.groups == 1 else inputs | {"place": draws.uniform()}

    def query_and_key(self, inputs: Batch, copied: nn.Module, read: Read) -> tuple[Tensor, Tensor]:
        """What `read` takes of the encoder's Features of the first views, and of the copy's of the second, no gradient.

        Args:
            inputs: of `transform`.
            copied: the copy.
            read: Features -> (B, ...).
        """
        first, second = ([inputs[key][:, i] for key in ("views", "valid") if key in inputs] for i in range(2))
        query = self._in_groups(self.encoder(self.name), first, read)
        with torch.no_grad():
            return query, self._shuffled(copied, second, inputs.get("place"), read)

    def _in_groups(self, encoder: nn.Module, views: list[Tensor], read: Read) -> Tensor:
        """Of views (B, ...), in training one pass a group of neighboring rows."""
        rows = len(views[0])
        groups = min(self.groups // process_share()[1], rows // 2) if self.training else 1
        parts = zip(*(torch.tensor_split(part, max(1, groups)) for part in views), strict=True)
        return torch.cat([read(encoder(*part)) for part in parts])

    def _shuffled(self, copied: nn.Module, views: list[Tensor], place: Tensor | None, read: Read) -> Tensor:
        """`_in_groups`, of rows of the global batch in the order of `place`; each back where it was."""
        if place is None or not self.training:
            return self._in_groups(copied, views, read)
        own = own_rows(len(place), place.device)
        order = gather(place).argsort(stable=True)
        found = gather(self._in_groups(copied, [gather(part)[order[own]] for part in views], read))
        return found[order.argsort()[own]]


def found_among(positive: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries whose own key is the first of many.

    Args:
        positive: cosine of each query with its key, (N,).
        negatives: with each vector in the queue, (N, K).

    Returns:
        logits (N, 1 + K), target int64 (N,), all 0, and `found` of these.
    """
    logits = torch.cat([positive[:, None], negatives], dim=1)
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return logits, target, found(logits, target)
