"""Encoders as the evaluation suites of others run them: `mteb`, and X-ARES. Neither is imported before it is asked for.

A suite gives rows and asks for vectors, so its numbers are its own: its splits, its heads, its metrics.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mmssl.adaptation.request import Model
from mmssl.encoders.base import Encoder
from mmssl.hub.load import load
from mmssl.objectives.base import Objective
from mmssl.run_directory import Run

Given = Run | str | Path | Encoder | Objective


def open_model(given: Given, encoder: str | None = None, *, trust: bool = False) -> Model:
    """The network that a suite asks; that of a directory or of the Hub is on the accelerator where there is one.

    Args:
        given: a run, its directory, its name on the Hub, an encoder, or a task.
        encoder: name of the one that is asked; the first one where left out.
        trust: import the objective or encoder of your own that a run's directory names.

    Raises:
        RecipeError: where it has no encoder of that name.
        RunError: for a run that cannot be read.
    """
    if isinstance(given, str | Path):
        given = load(given, trust=trust)
        if torch.accelerator.is_available():
            given.objective.to(torch.accelerator.current_accelerator())
    return Model.of(given, encoder)
