"""Do two tasks pull the parameters that they share the same way? Cosines and norms of their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations

import torch
from torch import Tensor

COSINE, SHARE = "conflict", "gradient_share"  # prefixes in the records


def compare(gradients: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Cosines and shares of gradients.

    Args:
        gradients: task -> parameter -> weighted gradient. A parameter that a task does not train is left out.

    Returns:
        `conflict/<a>_<b>`: cosine over the parameters that both train, for each pair that has such;
        `gradient_share/<task>`: its norm over the sum of all norms. What is not finite is left out.
    """
    norms = {task: _dot(own, own, own).sqrt() for task, own in gradients.items()}
    total = torch.stack(list(norms.values())).sum()
    found = {f"{SHARE}/{task}": norm / total for task, norm in norms.items()}
    for a, b in combinations(gradients, 2):
        own, other = gradients[a], gradients[b]
        shared = [key for key in own if key in other]
        if shared:
            lengths = _dot(own, own, shared).sqrt() * _dot(other, other, shared).sqrt()
            found[f"{COSINE}/{a}_{b}"] = _dot(own, other, shared) / lengths
    return {key: value for key, value in found.items() if torch.isfinite(value)}


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor], keys: Iterable[str]) -> Tensor:
    return torch.stack([(a[key] * b[key]).sum() for key in keys]).sum()
