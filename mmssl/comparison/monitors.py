"""What features say without labels: three numbers, a map, and which rows are neighbors."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmssl.adaptation.cache import FeatureCache
from mmssl.adaptation.features import POOLED
from mmssl.adaptation.labeled import LabeledRows, Question
from mmssl.adaptation.request import Model
from mmssl.adaptation.rows import Split, in_order, open_rows
from mmssl.batch import count_rows, middle_window, to_device
from mmssl.comparison.neighbors import ASKED, find_neighbors
from mmssl.comparison.plan import Plan
from mmssl.comparison.raw import RawInput
from mmssl.encoders.base import Encoder
from mmssl.modules.mode import evaluating
from mmssl.modules.views import KINDS, Views, encode_views
from mmssl.ops.draws import Draws
from mmssl.ops.representation import effective_rank, lidar, spectrum_decay

MONITORED = 2048
"""Training rows whose features the label-free numbers are of."""
MAPPED = 600
"""Of these, rows that are drawn on a map."""
VIEWED, VIEWS = 512, 8
"""Of these, rows that LiDAR is of, and random views of each."""
VIEWED_AT_ONCE = 32
FEWEST_FOR_TSNE = 30
BATCH = 256

Answered = dict[str, np.ndarray]
"""`measure|depth` -> int32 (M,), the class that each test row is taken for; `truth` -> int32 (M,), `names` -> of the
classes, `group` -> int64 (M,); `map` -> float32 (N, 2), where training rows lie on a map of their features, `map_kind`
-> how it was made, and `map_class` -> int32 (N,); what `find_neighbors` gives."""


def look(
    plan: Plan,
    encoder: Encoder,
    answered: Answered,
    *,
    question: Question | None = None,
    cache: FeatureCache | None = None,
    first: bool = False,
) -> dict[str, float]:
    """What features of training rows say without labels.

    Args:
        plan: of the comparison.
        encoder: of one of its lines.
        answered: gets map and neighbors.
        question: the rows that probes were asked; where None, neighbors are those of rows without labels.
        cache: of the features that probes have read.
        first: whether this is the line's first seed, of which map and neighbors are drawn.

    Returns:
        `effective_rank`, `spectrum_decay`, `width`, and `lidar` where the modality has random views.
    """
    reads = Model.of(encoder).reads((encoder.modality,), 0)
    limit, cache = min(MONITORED, plan.limit or MONITORED), cache or FeatureCache()
    rows = open_rows(plan.rows, reads, None, None, limit, plan.rows.split)
    # Often the very rows that probes have learned from, which the cache has.
    (view,), ids = cache.features([encoder], rows, rows.present(limit), layers=False, batch_size=BATCH)
    x = view[POOLED]
    if first:
        answered["map"], answered["map_kind"] = _map(x[:MAPPED].double())
        if plan.label is not None and "names" in answered:
            numbers = {str(name): number for number, name in enumerate(answered["names"].tolist())}
            cells = rows.cells(plan.label)
            drawn = [numbers.get(str(cells[row]), -1) for row in ids[:MAPPED].tolist()]
            answered["map_class"] = np.array(drawn, np.int32)
    if first and encoder.modality in ("image", "video"):
        if question is None:
            every = LabeledRows(rows, ids, ids)  # no row has the label of another
            asked = torch.arange(len(ids)) % max(2, len(ids) // ASKED) == 0
            sides = every[~asked], every[asked]
        else:
            sides = question.train, question.test
        answered |= find_neighbors(encoder, *sides, cache, BATCH)
    found = {
        "effective_rank": float(effective_rank(x)),
        "spectrum_decay": float(spectrum_decay(x)),
        "width": x.shape[1],
    }
    if encoder.modality in KINDS and not isinstance(encoder, RawInput):
        found["lidar"] = float(lidar(_views(encoder, rows, ids[:VIEWED].tolist(), plan.seeds[0])))
    return found


def _views(encoder: Encoder, rows: Split, ids: Sequence[int], seed: int) -> Tensor:
    """Features of random views of rows, float32 (N, V, D): SimCLR's, the same for every encoder."""
    draw, parts = Views(encoder, None, VIEWS), list[Tensor]()
    device = next(encoder.parameters()).device
    with evaluating(encoder), torch.no_grad():
        for number, batch in enumerate(rows.read(in_order(np.array(ids), VIEWED_AT_ONCE))):
            draws = Draws(seed, number, count_rows(batch), device=device)
            one = to_device(middle_window(batch), device)
            parts.append(encode_views(encoder, *draw(one, draws, encoder)).float().cpu())
    return torch.cat(parts)


def _map(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Places (N, 2) of rows (N, D) on a plane, and how they were found: t-SNE where openTSNE is installed, or PCA."""
    centered = x - x.mean(0)
    flat = (centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:2].T).float().numpy()
    if importlib.util.find_spec("openTSNE") is None or len(x) < FEWEST_FOR_TSNE or flat.shape[1] < 2:
        return flat, np.array("PCA")
    from openTSNE import TSNE

    perplexity = min(30, (len(x) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, random_state=0).fit(x.numpy()), np.float32), np.array("t-SNE")
