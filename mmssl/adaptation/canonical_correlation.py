"""The baseline of pairs that needs no network: raw inputs, and the linear maps under which two sides agree best.

Canonical correlation analysis (Hotelling 1936; for pictures and sentences Hodosh et al. 2013) with a ridge, learned
from the training pairs: a pretext task that does not beat them has found no more than a linear map of pixels and words
does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.adaptation.ranks import Relation, by_vectors, rank
from mmssl.batch import windows_of

PICTURE = 16
WORDS = 1024
BANDS, MOMENTS = 64, 8
WINDOW = 512
RIDGES = (10.0, 1.0, 0.1, 0.01, 0.001)
"""Candidates, in units of the mean variance; of equals on the held-out pairs the first is taken."""


def raw_features(modality: str, x: Tensor, valid: Tensor | None) -> Tensor:
    """Rows of a batch as vectors, float32 (B, D); of text its ids (B, L), -1 where not valid, for `bag_of_words`.

    Images are shrunk to 16 x 16 colors, clips to 8 moments of 8 x 8, sounds to 8 moments of 64 linear bands of the log
    spectrum; over windows of a row, where there are several, the mean is taken.
    """
    if windows := windows_of(modality, x):
        return raw_features(modality, x.flatten(0, 1), valid).unflatten(0, (-1, windows)).mean(1)
    if modality == "text":
        return x if valid is None else x.masked_fill(~valid, -1)
    if modality == "image":
        return F.adaptive_avg_pool2d(x.float() / 255, PICTURE).flatten(1)
    if modality == "video":
        return F.adaptive_avg_pool3d(x.float().transpose(1, 2) / 255, (MOMENTS, PICTURE // 2, PICTURE // 2)).flatten(1)
    spectrum = torch.stft(x, WINDOW, window=torch.hann_window(WINDOW, device=x.device), return_complex=True).abs()
    return F.adaptive_avg_pool2d(spectrum.add(1e-3).log()[:, None], (BANDS, MOMENTS)).flatten(1)


def bag_of_words(ids: Tensor, vocabulary: Tensor) -> Tensor:
    """Which words of the vocabulary (V,) a text has, float32 (N, V); `ids` (N, L)."""
    position = torch.searchsorted(vocabulary, ids.clamp(min=0)).clamp(max=len(vocabulary) - 1)
    known = (vocabulary[position] == ids) & (ids >= 0)
    # A column more for what is not in the vocabulary.
    position = torch.where(known, position, len(vocabulary))
    return torch.zeros(len(ids), len(vocabulary) + 1).scatter_(1, position, 1.0)[:, :-1]


def frequent_words(ids: Tensor) -> Tensor:
    """The most frequent token ids of (N, L), ascending."""
    seen, count = ids[ids >= 0].unique(return_counts=True)
    return seen[count.argsort(descending=True, stable=True)[:WORDS]].sort().values


class CanonicalCorrelation:
    """Linear maps of two sides into one space, learned from paired rows.

    Args:
        a: float32 (N, Da).
        b: float32 (N, Db).
        ridge: in units of the mean variance of a side.
    """

    def __init__(self, a: Tensor, b: Tensor, ridge: float) -> None:
        self.means = a.double().mean(0), b.double().mean(0)
        x, y = a.double() - self.means[0], b.double() - self.means[1]
        roots = []
        for side in (x, y):
            spread = side.T @ side / len(side)
            level = spread.diagonal().mean().clamp(min=1e-12)
            roots.append(torch.linalg.cholesky(spread + ridge * level * torch.eye(len(spread), dtype=spread.dtype)))
        across = torch.linalg.solve_triangular(roots[0], x.T @ y / len(x), upper=False)
        across = torch.linalg.solve_triangular(roots[1], across.T, upper=False).T
        u, correlation, v = torch.linalg.svd(across, full_matrices=False)
        self.maps = tuple(
            torch.linalg.solve_triangular(root.T, directions, upper=True) * correlation
            for root, directions in zip(roots, (u, v.T), strict=True)
        )

    def __call__(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides (N, Da) and (M, Db) as unit vectors of one space."""
        left, right = (
            F.normalize((side.double() - mean) @ matrix, dim=1)
            for side, mean, matrix in zip((a, b), self.means, self.maps, strict=True)
        )
        return left, right


def fit_canonical_correlation(
    a: Tensor, b: Tensor, pairs: tuple[Tensor, Tensor], held: Tensor
) -> tuple[CanonicalCorrelation, float]:
    """The maps of all pairs and their ridge, the best for the held-out pairs by mean reciprocal rank both ways.

    Args:
        a: items of one side, float32 (N, Da).
        b: items of the other, float32 (M, Db).
        pairs: numbers of the items of each pair, int64 (R,) each.
        held: bool (R,).
    """
    left, right = pairs
    best, most = RIDGES[0], -1.0
    if held.any():
        (first, own_a), (second, own_b) = (side[held].unique(return_inverse=True) for side in pairs)
        relation = Relation.of_rows(own_a, own_b, torch.arange(len(own_a)))
        for ridge in RIDGES:
            x, y = CanonicalCorrelation(a[left[~held]], b[right[~held]], ridge)(a[first], b[second])
            both = rank(by_vectors(x, y), relation), rank(by_vectors(y, x), relation.transposed())
            score = sum((1 / ranking.rank).mean().item() for ranking in both)
            if score > most:
                best, most = ridge, score
    return CanonicalCorrelation(a[left], b[right], best), best
