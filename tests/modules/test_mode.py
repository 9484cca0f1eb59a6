"""Networks that work in another way for a while: layer norms whose scale is a constant, in closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import nn

from mmssl.modules.mode import constant_scales


@pytest.mark.parametrize(("kind", "options"), [(nn.LayerNorm, {}), (nn.LayerNorm, {"bias": False}), (LayerNorm, {})])
def test_gradient_times_input_is_what_a_normalized_input_contributes(kind, options):
    torch.manual_seed(0)
    norm = nn.Sequential(kind(6, eps=1e-9, **options)).double()
    if norm[0].bias is not None:
        nn.init.normal_(norm[0].weight)
        nn.init.normal_(norm[0].bias)
    x, slope = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)

    def contributions():
        found = norm(x)
        (gradient,) = torch.autograd.grad((found * slope).sum(), x)
        return found, gradient, (gradient * x).sum(1)

    with constant_scales(norm):
        found, gradient, sums = contributions()
    weight, bias = norm[0].weight, torch.zeros(6).double() if norm[0].bias is None else norm[0].bias
    torch.testing.assert_close(found, F.layer_norm(x, (6,), weight, bias, eps=1e-9))
    torch.testing.assert_close(sums, ((found - bias) * slope).sum(1))
    own = weight * slope
    torch.testing.assert_close(gradient, (own - own.mean()) / x.std(1, correction=0, keepdim=True))
    # As it is, there is nothing along what it was given, and afterwards it is as it was.
    assert contributions()[2].abs().max() < 1e-6
    assert norm[0].forward.__func__ is kind.forward
