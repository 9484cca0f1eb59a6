"""Heads: which layer is where."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmssl.modules.heads import mlp


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("last_norm", ["plain", "scale", None])
def test_every_layer_is_where_it_is_asked_for(norm, last_norm):
    head = mlp(3, 5, 7, 2, norm=norm, bias=not norm, last_bias=True, last_norm=last_norm)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU] if norm else [nn.Linear, nn.ReLU]
    assert [type(layer) for layer in head] == [*hidden, *hidden, nn.Linear, *([nn.BatchNorm1d] if last_norm else [])]
    *inner, last = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in (*inner, last)] == [(3, 5), (5, 7), (7, 2)]
    assert all((layer.bias is None) == norm for layer in inner)
    assert last.bias is not None
    assert all(layer.affine for layer in head[:-1] if isinstance(layer, nn.BatchNorm1d))
    if last_norm:
        learned = {name for name, p in head[-1].named_parameters() if p.requires_grad}
        assert learned == ({"weight"} if last_norm == "scale" else set())
    assert head(torch.randn(4, 3)).shape == (4, 2)
