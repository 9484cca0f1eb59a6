"""What is measured besides the loss: the room that features take, and the first batch again at the end.

Both leave the run as it is: parameters, buffers, random numbers and the statistics of norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mmssl.batch import Batch, middle_window
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.mode import evaluating
from mmssl.objectives.base import EMBEDDINGS, VALID, Objective
from mmssl.ops.gather import average, gather, process_share
from mmssl.ops.losses import spread
from mmssl.ops.representation import alignment, dead_share, effective_rank, uniformity
from mmssl.recipe import Training
from mmssl.training.step import Context, ForwardPass, accumulated_backward, unchanged

MONITOR = "monitor"
"""Records hold `monitor/<encoder>/rank`, `spread`, `dead`, `uniformity`, and `alignment` where there are pairs.

The same stands under `monitor/embeddings` where a task compares embeddings.
"""
SAME_ROWS = "same_rows"
"""The last record holds `same_rows/<entry>`: the rows and draws of step 0, with the trained network."""
TIMES = 10  # a run, and once more before it
ROWS = 256  # of the global batch at most


class Monitors:
    """Rank, spread, dead dimensions and uniformity of the pooled features of each exported encoder.

    They are measured before the first step, at the last, and at the first record after each tenth of the run, on the
    first rows of the step's global batch: 256 at most, in evaluation mode without gradient. Where a task draws views or
    encoders together, their alignment is measured as well, and the room of the embeddings that it compares, in training
    mode as the loss sees them. An encoder that cannot read rows as they are decoded, for instance at another size than
    that of its views, is left out.

    Args:
        objective: in training.
        training: the recipe's settings.
        autocast: context of the forward pass.
        sharded: whether no process has whole weights; nothing is measured then.
    """

    def __init__(self, objective: Objective, training: Training, autocast: Context, sharded: bool) -> None:
        self.objective, self.training, self.autocast, self.sharded = objective, training, autocast, sharded
        self._rows: Batch = {}
        self._left_out: set[str] = set()

    def due(self, now: int) -> bool:
        """Whether the record after `now` steps holds them: a function of the recipe alone, so that resuming agrees."""
        steps, every = self.training.steps, self.training.log_every
        if self.sharded or (now % every and now != steps):
            return False
        before = (now - 1) // every * every
        return now in (0, steps) or TIMES * now // steps > TIMES * before // steps

    def keep(self, number: int, batch: Batch) -> Batch:
        """Hand through the raw rows of a step; the first ones are kept where its record holds the monitors."""
        wanted = number == 0 or self.due(number + 1)
        self._rows = middle_window(_first(batch)) if wanted and not self.sharded else {}
        return batch

    @torch.no_grad()
    def read(self, inputs: Batch) -> dict[str, float]:
        """`monitor/...` of the rows kept; the same on every process.

        Args:
            inputs: what `transform` made of them.
        """
        if not self._rows:
            return {}
        with unchanged(self.objective):
            _take_first_statistics(self.objective)
            numbers = self._measure(inputs)
        return {f"{MONITOR}/{key}": float(value) for key, value in numbers.items()}

    def _measure(self, inputs: Batch) -> dict[str, Tensor]:
        numbers: dict[str, Tensor] = {}
        with evaluating(self.objective):
            features = {name: found for name, e in self.objective.exported.items() if (found := self._read(name, e))}
        with unchanged(self.objective), self.autocast():
            views = self.objective.drawn_together(_first(inputs))
        for name, (pooled, _) in features.items():
            numbers |= {f"{name}/{key}": value for key, value in _room(pooled).items()}
        for name, vectors in views.items():
            together = gather(vectors.float())
            if together.shape[1] == 2:
                numbers[f"{name}/alignment"] = alignment(*together.unbind(1))
            if name.rpartition("/")[2] == EMBEDDINGS:
                numbers |= {f"{name}/{key}": value for key, value in _room(together.flatten(0, 1)).items()}
        for two in self.objective.pairs:
            if two.embed and two.a in features and two.b in features:
                with evaluating(self.objective):
                    a, b = (side(features[name][1]) for side, name in zip(two.embed, (two.a, two.b), strict=True))
                numbers[f"{two.a}_{two.b}/alignment"] = alignment(gather(a.float()), gather(b.float()))
        return numbers

    def _read(self, name: str, encoder: Encoder) -> tuple[Tensor, Any] | None:
        """Pooled features of all processes' rows, and the Features of this one's."""
        key = next((key for key in self._rows if key.rpartition("/")[2] == encoder.modality), None)
        if key is None or name in self._left_out:
            return None
        try:
            with self.autocast():
                features = encoder(self._rows[key], self._rows.get(f"{key}_mask"))
        except (RuntimeError, ValueError, AssertionError, RecipeError):  # libraries differ in how they refuse a size
            self._left_out.add(name)
            return None
        return gather(features.pooled.float()), features


def _take_first_statistics(module: nn.Module) -> None:
    """Where norms are not synchronized, each process has running statistics of its own, and one's are stored."""
    if process_share()[1] > 1:
        for norm in module.modules():
            if isinstance(norm, _NormBase):
                for buffer in norm.buffers(recurse=False):
                    dist.broadcast(buffer, 0)


def _first(batch: Batch) -> Batch:
    rows = max(1, ROWS // process_share()[1])
    return {key: value[:rows] if value.ndim else value for key, value in batch.items()}


def _room(pooled: Tensor) -> dict[str, Tensor]:
    """Not of rows that are not finite: the loss says so sooner."""
    if not pooled.isfinite().all():
        return {}
    room = {"rank": effective_rank(pooled), "spread": spread(pooled), "dead": dead_share(pooled)}
    return room | ({"uniformity": uniformity(pooled)} if len(pooled) > 1 else {})


def losses_of(
    passes: ForwardPass, inputs: Batch, parts: int, autocast: Context, reseed: Callable[[int], None]
) -> dict[str, float]:
    """The entries of the loss as a step would log them, without the step: averaged over micro-batches and processes.

    Args:
        passes: bare, or as FSDP2 wrapped it.
        inputs: of this process's rows.
        parts: micro-batches.
        autocast: context of the forward pass.
        reseed: as for `accumulated_backward`.
    """

    def forward(*arguments: Any) -> dict[str, Tensor]:
        with autocast():
            losses: dict[str, Tensor] = passes(*arguments)
            return losses

    with unchanged(passes):
        losses = accumulated_backward(
            passes, inputs, parts, wrapped=forward, backward=lambda loss: None, autocast=autocast, reseed=reseed
        )
    found = averaged(losses, passes.objective.scored(inputs))
    return {f"{SAME_ROWS}/{key}": value for key, value in found.items()}


def averaged(losses: Mapping[str, Tensor], scored: Mapping[str, Tensor]) -> dict[str, float]:
    """Losses of a step as its record holds them: over all processes, and without those that are means over nothing.

    Of a task that left out all rows, or had nothing to predict in any, `valid` alone is left, and is 0: a loss of 0
    would be read as its score.

    Args:
        losses: of this process's rows.
        scored: see `Objective.scored`.
    """
    numbers = {key: average(value).item() for key, value in losses.items()}
    nothing = [task for task, count in scored.items() if average(count).item() == 0]
    numbers |= {f"{task}/{VALID}" if task else VALID: 0.0 for task in nothing}
    names = {key: key.rpartition("/")[::2] for key in numbers}
    empty = {task for key, (task, name) in names.items() if name == VALID and numbers[key] == 0}
    inside = tuple(f"{task}/" if task else "" for task in nothing)
    return {
        key: number
        for key, number in numbers.items()
        if names[key][1] == VALID or not (names[key][0] in empty or key.startswith(inside))
    }
