"""Encoders that learn nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from mmssl.comparison.raw import RawInput


def test_a_picture_is_the_colors_of_its_cells():
    picture = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    picture[0, 0, :2, :2] = 255
    pooled = RawInput("image")(picture).pooled.reshape(3, 16, 16)
    assert pooled[0, 0, 0] == 1
    assert pooled.sum() == 1


def test_a_clip_is_its_mean_frame_and_what_changes():
    clip = torch.zeros(1, 3, 3, 16, 16, dtype=torch.uint8)
    clip[0, 1] = 255
    mean, change = RawInput("video")(clip).pooled.reshape(2, 3, 8, 8)
    torch.testing.assert_close(mean, torch.full_like(mean, 1 / 3))
    torch.testing.assert_close(change, torch.ones_like(change))


def test_a_sound_is_the_level_and_the_spread_of_its_bands():
    time = torch.arange(16000) / 16000
    tone = torch.sin(2 * math.pi * 440 * time)[None]
    mean, spread = RawInput("audio", rate=16000)(tone).pooled.reshape(2, 64)
    louder, _ = RawInput("audio", rate=16000)(2 * tone).pooled.reshape(2, 64)
    assert mean.argmax() < 20  # 440 Hz is low
    torch.testing.assert_close(louder.max() - mean.max(), torch.tensor(2 * math.log(2)), atol=1e-3, rtol=0)
    assert (spread >= 0).all()


def test_a_text_is_the_shares_of_its_tokens():
    encoder = RawInput("text", tokenizer=SimpleNamespace(vocab_size=5))
    valid = torch.tensor([[True, True, True, False]])
    pooled = encoder(torch.tensor([[1, 3, 3, 0]]), valid).pooled
    torch.testing.assert_close(pooled, torch.tensor([[0, 1 / 3, 0, 2 / 3, 0]]))
