"""Where clips are taken from: uniform places in the part that moves, none in a still at the end."""

import torch
from scipy import stats

from mmssl.ops.clips import draw_start, frames_at, frames_until_still
from mmssl.ops.draws import Draws


def counted(rows, frames=10):
    """Every frame holds its number."""
    return torch.arange(frames, dtype=torch.uint8).view(1, -1, 1, 1, 1).expand(rows, -1, 3, 2, 2).clone()


def test_a_still_at_the_end_is_counted_once():
    video = counted(5)
    video[1, 6:] = video[1, 6:7]
    video[2] = video[2, :1]
    video[3, 2:5] = 2  # a still in the middle, and a movement at the end
    video[4, -1, 0, 0, 0] = 77
    assert frames_until_still(video).tolist() == [10, 7, 1, 10, 10]


def test_starts_are_uniform_and_nothing_reaches_into_the_still():
    rows, span = 6000, 4
    video = counted(rows)
    video[::2, 6:] = video[::2, 6:7]
    video[3::3] = video[3::3, :1]
    start, fits = draw_start(video, span, Draws(0, 0, rows))
    still = torch.arange(rows) % 3 == 0
    still[0] = False
    assert torch.equal(fits, ~still)
    assert not start[still].any()
    for parity, places in ((0, 4), (1, 7)):
        chosen = start[~still & (torch.arange(rows) % 2 == parity)]
        counts = torch.bincount(chosen)
        assert len(counts) == places
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    taken = frames_at(video, start[:, None] + torch.arange(span))
    assert torch.equal(taken[..., 0, 0, 0][fits].long(), start[fits][:, None] + torch.arange(span))
    assert (taken[fits].flatten(2)[..., 0].diff(dim=1) == 1).all()


def test_frames_at_places_of_any_shape():
    video = torch.rand(3, 5, 3, 2, 2)
    places = torch.randint(5, (3, 2, 4))
    assert torch.equal(frames_at(video, places)[1, 1, 2], video[1, places[1, 1, 2]])
