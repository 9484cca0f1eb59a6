"""Contrastive pairs with momentum distillation: keys and soft targets from a slow copy of both towers, and a queue.

Li et al. 2021, "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", arXiv
2107.07651, section 3.3. A row is compared with the copy's keys of the global batch and of the K rows before it; the
target is partly what the copy itself finds similar, since a web caption often describes other images, too.

Known traps. A row is compared before its batch's keys enter the queue. A queue longer than an epoch holds old keys of
the very pair: those count as positives here, as all equal items do. The published code asks for K to be a multiple of
the batch, and compares with the keys of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.side import SIDES
from mmssl.modules.teacher import Teacher
from mmssl.ops.gather import gather
from mmssl.ops.queue import enqueue


class Distillation(nn.Module):
    """The copy, the queue, and the loss of rows against both.

    Args:
        towers: `a` and `b`, and `project_a` and `project_b`, their maps into the shared space.
        width: of that space.
        columns: of `items`.
        momentum: share of itself that the copy keeps at a step.
        queue: number of rows K that are kept; any, or 0.
        alpha: share of the target that the copy decides.
        ramp: steps over which that share rises linearly from 0.
    """

    pointer: Tensor
    steps: Tensor
    items: Tensor

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        width: int,
        columns: int,
        *,
        momentum: float,
        queue: int,
        alpha: float,
        ramp: int,
    ) -> None:
        super().__init__()
        self.momentum, self.alpha, self.ramp = momentum, alpha, ramp
        self.teacher = Teacher(towers)
        for side in SIDES:
            self.register_buffer(f"queue_{side}", F.normalize(torch.randn(queue, width), dim=1))
        # Nothing equals a row that was never filled: ids start at 0, and no hash is expected to be -1.
        self.register_buffer("items", torch.full((queue, columns), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._newest: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def keys(self, inputs: Batch) -> Batch:
        """`a_key` and `b_key` (B, width), unit vectors of the copy."""
        found = {}
        for side in SIDES:
            pooled = cast(Encoder, self.teacher[side])(inputs[side], inputs.get(f"{side}_valid")).pooled
            found[f"{side}_key"] = F.normalize(self.teacher[f"project_{side}"](pooled), dim=-1)
        return found

    def loss(self, outputs: Batch, items: Tensor, scale: Tensor) -> Tensor:
        """Cross-entropy over batch and queue, mean of both directions, 0-dim.

        Args:
            outputs: `a`, `b`, `a_key` and `b_key`, unit vectors (B, width).
            items: int64 (B, C); rows that agree in a column are equal.
            scale: 0-dim, 1 / temperature.
        """
        keys = {side: gather(outputs[f"{side}_key"].detach()) for side in SIDES}
        everyones = gather(items)
        if self.training:
            self._newest = (keys["a"], keys["b"], everyones)
        positive = (items[:, None] == torch.cat([everyones, self.items])).any(2)
        target = positive / positive.sum(1, keepdim=True, dtype=scale.dtype)
        share = self.alpha * ((self.steps / self.ramp).clamp(max=1) if self.ramp else 1.0)
        losses = []
        for side, other in (SIDES, SIDES[::-1]):
            columns = torch.cat([keys[other], self.get_buffer(f"queue_{other}")]).T
            taught = (scale.detach() * (outputs[f"{side}_key"].detach() @ columns)).softmax(1)
            similar = scale * (outputs[side] @ columns)
            losses.append(F.cross_entropy(similar, share * taught + (1 - share) * target))
        return (losses[0] + losses[1]) / 2

    def after_step(self, towers: Mapping[str, nn.Module]) -> None:
        """The copy follows; the newest keys replace the oldest."""
        self.teacher.follow(towers, self.momentum)
        self.steps += 1
        if self._newest is not None:
            a, b, items = self._newest
            queues = {"queue_a": a, "queue_b": b, "items": items}
            enqueue(self.pointer, [(self.get_buffer(name), rows) for name, rows in queues.items()])
            self._newest = None
