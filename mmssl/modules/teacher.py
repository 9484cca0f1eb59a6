"""Momentum teachers: a copy of some modules that follows them slowly and learns nothing itself.

theta' <- m theta' + (1 - m) theta after each step (He et al. 2020, arXiv 1911.05722, equation 2). Only parameters
follow; the copy's BatchNorm keeps statistics of its own, from its own forward passes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torchvision.ops import StochasticDepth


class Teacher(nn.ModuleDict):
    """A copy of the students by their names, without gradient; part of the state, so that checkpoints hold it.

    Args:
        students: name -> module.
    """

    def __init__(self, students: Mapping[str, nn.Module]) -> None:
        super().__init__(copy.deepcopy(dict(students)))
        self.requires_grad_(False)

    @torch.no_grad()
    def begin(self, number: int, students: Mapping[str, nn.Module]) -> None:
        """Before the first step of the task be what the students are by then.

        In a combination they may have learned before it, and a copy of what they were at random would teach nothing.

        Args:
            number: of the step, from 0 for the task's own first; see `Step`.
            students: name -> module.
        """
        if number == 0:
            self.renew(students)

    @torch.no_grad()
    def renew(self, students: Mapping[str, nn.Module]) -> None:
        """Be what the students are now: their parameters and buffers."""
        for name, student in students.items():
            own = dict(self[name].named_parameters()) | dict(self[name].named_buffers())
            for path, value in (*student.named_parameters(), *student.named_buffers()):
                own[path].copy_(value)

    @torch.no_grad()
    def follow(self, students: Mapping[str, nn.Module], momentum: float) -> None:
        """Move every parameter toward that of the same name in `students`; `momentum` is the share that it keeps."""
        for name, student in students.items():
            own = dict(self[name].named_parameters())
            for path, parameter in student.named_parameters():
                own[path].lerp_(parameter, 1 - momentum)


def cosine_momentum(start: float, progress: float) -> float:
    """From `start` at progress 0 to 1 at progress 1 along a cosine (BYOL, arXiv 2006.07733, section 3.2)."""
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2


def has_dropout(module: nn.Module) -> bool:
    """Whether dropout or stochastic depth is on in training mode."""
    return any((getattr(part, rate) or 0) > 0 for part, rate in _dropping(module))


def without_dropout(module: nn.Module) -> None:
    """Turn dropout and stochastic depth off, also in training mode."""
    for part, rate in _dropping(module):
        setattr(part, rate, 0.0)


def _dropping(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The parts that drop something in training, each with the name of its rate."""
    for part in module.modules():
        if type(part).__name__.endswith("DropPath"):  # timm's, and one for each network of transformers
            yield part, "drop_prob"
        elif isinstance(part, nn.modules.dropout._DropoutNd | StochasticDepth):
            yield part, "p"
