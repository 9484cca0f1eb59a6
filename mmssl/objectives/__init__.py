"""Pretext tasks, in four families; one task is one file that reads like its paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmssl.encoders.base import Encoder
from mmssl.objectives.base import Chance, Objective, Panel

__all__ = ["Chance", "Objective", "Panel", "create"]


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
    from mmssl.registry import check_keywords, find

    kind = find("objective", name)
    task: Objective = kind(encoders, **check_keywords(kind, hyper, name))
    task.spec = {"name": name, **hyper}
    return task
