"""Losses where rows meet: this process's rows against everybody's, with the gradient of the full batch.

Each returns a mean over the local rows, so that the average over processes is the mean over the global batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.batch import Batch
from mmssl.ops.gather import average, gather, own_rows, process_share

KOLEO_EPS = 1e-8


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Normalized temperature-scaled cross-entropy (Chen et al. 2020, arXiv 2002.05709, equation 1).

    Every view of the global batch is compared with its partner and the 2N - 2 views of other rows. A view's similarity
    with itself is masked with -inf, which also removes its gradient; subtracting exp(1 / temperature) does not. The
    published code returns twice this value, the paper's mean over 2N views.

    Args:
        a: unit vectors (B, D), the first view of each row.
        b: unit vectors (B, D), the second.
        temperature: divides the cosine.

    Returns:
        loss and accuracy (share of views whose most similar view is their partner), 0-dim.
    """
    rows = len(a)
    everyone = torch.cat([gather(a), gather(b)])
    own, total = own_rows(rows, a.device), len(everyone) // 2
    itself, partner = torch.cat([own, own + total]), torch.cat([own + total, own])
    logits = torch.cat([a, b]) @ everyone.T / temperature
    logits = logits.scatter(1, itself[:, None], -math.inf)
    return F.cross_entropy(logits, partner), (logits.argmax(1) == partner).to(logits.dtype).mean()


def off_diagonal(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the squares of aᵀb off its diagonal, 0-dim: what Barlow Twins and VICReg call redundancy.

    The D x D matrix, 8192² in the papers, is never made: the squared norm of aᵀb is the sum of (aaᵀ) · (bbᵀ), N x N
    element by element. Each process takes its rows of these times the number of processes: the average over processes
    is the whole, value and gradient.

    Args:
        a: (N, D), of the global batch, in order of the processes.
        b: (N, D), likewise.
    """
    share, shares = process_share()
    own_a, own_b = a.chunk(shares)[share], b.chunk(shares)[share]
    everything = ((own_a @ a.T) * (own_b @ b.T)).sum() * shares
    return everything - (a * b).sum(0).square().sum()


def koleo(z: Tensor) -> Tensor:
    """Minus the logarithm of the distance of each row from the nearest other one of all processes, as unit vectors.

    Sablayrolles, Douze, Schmid & Jégou 2018, arXiv 1806.03198, equation 3, after Kozachenko & Leonenko: the higher the
    entropy of the rows' distribution, the lower. As in DINOv2's code, with 1e-8 added to distances.

    Args:
        z: (B, D), of any length.

    Returns:
        a mean over the local rows, 0-dim.
    """
    own = F.normalize(z, dim=1, eps=KOLEO_EPS)
    everyone = gather(own)
    cosine = own.detach() @ everyone.detach().T
    nearest = cosine.scatter(1, own_rows(len(z), z.device)[:, None], -math.inf).argmax(1)
    return -(F.pairwise_distance(own, everyone[nearest], eps=KOLEO_EPS) + KOLEO_EPS).log().mean()


def score_tokens(logits: Tensor, target: Tensor, chosen: Tensor, smoothing: float = 0.0) -> Batch:
    """Of each chosen token its `log_likelihood_ratio`, and whether it was `right`, the likeliest: (B, M), 0 elsewhere.

    The ratio is that of its probability to 1 / V, so that 0 is a guess. Tasks with a vocabulary hand these on in place
    of logits: outputs of the whole batch are kept where it is cut into micro-batches, and B·M·V numbers are many.

    Args:
        logits: (N, V), of the chosen tokens, row by row.
        target: int64 (B, M).
        chosen: bool (B, M), of which N are True.
        smoothing: share of the target that is spread over all V; `unsmoothed` is then the ratio without it.
    """
    logits, answer = logits.to(torch.promote_types(logits.dtype, torch.float32)), target[chosen]
    guess = math.log(logits.shape[1])
    ratio = guess - F.cross_entropy(logits, answer, reduction="none", label_smoothing=smoothing)
    scores = {"log_likelihood_ratio": ratio, "right": (logits.argmax(1) == answer).to(ratio.dtype)}
    if smoothing:
        scores["unsmoothed"] = guess - F.cross_entropy(logits.detach(), answer, reduction="none")
    nothing = ratio.new_zeros(chosen.shape)
    return {key: nothing.masked_scatter(chosen, score) for key, score in scores.items()}


def token_losses(outputs: Batch, tokens: int, chosen: Tensor, count: Tensor, unigram: Tensor) -> dict[str, Tensor]:
    """Cross-entropy and accuracy, means over the chosen tokens of the global batch, and `relative_error`.

    That is the cross-entropy over that of the frequencies of tokens, which fall far below guessing without looking: it
    says whether a network reads.

    Args:
        outputs: of `score_tokens`.
        tokens: V, how many there are to choose from.
        chosen: bool (B, M).
        count: 0-dim, number of chosen tokens.
        unigram: 0-dim, the sum of their cross-entropies by their frequencies; see `Unigram`.
    """
    error = math.log(tokens) - outputs["log_likelihood_ratio"]
    unsmoothed = math.log(tokens) - outputs["unsmoothed"] if "unsmoothed" in outputs else error
    return {
        "loss": mean_over(error, chosen, count),
        "accuracy": mean_over(outputs["right"], chosen, count),
        "relative_error": mean_over(unsmoothed.detach(), chosen, unigram),
    }


@torch.no_grad()
def token_ranking(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """How often a positive token has a higher logit than a negative one, over all such pairs, 0-dim; 0.5 where none.

    Args:
        logits: (B, L).
        positive: bool (B, L).
        negative: bool (B, L).
    """
    below = logits.masked_fill(~negative, math.inf).flatten().sort().values
    wins = (torch.searchsorted(below, logits, right=False) + torch.searchsorted(below, logits, right=True)) / 2
    pairs = positive.sum() * negative.sum()
    return torch.where(pairs > 0, (wins * positive).sum() / pairs.clamp(min=1), 0.5).to(logits.dtype)


def mean_over(values: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Sum of the valid `values` over `count`, the number of valid ones that the whole batch has on average a part.

    Args:
        values: (B, M).
        valid: bool (B, M).
        count: 0-dim; see `Objective` for what the loop makes of it.
    """
    return (values * valid).sum() / torch.where(count > 0, count, 1)


def classified(logits: Tensor, answer: Tensor, valid: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Cross-entropy and accuracy over the rows that count; `valid`, their share.

    Args:
        logits: (B, K).
        answer: int64 (B,).
        valid: bool (B,).
        count: see `mean_over`.
    """
    right = (logits.argmax(1) == answer).to(logits.dtype)
    return {
        "loss": mean_over(F.cross_entropy(logits, answer, reduction="none"), valid, count),
        "accuracy": mean_over(right, valid, count),
        "valid": valid.to(logits.dtype).mean(),
    }


def divergence(posterior: Tensor, log_probabilities: Tensor) -> Tensor:
    """Kullback-Leibler divergence (B,) of probabilities (B, K) from those whose logarithms are given."""
    log = log_probabilities.expand_as(posterior)
    return (torch.special.xlogy(posterior, posterior) - torch.where(posterior > 0, posterior * log, 0)).sum(1)


@torch.no_grad()
def found(logits: Tensor, target: Tensor) -> Tensor:
    """How often the target has the largest of logits (N, K), 0-dim; a tie is a guess."""
    nearest = logits == logits.amax(1, keepdim=True)
    return (nearest.gather(1, target[:, None])[:, 0] / nearest.sum(1)).to(logits.dtype).mean()


@torch.no_grad()
def ranking(a: Tensor, b: Tensor) -> Tensor:
    """How often a row of `b` is nearer to its partner in `a` than another row of this process is, 0-dim; chance 0.5.

    Nearness is the cosine; ties count half; 0.5 for one row alone. Unlike an accuracy its level does not depend on the
    number of rows, so that micro-batches can be averaged.

    Args:
        a: (B, D), of any length.
        b: (B, D); row i belongs to row i of `a`.
    """
    if len(a) < 2:
        return a.new_full((), 0.5)
    cosine = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    partner = cosine.diagonal()[:, None]
    below = (cosine < partner).sum(1) + ((cosine == partner).sum(1) - 1) / 2
    return (below / (len(a) - 1)).mean().to(a.dtype)


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """Standard deviation of the normalized vectors of all processes, averaged over dimensions, times sqrt(D), 0-dim.

    1 where they are spread over the whole sphere, 0 where all are the same: the measure of collapse of SimSiam (Chen &
    He 2021, arXiv 2011.10566, section 4.1), whose std is that over sqrt(D). Vectors along one line reach 1 / sqrt(D).

    Args:
        z: (..., D), as many rows on each process, all of which have to call this.
    """
    flat = F.normalize(z.flatten(0, -2), dim=-1)
    variance = average((flat - average(flat.mean(0))).square().mean(0))
    return variance.sqrt().mean() * math.sqrt(flat.shape[1])
