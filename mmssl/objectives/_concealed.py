"""What a task hides from its own network: the audit asks whether an answer sees it all the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmssl.batch import Batch


class Later(NamedTuple):
    """Tokens of which each answer may see those before its own place alone.

    Attributes:
        key: of the inputs, int64 (B, L).
        place: int64 (N,), which of the L places each of the N answers is about.
    """

    key: str
    place: Tensor

    @classmethod
    def of(cls, key: str, valid: Tensor, first: int = 0) -> Later:
        """Of answers row by row, one for each True in `valid` (B, L - first), the first of which is place `first`."""
        place = torch.arange(first, first + valid.shape[1], device=valid.device)
        return cls(key, place.expand_as(valid)[valid])


class Concealed(NamedTuple):
    """What no answer may depend on.

    Attributes:
        answers: inputs -> what the network says before it is compared with a target, floats (N, ...).
        hidden: key of the inputs -> bool of its shape, or one that broadcasts to it, True where nothing may be read.
        shown: bool, of each thing that is hidden whether what is read shows it as it was; None where the network is
            handed everything, and `hidden` says what of it does not count.
        allowed: share of these that is shown on purpose.
        later: of tasks that go from left to right.
    """

    answers: Callable[[Batch], Tensor]
    hidden: Mapping[str, Tensor] = {}
    shown: Tensor | None = None
    allowed: float = 0.0
    later: Later | None = None
