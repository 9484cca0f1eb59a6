"""The network of offsets: right on clicks before it has learned anything, and quick to learn what is no click."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.modules.alignment import OffsetNetwork

OFFSETS, TOKENS, STEP = 2, 24, 2  # to either side; in a window; tokens in a step
CLASSES, FARTHEST = 2 * OFFSETS + 1, OFFSETS * STEP


def _network() -> OffsetNetwork:
    torch.manual_seed(0)
    return OffsetNetwork(6, 6, 16, OFFSETS, TOKENS / STEP)


def _cut(events: Tensor, offset: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of events (B, TOKENS + 2 FARTHEST), of two kinds a side (2, 2, 6), the sound early by its class."""
    time = torch.arange(TOKENS) + FARTHEST
    heard = time + STEP * (offset[:, None] - OFFSETS)
    sides = events[:, time], events.gather(1, heard)
    video, audio = (torch.where(side[..., None], *kind) for side, kind in zip(sides, kinds, strict=True))
    return video, audio


@pytest.mark.parametrize("shared", [True, False], ids=["one space", "two spaces"])
def test_one_click_has_its_offset_before_anything_is_learned(shared):
    net, offset = _network().eval(), torch.arange(CLASSES)
    kinds = torch.randn(2, 2, 6)
    if shared:
        net.audio.load_state_dict(net.video.state_dict())
        kinds = kinds[:1].expand(2, 2, 6)
    for click in range(FARTHEST, TOKENS - FARTHEST):
        events = (torch.arange(TOKENS + 2 * FARTHEST) == FARTHEST + click).expand(CLASSES, -1)
        video, audio = _cut(events, offset, kinds)
        assert torch.equal(net(video, audio).argmax(1), offset)
        assert torch.equal(net(video, audio.repeat_interleave(2, dim=1)).argmax(1), offset)  # of tokens half as long


def test_what_stands_still_is_at_no_offset():
    net = _network().eval()
    still, moving = torch.randn(2, 1, 6).expand(2, TOKENS, 6), torch.randn(2, TOKENS, 6)
    for sides in ((still, moving), (moving, still)):
        assert net(*sides).abs().max() < 0.1


@pytest.mark.long
def test_learns_within_seconds_which_sounds_go_with_which_pictures():
    """Each moment is one of two kinds, equally far from what is between; in the space as drawn the wrong ones meet."""
    net, draw = _network(), torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 1, 6, generator=draw) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[..., None]

    def clips(rows: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        offset = torch.randint(CLASSES, (rows,), generator=draw)
        return _cut(torch.rand(rows, TOKENS + 2 * FARTHEST, generator=draw) < 0.5, offset, kinds), offset

    def accuracy() -> float:
        sides, offset = clips(400)
        with torch.no_grad():
            return (net(*sides).argmax(1) == offset).double().mean().item()

    assert accuracy() < 0.8
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(50):
        sides, offset = clips(16)
        loss = F.cross_entropy(net(*sides), offset)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy() > 0.95
