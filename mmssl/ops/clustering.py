"""k-means over what all processes hold.

Lloyd 1982 from a k-means++ start (Arthur & Vassilvitskii 2007). Sums are taken over all processes, so that each has the
same centers and any number of them makes the same ones up to rounding.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmssl.ops.gather import gather, process_share, total

ENTRIES = 2**24  # of the largest matrix of distances that is held at once


def nearest_center(points: Tensor, centers: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest center of each point, the first of several.

    Args:
        points: (N, D).
        centers: (K, D).
        offsets: (K,), taken off the squared distances from each center; none where left out.

    Returns:
        int64 (N,), and the squared distances (N,).
    """
    half = centers.square().sum(1) / 2
    if offsets is not None:
        half = half - offsets / 2
    codes, scores = [], []
    for some in points.split(max(1, ENTRIES // len(centers))):
        score, code = (some @ centers.T - half).max(1)
        codes.append(code)
        scores.append(some.square().sum(1) - 2 * score)
    return torch.cat(codes), torch.cat(scores).clamp(min=0)


def choose_centers(points: Tensor, number: int, seed: int) -> Tensor:
    """k-means++: each next center is a point, drawn with a probability in proportion to its squared distance.

    Args:
        points: (N, D), the same on every process.
        number: K. Where fewer points differ, some centers are equal.
        seed: of the draws.

    Returns:
        (K, D), the same on every process.
    """
    generator = torch.Generator().manual_seed(seed)
    # Numbers from the CPU: the draws are those of any device.
    dice = torch.rand(number, generator=generator, dtype=torch.float64).to(points.device)
    chosen = (dice[:1] * len(points)).long()
    squared = points.square().sum(1)
    distance = points.new_full((len(points),), math.inf)
    for i in range(1, number):
        last = points[chosen[-1]]
        distance = torch.minimum(distance, (squared - 2 * (points @ last) + last.square().sum()).clamp(min=0))
        weight = distance.double().cumsum(0)
        # Where no point is left apart from the centers, any will do.
        weight = torch.where(weight[-1] > 0, weight, torch.arange(1.0, len(points) + 1, device=points.device))
        place = torch.searchsorted(weight, dice[i : i + 1] * weight[-1], right=True).clamp(max=len(points) - 1)
        chosen = torch.cat([chosen, place])
    centers = points[chosen]
    if process_share()[1] > 1:
        dist.broadcast(centers, 0)
    return centers


def kmeans(points: Tensor, centers: Tensor, iterations: int = 25, *, unit: bool = False) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations, until no point changes its center.

    A center without points moves to the point that is farthest from its own, if that has any distance.

    Args:
        points: (N, D), the same on every process, each of which works on a part of them.
        centers: (K, D) to begin with.
        iterations: at most so many.
        unit: whether centers are unit vectors, for points that are: spherical k-means (Dhillon & Modha 2001).

    Returns:
        (K, D) centers, and the number of points of each, int64 (K,).
    """
    share, shares = process_share()
    size = math.ceil(len(points) / shares)
    own = points[share * size : (share + 1) * size]
    before = own.new_full((len(own),), -1, dtype=torch.long)
    codes, distance = nearest_center(own, centers)
    for _ in range(iterations):
        if not total((codes != before).sum()):
            break
        counts = total(torch.bincount(codes, minlength=len(centers)))
        sums = total(torch.zeros_like(centers).index_add_(0, codes, own))
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            far, far_distance = _farthest(own, distance, len(empty))
            centers[empty[: len(far)]] = torch.where(far_distance[:, None] > 0, far, centers[empty[: len(far)]])
        if unit:
            centers = F.normalize(centers, dim=1)
        before, (codes, distance) = codes, nearest_center(own, centers)
    return centers, total(torch.bincount(codes, minlength=len(centers)))


def sinkhorn(scores: Tensor, columns: Tensor, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """The transport from N rows to K columns, all of one mass, that is nearest to exp(scores) (Cuturi 2013).

    Rows and columns are scaled in turn, in logarithms.

    Args:
        scores: (N, K).
        columns: (K,), logarithms of the factors of the columns to begin with, such as zeros.
        iterations: of both.

    Returns:
        (N, K) whose columns sum to 1 / K and, after enough iterations, whose rows sum to 1 / N; and the factors.
    """
    rows = scores.new_zeros(len(scores))
    for _ in range(iterations):
        rows = -math.log(len(scores)) - (scores + columns).logsumexp(1)
        columns = -math.log(len(columns)) - (scores + rows[:, None]).logsumexp(0)
    return (scores + columns + rows[:, None]).exp(), columns


@torch.no_grad()
def balanced_assignment(scores: Tensor, counted: Tensor | None = None, iterations: int = 3) -> Tensor:
    """Rows assigned to columns, all of which are given about as much, over the rows of all processes: SwAV's targets.

    Caron et al. 2020, arXiv 2006.09882, section 3.1. Columns and then rows of exp(scores) are scaled to one sum each,
    in turn, in logarithms.

    Args:
        scores: (B, K), this process's; for instance logits over a temperature. Of (B, N, K) each of the N by itself.
        counted: bool (B,) or (B, N), which of them take part; all where left out. What is returned of the others means
            nothing.
        iterations: of both.

    Returns:
        Like `scores`, logarithms of shares over the K that sum to 1.
    """
    shares = scores
    for _ in range(iterations):
        heard = shares if counted is None else shares.masked_fill(~counted[..., None], -math.inf)
        mass = gather(heard.logsumexp(0)[None], exact=True).logsumexp(0)
        shares = (shares - torch.where(mass.isfinite(), mass, 0.0)).log_softmax(-1)
    return shares


def balanced_kmeans(points: Tensor, centers: Tensor, iterations: int = 25) -> tuple[Tensor, Tensor]:
    """k-means whose assignment is a transport with equal mass for each center; see `sinkhorn`.

    It is soft at first, for the factors to be found, and nearly hard at last: squared distances are divided by a tenth
    to a hundredth of their mean.

    Args:
        points: (N, D), the same on every process.
        centers: (K, D) to begin with.
        iterations: of both steps.

    Returns:
        (K, D) centers, and offsets (K,) with which `nearest_center` finds about the same assignment.
    """
    squared = points.square().sum(1)
    offsets = points.new_zeros(len(centers))
    for i in range(iterations + 1):
        distance = (squared[:, None] - 2 * points @ centers.T + centers.square().sum(1)).clamp(min=0)
        softness = 0.1 ** (1 + i / iterations)
        unit = (softness * distance.mean()).clamp(min=torch.finfo(points.dtype).eps)
        plan, factors = sinkhorn(-distance / unit, offsets / unit)
        offsets = unit * factors
        if i < iterations:
            centers = plan.T @ points / plan.sum(0)[:, None]
    if process_share()[1] > 1:
        dist.broadcast(centers, 0)
        dist.broadcast(offsets, 0)
    return centers, offsets


def _farthest(own: Tensor, distance: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Of the points of all processes, up to `number` with the largest distances, and these."""
    # Every process sends the same number of rows; those that it has not got have no distance.
    rows = own.new_zeros(number, own.shape[1])
    distances = own.new_zeros(number)
    top = distance.topk(min(number, len(own)))
    rows[: len(top.indices)], distances[: len(top.indices)] = own[top.indices], top.values
    rows, distances = gather(rows), gather(distances)
    order = distances.argsort(descending=True, stable=True)[:number]
    return rows[order], distances[order]
