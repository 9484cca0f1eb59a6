"""Which places of a sequence are hidden, and by what."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.ops.draws import Draws


def choose_places(candidates: Tensor, counts: Tensor, slots: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """A uniform choice without replacement of `counts` places among each row's candidates.

    Args:
        candidates: bool (B, L), places that may be chosen.
        counts: int64 (B,); a row with fewer candidates gives all it has.
        slots: M, at least the largest count.
        draws: source of randomness.

    Returns:
        int64 (B, M) places, the chosen ones first, and bool (B, M), True for those.
    """
    score = draws.uniform(candidates.shape[1]).masked_fill(~candidates, 2.0)
    places = score.argsort(dim=1, stable=True)[:, :slots]
    counts = counts.minimum(candidates.sum(1))
    return places, torch.arange(slots, device=counts.device) < counts[:, None]


def corrupt_tokens(
    tokens: Tensor,
    places: Tensor,
    chosen: Tensor,
    draws: Draws,
    *,
    mask_id: int,
    vocabulary: Tensor,
    masked: float = 0.8,
    replaced: float = 0.1,
) -> Tensor:
    """Chosen tokens become `mask_id`, a random token or stay as they are, each decided on its own.

    Args:
        tokens: int64 (B, L).
        places: int64 (B, M), distinct in each row.
        chosen: bool (B, M), which of the places count.
        draws: source of randomness.
        mask_id: id of the mask token.
        vocabulary: int64 (K,), ids that a random token is drawn from.
        masked: probability of `mask_id`.
        replaced: probability of a random token; the rest stays.

    Returns:
        int64 (B, L).
    """
    original = tokens.gather(1, places)
    dice = draws.uniform(places.shape[1])
    other = vocabulary[draws.integers(len(vocabulary), places.shape[1])]
    new = torch.where(dice < masked, mask_id, torch.where(dice < masked + replaced, other, original))
    return tokens.scatter(1, places, torch.where(chosen, new, original))
