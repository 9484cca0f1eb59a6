"""Which places of a sequence are hidden, and by what."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.ops.draws import Draws

MASKED, REPLACED, KEPT = 0.8, 0.1, 0.1  # what becomes of BERT's chosen tokens
SMALLEST_BLOCK = 16 / 196  # of BEiT's, as a share of the picture


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


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Those at places `index` (B, n) among tokens (B, N, D): (B, n, D)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def corrupt_tokens(
    tokens: Tensor,
    places: Tensor,
    chosen: Tensor,
    draws: Draws,
    *,
    mask_id: int,
    vocabulary: Tensor,
    masked: float = MASKED,
    replaced: float = REPLACED,
    together: Tensor | None = None,
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
        together: int64 (B, M), number below M of the group of a place, if those of a group share one decision.

    Returns:
        int64 (B, L).
    """
    original = tokens.gather(1, places)
    dice = draws.uniform(places.shape[1])
    if together is not None:
        dice = dice.gather(1, together)
    other = vocabulary[draws.integers(len(vocabulary), places.shape[1])]
    new = torch.where(dice < masked, mask_id, torch.where(dice < masked + replaced, other, original))
    return tokens.scatter(1, places, torch.where(chosen, new, original))


@torch.no_grad()
def draw_tokens(logits: Tensor, dice: Tensor) -> Tensor:
    """One token a place from softmax(logits), by inverting its distribution function: one number a place.

    ELECTRA's code adds Gumbel noise to every logit and takes the largest, which draws from the same distribution.

    Args:
        logits: (..., V).
        dice: (...), uniform in [0, 1).

    Returns:
        int64 (...). A token of probability 0 is never drawn.
    """
    below = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).cumsum(-1)
    level = dice.to(below.dtype)[..., None] * below[..., -1:]
    return torch.searchsorted(below, level, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


def mask_blocks(
    grid: tuple[int, int],
    total: int | Tensor,
    draws: Draws,
    *,
    smallest: int = 16,
    aspect: float = 0.3,
    tries: int = 10,
    proposals: int = 64,
) -> Tensor:
    """Rectangles of a grid until `total` places are hidden: block-wise masking of BEiT (arXiv 2106.08254, algorithm 1).

    The area of each is uniform between `smallest` and what is left, the log of its height / width between those of
    `aspect` and its inverse, its place among those inside the grid. One that hides more than is left, or nothing new,
    is drawn again; after `tries` in vain it is enough, so that some rows hide a few places less than `total`.

    Args:
        grid: height and width.
        total: places to hide at most, of all rows or int64 (B,) of each.
        draws: source of randomness.
        smallest: smallest area, in places.
        aspect: smallest height / width.
        tries: rectangles drawn in vain after which a row is done.
        proposals: rectangles drawn for a row at most.

    Returns:
        bool (B, h * w), True where hidden.
    """
    height, width = grid
    size, shape, top, left = (draws.uniform(proposals) for _ in range(4))
    ratio = ((2 * shape - 1) * -math.log(aspect)).exp()
    down, across = (torch.arange(n, device=size.device) for n in grid)
    hidden = torch.zeros(draws.rows, height, width, dtype=torch.bool, device=size.device)
    vain = torch.zeros(draws.rows, dtype=torch.long, device=size.device)
    for i in range(proposals):
        rest = total - hidden.sum((1, 2))
        area = smallest + size[:, i] * (rest - smallest)
        tall, wide = (area * ratio[:, i]).sqrt().round().long(), (area / ratio[:, i]).sqrt().round().long()
        first_row = (top[:, i] * (height - tall + 1)).long()
        first_column = (left[:, i] * (width - wide + 1)).long()
        rows = (down >= first_row[:, None]) & (down < (first_row + tall)[:, None])
        columns = (across >= first_column[:, None]) & (across < (first_column + wide)[:, None])
        block = rows[:, :, None] & columns[:, None, :] & ~hidden
        new = block.sum((1, 2))
        open_ = (rest > 0) & (vain < tries)
        taken = open_ & (tall < height) & (wide < width) & (new > 0) & (new <= rest)
        hidden |= block & taken[:, None, None]
        vain = torch.where(taken, 0, vain + 1)
    return hidden.flatten(1)


def draw_rectangles(
    grid: tuple[int, int], number: int, area: tuple[float, float], aspect: tuple[float, float], draws: Draws
) -> Tensor:
    """Rectangles of a grid, anywhere inside it: the blocks of I-JEPA (arXiv 2301.08243, section 3).

    Args:
        grid: height and width.
        number: M, of rectangles.
        area: smallest and largest, as shares of the grid; uniform between them.
        aspect: smallest and largest height / width; uniform between them.
        draws: source of randomness.

    Returns:
        bool (B, M, h * w), True inside. None is as high or wide as a grid of more than one place.
    """
    size, shape, top, left = (draws.uniform(number) for _ in range(4))
    places = (math.prod(grid) * (area[0] + size * (area[1] - area[0]))).floor()
    ratio = aspect[0] + shape * (aspect[1] - aspect[0])
    inside = []
    for extent, wanted, start in ((grid[0], places * ratio, top), (grid[1], places / ratio, left)):
        length = wanted.sqrt().round().clamp(1, max(1, extent - 1))
        first = (start * (extent - length + 1)).floor()
        along = torch.arange(extent, device=first.device)
        inside.append((along >= first[..., None]) & (along < (first + length)[..., None]))
    return (inside[0][..., :, None] & inside[1][..., None, :]).flatten(2)


def mask_spans(valid: Tensor, probability: float, length: int, draws: Draws) -> Tensor:
    """Spans of `length` places in a sequence, which may overlap: wav2vec 2.0's (arXiv 2006.11477, section 3.1).

    A row of n valid places has `probability * n / length` spans, one at least, rounded up or down at random; where each
    starts is drawn without replacement. Of a long sequence a share 1 - (1 - probability / length) ** length is hidden.

    Args:
        valid: bool (B, N), the valid places of a row, which come first; a row of fewer than `length` has no span.
        probability: share of the places that would be hidden if no two spans met.
        length: of a span, in places.
        draws: source of randomness.

    Returns:
        bool (B, N), True where hidden.
    """
    wanted = probability * valid.sum(1) / length + draws.uniform()
    counts = wanted.long().clamp(1, max(1, valid.shape[1] // length))
    # A span may start where its last place is valid, too.
    starts = torch.zeros_like(valid)
    starts[:, : max(0, valid.shape[1] - length + 1)] = valid[:, length - 1 :]
    slots = most_spans(valid.shape[1], probability, length)
    places, chosen = choose_places(starts, counts, slots, draws)
    begun = torch.zeros_like(valid).scatter(1, places, chosen).long().cumsum(1)
    return begun > F.pad(begun, (length, 0))[:, : valid.shape[1]]


def most_spans(places: int, probability: float, length: int) -> int:
    """How many spans `mask_spans` makes at most in a row of so many places."""
    return min(max(1, int(probability * places / length) + 1), max(1, places // length))
