"""What depends on what, exactly and without training: does an answer see other rows of the batch?

BatchNorm in training makes every row's output depend on all others, by which contrastive tasks with momentum encoders
can cheat (He et al. 2020, section 3.3); in evaluation nothing may.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmssl.batch import Batch, count_rows
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws


class Leak(NamedTuple):
    """Whether outputs of one row have a gradient on other rows.

    Attributes:
        mode: `evaluation` or `training`.
        largest: of the absolute gradients on other rows; None where no input can be differentiated.
        norms: names of the modules that normalize over the batch.
    """

    mode: str
    largest: float | None
    norms: tuple[str, ...]

    @property
    def text(self) -> str:
        """One sentence."""
        if self.largest is None:
            return f"in {self.mode} the inputs are whole numbers, which have no gradient"
        if self.largest == 0:
            return f"in {self.mode} no row's output depends on another row"
        why = (
            f": {len(self.norms)} BatchNorm layers, as {self.norms[0]}"
            if self.norms
            else ", which no BatchNorm explains"
        )
        return f"in {self.mode} a row's output depends on other rows (gradient {self.largest:.2g}){why}"


def between_rows(objective: Objective, batch: Batch, seed: int = 0) -> list[Leak]:
    """The largest gradient of the first row's outputs on the inputs of all others, in evaluation and in training.

    Args:
        objective: left in the mode it was in; statistics that BatchNorm keeps move as in a training step.
        batch: of two rows or more.
        seed: of the transform.
    """
    was_training = objective.training
    kinds = (nn.modules.batchnorm._BatchNorm,)
    norms = tuple(name for name, module in objective.named_modules() if isinstance(module, kinds))
    found = []
    for mode in ("evaluation", "training"):
        objective.train(mode == "training")
        with torch.no_grad():
            inputs = dict(objective.transform(batch, Draws(seed, 0, count_rows(batch))))
        inputs = {key: value.float() if value.dtype == torch.uint8 else value for key, value in inputs.items()}
        leaves = {
            key: value.requires_grad_() for key, value in inputs.items() if value.is_floating_point() and value.ndim
        }
        found.append(
            Leak(mode, _largest(objective, inputs, leaves) if leaves else None, norms if mode == "training" else ())
        )
    objective.train(was_training)
    return found


def _largest(objective: Objective, inputs: Batch, leaves: Batch) -> float:
    with torch.enable_grad():
        outputs = objective.predict(inputs)
        rows = [value[0].square().sum() for value in outputs.values() if value.requires_grad and value.ndim]
        if not rows:
            return 0.0
        gradients = torch.autograd.grad(torch.stack(rows).sum(), list(leaves.values()), allow_unused=True)
    others: list[Tensor] = [
        gradient[1:].abs().max() for gradient in gradients if gradient is not None and len(gradient) > 1
    ]
    return float(torch.stack(others).max()) if others else 0.0
