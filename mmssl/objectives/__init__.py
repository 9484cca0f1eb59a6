"""Pretext tasks, in four families; one task is one file that reads like its paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch

from mmssl.encoders import create as create_encoder
from mmssl.encoders.base import Encoder
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.registry import check_keywords, find

__all__ = ["Chance", "Objective", "Panel", "create", "reinitialized"]

_made: WeakKeyDictionary[Objective, tuple[str, dict[str, Any]]] = WeakKeyDictionary()


def create(name: str, encoders: Mapping[str, Encoder], **hyper: Any) -> Objective:
    """Build a task.

    Args:
        name: of a module of this room, for instance `rotation`, or dotted for one outside the library.
        encoders: name -> encoder; the name is the modality unless the recipe says otherwise.
        **hyper: keyword-only arguments of the task's constructor.

    Raises:
        RecipeError: for a task, keyword or value that does not exist or does not fit.
        ValueError: for an encoder that the task needs and does not get.
    """
    kind = find("objective", name)
    task: Objective = kind(encoders, **check_keywords(kind, hyper, name))
    _made[task] = (name, hyper)
    return task


def reinitialized(task: Objective, seed: int) -> Objective:
    """The same task over the same networks, all with new random weights, in evaluation mode on the CPU.

    Raises:
        TypeError: for a task that `create` did not make, so that its arguments are not known.
    """
    if task not in _made:
        raise TypeError(f"{type(task).__name__} was made by its class; mmssl.objective makes one that can be repeated")
    name, hyper = _made[task]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = {key: create_encoder(**cast(Encoder, task.encoders[key]).spec) for key in task.encoders}
        return create(name, encoders, **hyper).eval()
