"""Which training pictures or clips lie nearest to one of the test: what features take for alike, to be looked at."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from mmssl.adaptation.cache import FeatureCache
from mmssl.adaptation.features import POOLED
from mmssl.adaptation.labeled import LabeledRows
from mmssl.adaptation.rows import Split
from mmssl.batch import middle_window
from mmssl.encoders.base import Encoder

ASKED, NEIGHBORS = 6, 5
SIDE, GAP = 48, 4  # of a picture, and between pictures, in pixels
SAME, OTHER = (27, 108, 168), (255, 255, 255)  # color of the frame around a neighbor of the same class, and of others


def find_neighbors(
    encoder: Encoder, train: LabeledRows, test: LabeledRows, cache: FeatureCache, batch_size: int
) -> dict[str, np.ndarray]:
    """A few test pictures, or clips, and the nearest of training by the cosine of pooled features.

    Args:
        encoder: of images or video.
        train: rows among which neighbors are.
        test: rows of which a few are asked for, spread evenly; none of them a training row.
        cache: of the features that probes have read of them.
        batch_size: rows that are encoded at a time.

    Returns:
        `neighbors` uint8 (asked, 1 + neighbors, H, W, 3), each test picture before its neighbors; and `neighbors_same`
        bool (asked, neighbors), whether a neighbor's label is that of the test picture. Of clips these are middle
        frames.
    """
    sides = []
    for rows in (train, test):
        # The very rows that probes asked for, which the cache has.
        ids = torch.cat([train.ids, test.ids]).unique() if train.split is test.split else rows.ids
        (view,), read = cache.features([encoder], rows.split, ids.numpy(), layers=False, batch_size=batch_size)
        there = rows[torch.isin(rows.ids, read)]
        sides.append((there, F.normalize(view[POOLED][torch.searchsorted(read, there.ids)], dim=1)))
    (known, x), (asked, y) = sides
    some = torch.linspace(0, len(asked) - 1, min(ASKED, len(asked))).long()
    asked, nearest = asked[some], (y[some] @ x.T).topk(min(NEIGHBORS, len(known)), dim=1).indices
    pictures = _pictures(known.split, known.ids[nearest.flatten()]).unflatten(0, nearest.shape)
    found = torch.cat([_pictures(asked.split, asked.ids)[:, None], pictures], 1)
    same = known.labels[nearest] == asked.labels[:, None]
    return {
        "neighbors": found.permute(0, 1, 3, 4, 2).numpy(),
        "neighbors_same": same.reshape(*nearest.shape, -1).all(-1).numpy(),
    }


def _pictures(split: Split, ids: Tensor) -> Tensor:
    """Rows as small pictures, uint8 (N, 3, SIDE, SIDE), some of them several times; of clips the middle frame."""
    unique, place = ids.unique(return_inverse=True)
    batch = middle_window(*split.random_access(unique.tolist()).read([unique.tolist()]))
    seen = batch["image"] if "image" in batch else batch["video"][:, batch["video"].shape[1] // 2]
    small = F.interpolate(seen.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)[place]


def draw_sheet(pictures: np.ndarray, same: np.ndarray) -> Image.Image:
    """One line a test picture, its neighbors on the right of it, framed where they have its label.

    Args:
        pictures: see `find_neighbors`.
        same: see `find_neighbors`.
    """
    rows, columns = pictures.shape[:2]
    step = SIDE + 2 * GAP
    sheet = Image.new("RGB", (columns * step + 2 * GAP, rows * step), "white")
    pen = ImageDraw.Draw(sheet)
    for row in range(rows):
        for column in range(columns):
            left, top = column * step + GAP + 2 * GAP * (column > 0), row * step + GAP
            frame = SAME if column and same[row, column - 1] else OTHER
            pen.rectangle((left - 3, top - 3, left + SIDE + 2, top + SIDE + 2), fill=frame)
            sheet.paste(Image.fromarray(pictures[row, column]), (left, top))
    return sheet
