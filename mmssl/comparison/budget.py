"""The same budget for every task: what a step puts through the encoder, and how many steps that gives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmssl.batch import Batch, count_rows
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws

UNITS = ("steps", "samples", "minutes")


@dataclass(frozen=True)
class Budget:
    """How long each task trains.

    Attributes:
        unit: `steps` of `batch` encoder samples each, `samples` through the encoder, or `minutes` of this machine.
        amount: of them.
    """

    unit: str
    amount: float

    @classmethod
    def of(cls, text: str) -> Budget:
        """From `steps=800`, `samples=1e6` or `minutes=5`.

        Raises:
            RecipeError: for anything else.
        """
        unit, _, number = text.partition("=")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if unit not in UNITS or not 0 < amount < 1e12:
            raise RecipeError(f"budget = {text!r} should be one of steps=800, samples=1e6, minutes=5")
        return cls(unit, amount)

    def steps(self, batch: int, seconds: float) -> int:
        """Optimizer steps of one task.

        Args:
            batch: encoder samples of a step.
            seconds: that a step takes; read where the budget is in minutes.
        """
        if self.unit == "steps":
            return max(1, round(self.amount))
        if self.unit == "samples":
            return max(1, round(self.amount / batch))
        return max(1, round(60 * self.amount / seconds))


def encoder_samples(objective: Objective, encoder: Encoder, batch: Batch, plain: Batch) -> float:
    """Rows that one row of the task puts through the encoder, in rows as probes see them: its two views, say.

    Measured as floating-point operations, so that a tile or a masked picture counts for what it costs. Passes without
    gradient, as those of momentum teachers, are left out; they show in the seconds.

    Args:
        objective: the task.
        encoder: one of its encoders.
        batch: rows of the task's source.
        plain: rows as probes decode them.
    """
    modality = encoder.modality
    with _counting(encoder) as counted, torch.enable_grad():
        encoder(plain[modality], plain.get(f"{modality}_mask"))
    whole = counted() / count_rows(plain)
    rows = count_rows(batch)
    was_training = objective.training
    objective.train()
    with torch.no_grad():
        inputs = objective.transform(batch, Draws(0, 0, rows))
    with _counting(encoder) as counted, torch.enable_grad():
        objective.predict(inputs)
    objective.train(was_training)
    return counted() / rows / whole if whole and counted() else 1.0


@contextmanager
def _counting(encoder: Encoder) -> Iterator[Callable[[], int]]:
    """Floating-point operations of the encoder's own calls that want a gradient."""
    total, inside = 0, False
    own = {name: getattr(encoder, name) for name in ("forward", "embed", "encode") if hasattr(encoder, name)}

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal total, inside
            if inside or not torch.is_grad_enabled():
                return method(*args, **kwargs)
            inside = True
            try:
                with FlopCounterMode(display=False) as counter:
                    return method(*args, **kwargs)
            finally:
                inside = False
                total += counter.get_total_flops()

        return call

    for name, method in own.items():
        object.__setattr__(encoder, name, watched(method))
    try:
        yield lambda: total
    finally:
        for name in own:
            object.__delattr__(encoder, name)


def step_seconds(objective: Objective, batch: Batch, repeats: int = 3) -> float:
    """Median time of transform, forward and backward pass of a batch; gradients are dropped afterward."""
    times: list[float] = []
    for number in range(repeats + 1):
        began = time.perf_counter()
        with torch.no_grad():
            inputs = objective.transform(batch, Draws(0, number, count_rows(batch)))
        loss: Tensor = objective(inputs)["loss"]
        loss.backward()
        times.append(time.perf_counter() - began)
    objective.zero_grad(set_to_none=True)
    return sorted(times[1:])[repeats // 2]
