"""Frequencies of tokens: of earlier steps alone, of all processes."""

from __future__ import annotations

import math

import torch

from mmssl.modules import unigram
from mmssl.modules.unigram import Unigram


def see(counts: Unigram, *tokens: int) -> None:
    counts.see(torch.tensor(tokens), torch.ones(len(tokens), dtype=torch.bool))


def test_what_is_judged_is_not_yet_counted():
    counts = Unigram(6, kinds=4)
    tokens = torch.tensor([[2, 2, 3]])
    counts.see(torch.tensor([[2, 2, 3, 5]]), torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(counts.surprise(tokens), torch.full((1, 3), math.log(4)))
    counts.update()
    torch.testing.assert_close(counts.surprise(tokens)[0], -torch.tensor([3 / 7, 3 / 7, 2 / 7]).log())
    counts.update()  # nothing new was seen
    assert counts.counts.tolist() == [0, 0, 2, 1, 0, 0]
    assert math.isclose((-counts.surprise(torch.arange(2, 6))).exp().sum(), 1, rel_tol=1e-6)


def test_a_second_look_at_a_step_replaces_the_first():
    counts = Unigram(4, kinds=4)
    see(counts, 1, 1)
    see(counts, 3)
    counts.update()
    assert counts.counts.tolist() == [0, 0, 0, 1]


def test_all_processes_count(monkeypatch):
    monkeypatch.setattr(unigram, "total", lambda seen: 3 * seen)
    counts = Unigram(4, kinds=4)
    see(counts, 1)
    counts.update()
    assert counts.counts.tolist() == [0, 3, 0, 0]


def test_counts_are_state():
    counts, again = Unigram(4, kinds=4), Unigram(4, kinds=4)
    see(counts, 1, 2)
    assert set(counts.state_dict()) == {"counts"}
    counts.update()
    again.load_state_dict(counts.state_dict())
    assert torch.equal(again.surprise(torch.arange(4)), counts.surprise(torch.arange(4)))
