"""A mask of the size of the spectrogram, which depends on what is seen."""

from __future__ import annotations

import pytest
import torch

from mmssl.modules.separator import Separator


@pytest.mark.parametrize("size", [(65, 63), (33, 10), (16, 16)])
@pytest.mark.parametrize("moments", [1, 7])
def test_any_size_and_any_number_of_moments(size, moments):
    network = Separator(3, 4, 3)
    magnitude, seen = torch.rand(2, *size), torch.randn(2, moments, 3)
    mask = network(magnitude, seen)
    assert mask.shape == (2, *size)
    assert ((mask > 0) & (mask < 1)).all()
    assert not torch.equal(mask, network(magnitude, seen.flip(0)))
    assert torch.allclose(mask[:1], network(magnitude[:1], seen[:1]), atol=1e-6)  # row by row
    mask.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
