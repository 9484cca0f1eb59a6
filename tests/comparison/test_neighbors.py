"""The training pictures nearest to a few test pictures, which are planted here."""

import numpy as np
import pytest
import torch

from mmssl import encoder as create
from mmssl.adaptation.cache import FeatureCache
from mmssl.adaptation.labeled import LabeledRows
from mmssl.adaptation.rows import BatchSplit, Reads
from mmssl.comparison.neighbors import OTHER, SAME, draw_sheet, find_neighbors

TINTS = 8


def tinted(rows: int, seed: int) -> torch.Tensor:
    """Rows of 8 colors in turn, with some noise: those of one color are neighbors."""
    colors = torch.randint(0, 200, (TINTS, 3, 1, 1), generator=torch.Generator().manual_seed(9))
    noise = torch.randint(0, 30, (rows, 3, 32, 32), generator=torch.Generator().manual_seed(seed))
    return (colors[torch.arange(rows) % TINTS] + noise).to(torch.uint8)


def split(x: torch.Tensor) -> BatchSplit:
    return BatchSplit([{"image": part} for part in x.split(13)], Reads(("image",), {}))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create("timm/test_resnet", modality="image").eval()


def test_neighbors_are_of_the_planted_color_and_shown_next_to_what_was_asked(encoder):
    x, y = tinted(48, 0), tinted(24, 1)
    train = LabeledRows(split(x), torch.arange(48), torch.arange(48) % TINTS)
    test = LabeledRows(split(y), torch.arange(24), torch.arange(24) % TINTS)
    found = find_neighbors(encoder, train, test, FeatureCache(), 16)
    pictures, same = found["neighbors"], found["neighbors_same"]
    assert (pictures.shape, pictures.dtype, same.shape) == ((6, 6, 48, 48, 3), np.uint8, (6, 5))
    assert same.mean() > 0.9
    asked = torch.linspace(0, 23, 6).long()
    for line, row in enumerate(asked.tolist()):
        means = pictures[line].mean((1, 2))
        assert np.abs(means[0] - y[row].float().mean((1, 2)).numpy()).max() < 1
        assert (np.abs(means[1:] - means[0]).max(1) < 3)[same[line]].all()


def test_rows_of_one_split_are_told_apart_and_a_row_is_not_its_own_neighbor(encoder):
    every = split(tinted(40, 0))
    held = torch.arange(40) % 5 == 0
    rows = LabeledRows(every, torch.arange(40), torch.arange(40))  # as without labels: each is its own
    found = find_neighbors(encoder, rows[~held], rows[held], FeatureCache(), 16)
    assert not found["neighbors_same"].any()
    pictures = found["neighbors"].astype(int)
    assert (np.abs(pictures[:, :1] - pictures[:, 1:]).max((2, 3, 4)) > 0).all()


def test_several_labels_are_the_same_where_all_are(encoder):
    x = tinted(32, 0)
    labels = torch.stack([torch.arange(32) % TINTS < 4, torch.arange(32) % 2 == 0], 1)
    train = LabeledRows(split(x), torch.arange(32), labels)
    found = find_neighbors(encoder, train, LabeledRows(split(x), torch.arange(32), ~labels), FeatureCache(), 16)
    nearest = find_neighbors(encoder, train, LabeledRows(split(x), torch.arange(32), labels), FeatureCache(), 16)
    assert nearest["neighbors_same"][:, 0].all()  # the very picture
    assert not found["neighbors_same"][:, 0].any()


def test_a_neighbor_of_the_same_label_is_framed():
    pictures, same = np.zeros((2, 6, 48, 48, 3), np.uint8), np.zeros((2, 5), bool)
    same[1, 2] = True
    sheet = np.asarray(draw_sheet(pictures, same))
    assert sheet.shape[1] <= 358  # fits a phone
    assert (sheet == SAME).all(2).any()
    framed = np.argwhere((sheet == SAME).all(2))
    assert framed[:, 0].min() > sheet.shape[0] / 2
    assert (sheet[: sheet.shape[0] // 2][~(sheet[: sheet.shape[0] // 2] == 0).all(2)] == OTHER).all()
