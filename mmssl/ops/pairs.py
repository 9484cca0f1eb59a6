"""Losses of pairs: this process's rows against everybody's, with the gradient of the full batch, in any chunks.

Row i of `a` belongs to row i of `b`, and with `items` to every row j that is an equal item: P(i) = {j: equal}, i among
them. Each loss is a mean over the local rows, so that the average over processes is the mean over the global batch.

With `chunk`, logits of that many local rows at a time exist, and they are computed again for the gradient. So between
the two passes embeddings are held, O(B · D), and never anything of B x B; the largest temporary is chunk x B.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmssl.ops.gather import gather, own_rows


def info_nce(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    *,
    items: Tensor | None = None,
    smoothing: float = 0.0,
    chunk: int | None = None,
    back: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric cross-entropy over pairs (Radford et al. 2021, arXiv 2103.00020, figure 3).

    With p_ij the softmax over j of scale · a_i · b_j, the loss from a to b is the mean over i of -Σ_j t_ij ln p_ij, and
    that from b to a likewise; the result is their mean. The target t_ij is (1 - smoothing) / |P(i)| for j in P(i), plus
    smoothing / B for every j. P(i) = {i} is CLIP, with smoothing ALIGN (Jia et al. 2021, arXiv 2102.05918); with
    equal items it is UniCL (Yang et al. 2022, arXiv 2204.03610, equations 3 to 5), which Florence trains.

    Args:
        a: unit vectors (B, D).
        b: unit vectors (B, D).
        scale: 0-dim factor of the cosine, 1 / temperature.
        items: int64 (B, K) from `fingerprint`; rows that agree in any of the K columns are equal. None: no two are.
        smoothing: share of the target that is spread over all rows.
        chunk: rows at a time; all at once where left out.
        back: whether the loss is that from b to a, too; else it is that from a to b alone.

    Returns:
        loss, accuracy from a to b, accuracy from b to a, 0-dim. A find among the k equal items counts 1/k, as if one of
        them was then drawn, so that guessing scores 1/B whatever is equal.
    """

    def one_way(y: Tensor) -> Part:
        def part(own: Tensor, x: Tensor, items: Tensor | None) -> tuple[Tensor, Tensor]:
            logits = (scale * x) @ y.T
            if items is None:
                target = own
            else:
                equal = _equal(items, everyones)
                target = equal / equal.sum(1, keepdim=True, dtype=x.dtype)
            loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)
            return loss, _found(logits, own, items, everyones)

        return part

    everyones = None if items is None else gather(items)
    own = own_rows(len(a), a.device)
    to_b, a_to_b = _in_chunks(one_way(gather(b)), own, a, items, chunk)
    to_a, b_to_a = _in_chunks(one_way(gather(a)), own, b, items, chunk)
    return (to_b + to_a) / 2 if back else to_b, a_to_b, b_to_a


def sigmoid_pairs(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    items: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One binary decision for each of the B² combinations (Zhai et al. 2023, arXiv 2303.15343, equation 1).

    The mean over i of -Σ_j ln σ(z_ij (scale · a_i · b_j + bias)), where z_ij is 1 for j in P(i) and -1 for the others.

    Args:
        a: unit vectors (B, D).
        b: unit vectors (B, D).
        scale: 0-dim factor of the cosine.
        bias: 0-dim, added to every logit.
        items: as for `info_nce`.
        chunk: likewise.

    Returns:
        loss, accuracy from a to b, accuracy from b to a, 0-dim; see `info_nce`.
    """
    everyones = None if items is None else gather(items)
    own = own_rows(len(a), a.device)
    everyone_a, everyone_b = gather(a.detach()), gather(b)

    def part(own: Tensor, x: Tensor, items: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = (scale * x) @ everyone_b.T + bias
        if items is None:
            equal = own[:, None] == torch.arange(len(everyone_b), device=own.device)
        else:
            equal = _equal(items, everyones)
        loss = -F.logsigmoid(torch.where(equal, logits, -logits)).sum()
        return loss, _found(logits, own, items, everyones)

    def back(own: Tensor, x: Tensor, items: Tensor | None) -> tuple[Tensor]:
        return (_found(x @ everyone_a.T, own, items, everyones),)

    loss, a_to_b = _in_chunks(part, own, a, items, chunk)
    with torch.no_grad():
        (b_to_a,) = _in_chunks(back, own, b, items, chunk)
    return loss, a_to_b, b_to_a


def multiple_instance_nce(a: Tensor, b: Tensor, scale: float, *, twice: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One positive or more among several candidates (Miech et al. 2020, arXiv 1912.06430, equation 1).

    With x_ijk = scale · a_i · b_jk, the mean over i of ln Σ exp over {x_ijk} and {x_jik}, all j and k, less ln Σ_k exp
    x_iik: a's row against every candidate, and its candidates against every a. In the equation the positives x_iik are
    in the first sum once, and it is 0 at least; in the published code they are there `twice`, and it is ln 2 at least.

    Args:
        a: (B, D).
        b: (B, K, D), the candidates of each row.
        scale: factor of the inner product.
        twice: whether positives count twice.

    Returns:
        loss, how often the best of all candidates is one of the row's own, and how often the best row for a row's
        candidates is its own, 0-dim.
    """
    own = own_rows(len(a), a.device)
    number = b.shape[1]
    to_b = scale * a @ gather(b).flatten(0, 1).T
    to_a = scale * gather(a) @ b.flatten(0, 1).T
    positives = to_b.unflatten(1, (-1, number)).gather(1, own[:, None, None].expand(-1, 1, number))[:, 0]
    back = to_a.unflatten(1, (-1, number)).transpose(0, 1)
    b_to_a = back.amax(2).argmax(1) == own
    if not twice:
        itself = own[:, None] == torch.arange(back.shape[1], device=own.device)
        back = back.masked_fill(itself[:, :, None], -math.inf)
    everything = torch.cat([to_b, back.flatten(1)], dim=1)
    loss = (everything.logsumexp(1) - positives.logsumexp(1)).mean()
    a_to_b = to_b.argmax(1).div(number, rounding_mode="floor") == own
    return loss, a_to_b.to(a.dtype).mean(), b_to_a.to(a.dtype).mean()


Part = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]


def _in_chunks(part: Part, own: Tensor, x: Tensor, items: Tensor | None, chunk: int | None) -> tuple[Tensor, ...]:
    """Sums over the rows that `part` returns, as means; without a chunk, `part` sees all rows and nothing is redone."""
    rows = len(x)
    if chunk is None or chunk >= rows:
        return tuple(value / rows for value in part(own, x, items))
    shares = [None] * -(-rows // chunk) if items is None else items.split(chunk)
    pieces = [
        checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False)
        for arguments in zip(own.split(chunk), x.split(chunk), shares, strict=True)
    ]
    return tuple(torch.stack(values).sum() / rows for values in zip(*pieces, strict=True))


def _equal(items: Tensor, everyones: Tensor | None) -> Tensor:
    """Which of everyone's rows are the same item, bool (B, W·B)."""
    assert everyones is not None
    equal = items[:, :1] == everyones[:, 0]
    for own, other in zip(items.T[1:], everyones.T[1:], strict=True):
        equal |= own[:, None] == other
    return equal


@torch.no_grad()
def _found(logits: Tensor, own: Tensor, items: Tensor | None, everyones: Tensor | None) -> Tensor:
    """How many of the rows find their partner, 0-dim; one of k equal items counts 1/k."""
    best = logits.argmax(1)
    if items is None:
        return (best == own).sum().to(logits.dtype)
    equal = _equal(items, everyones)
    return (equal.gather(1, best[:, None])[:, 0] / equal.sum(1)).sum().to(logits.dtype)


def draw_negatives(similar: Tensor, equal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One row that is not equal to it for each row, with probability softmax(similar) over those.

    Args:
        similar: logits (B, N).
        equal: bool (B, N), True where the row must not be drawn.
        noise: uniform in [0, 1), (B, N); its Gumbel form turns the largest sum into a draw.

    Returns:
        int64 (B,) rows, and bool (B,), False where every row is equal: what was drawn there says nothing.
    """
    gumbel = -(-noise.clamp(min=torch.finfo(noise.dtype).tiny).log()).log()
    chances = (similar + gumbel).masked_fill(equal, -math.inf)
    return chances.argmax(1), ~equal.all(1)


@torch.no_grad()
def fingerprint(x: Tensor) -> Tensor:
    """A 64-bit hash of each row, int64 (B,): equal rows have equal ones on every process, others differ.

    Args:
        x: (B, ...) of any dtype.
    """
    data = x.flatten(1).contiguous().view(torch.uint8)
    words = F.pad(data, (0, -data.shape[1] % 8)).view(torch.int64)
    # Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators": a sequence's increment and its mixing
    # function, which make of equal words at other places other numbers. int64 wraps around.
    mixed = words + torch.arange(words.shape[1], device=x.device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed ^ (mixed >> 31)).sum(1)
