"""Networks that learn labels by the one loop: a whole encoder in fine-tuning, or a head on frozen features."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.adaptation.probes.base import Learner, Setting, X
from mmssl.adaptation.targets.base import Target
from mmssl.batch import Batch, to_device
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.mode import evaluating
from mmssl.objectives.base import Chance, Objective
from mmssl.ops.draws import Draws, mix_seed
from mmssl.ops.gather import process_share
from mmssl.recipe import Optimizer, Schedule, Training
from mmssl.training.loop import fit

log = logging.getLogger("mmssl")
CHECKPOINTS = 10
"""Of a training that can be resumed, where it is long."""
APART = 20
"""Steps between two of them at least: writing one may take longer than a step."""
TELL = 20.0
"""Seconds between two lines that say how far a training is."""


class Readable(Protocol):
    """Rows that are read when a step wants them."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def read(self, picks: Iterable[Tensor]) -> Iterator[Batch]:
        """A batch for each of `picks`, places of rows, int64."""
        ...


class Readout(Protocol):
    """Labels that are read when a step wants them; a tensor is one."""

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Those of places of rows, int64; rows first."""
        ...


class LabeledTask(Objective):
    """The target's loss of a network's outputs. It reads labels, which no pretext task does.

    Args:
        encoders: that are trained along; may be empty.
        inputs: batch keys that `predict` reads, of which some may be missing.
        target: what the labels are.
        units: shift and scale of values, as `Target.units` makes them of the training labels.
    """

    def __init__(
        self, encoders: Mapping[str, Encoder], inputs: Sequence[str], target: Target, units: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__(encoders)
        self.target, self.inputs = target, tuple(inputs)
        self.needs = (self.inputs[0], "label")
        self.shift, self.scale = map(nn.Buffer, units)

    def chance(self, rows: int) -> Chance:
        """Not known before the labels are."""
        return Chance(None)

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Rows as they are; no augmentation."""
        return {key: batch[key] for key in (*self.inputs, "label") if key in batch}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """That of the target."""
        return {"loss": self.target.loss(outputs["outputs"], (inputs["label"] - self.shift) / self.scale)}

    def answer(self, inputs: Batch) -> Tensor:
        """The target's answers, (B, width), in the units of the labels."""
        return self.target.answer(self.predict(inputs)["outputs"]) * self.scale + self.shift


class HeadTask(LabeledTask):
    """A network on frozen features.

    Args:
        network: from the tensors under `inputs`, None for one that is missing, to outputs (B, width).
        inputs: see `LabeledTask`.
        target: see `LabeledTask`.
        units: see `LabeledTask`.
    """

    def __init__(self, network: nn.Module, inputs: Sequence[str], target: Target, units: tuple[Tensor, Tensor]) -> None:
        super().__init__({}, inputs, target, units)
        self.network = network

    def predict(self, inputs: Batch) -> Batch:
        """`outputs` (B, width)."""
        return {"outputs": self.network(*(inputs.get(key) for key in self.inputs))}


class Shuffled:
    """Rows in an order that is new in each epoch, read as they come; the loop's loader.

    Args:
        rows: N of them.
        labels: of the N rows, for the key `label`.
        batch_size: rows of a step, at most N.
        seed: of the order.
        what: is trained, for a line now and then that says how far it is.
        total: steps of it.
    """

    def __init__(
        self, rows: Readable, labels: Readout, batch_size: int, seed: int, what: str = "training", total: int = 0
    ) -> None:
        self.rows, self.labels, self.batch_size, self.seed = rows, labels, batch_size, seed
        self.what, self.total, self.told = what, total, time.monotonic()

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This process's rows of batches `start` to `stop - 1`; an epoch may end inside of one."""
        share, shares = process_share()
        rows = self.batch_size // shares
        chosen = [self._choose(step)[share * rows : (share + 1) * rows] for step in range(start, stop)]
        for step, (index, batch) in enumerate(zip(chosen, self.rows.read(chosen), strict=True), start):
            if not share and time.monotonic() - self.told > TELL:
                log.info("%s: step %d of %d", self.what, step, self.total or stop)
                self.told = time.monotonic()
            yield {**batch, "label": self.labels[index]}

    def _choose(self, step: int) -> Tensor:
        total = len(self.rows)
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = {e: np.random.default_rng(mix_seed(self.seed, e)).permutation(total) for e in {*places // total}}
        return torch.tensor([epochs[place // total][place % total] for place in places])


class Watcher(Protocol):
    """What may stop a training."""

    every: int

    def is_enough(self, objective: Any) -> bool:
        """Is asked every so many steps."""
        ...


class _Enough(Exception):
    """Leaves the loop before its last step."""


def train(
    objective: Objective,
    rows: Readable,
    labels: Readout,
    *,
    lr: float,
    weight_decay: float,
    steps: int,
    batch_rows: int,
    seed: int,
    stop: int = 0,
    watch: Watcher | None = None,
    directory: Path | None = None,
) -> None:
    """Train in place: AdamW, a tenth of the steps to warm up, then a cosine.

    Args:
        objective: its network is moved to the device.
        rows: N of them.
        labels: of them, for the key `label`; see `Shuffled`.
        lr: the peak.
        weight_decay: of AdamW.
        steps: of the optimizer; few rows are passed through more often.
        batch_rows: of a step, at most N.
        seed: of the order and of every draw.
        stop: after so many of the steps; 0 for the last.
        watch: may stop it before.
        directory: of checkpoints, from the last of which it goes on; None writes none.

    Raises:
        RecipeError: where the rows of a step cannot be divided among the processes.
    """
    batch_size, processes = min(batch_rows, len(rows)), process_share()[1]
    if batch_size % processes:
        raise RecipeError(f"{batch_size} rows of a step cannot be divided among {processes} processes; set batch_rows")
    training = Training(
        steps=steps,
        batch_size=batch_size,
        save_every=max(APART, steps // CHECKPOINTS),
        seed=seed,
        optimizer=Optimizer(lr=lr, weight_decay=weight_decay),
        schedule=Schedule(warmup=steps // 10),
    )

    def look() -> dict[str, float]:
        if watch is None or watch.is_enough(objective):
            raise _Enough
        return {}

    every = stop if watch is None else watch.every
    with suppress(_Enough):
        loader = Shuffled(rows, labels, training.batch_size, seed, f"learning labels, lr {lr:g}", stop or steps)
        options: dict[str, Any] = {
            "resume": directory is not None,
            "probe": look if every else None,
            "probe_every": every,
        }
        fit(objective, loader, training, directory, quiet=True, **options)


def answers(objective: LabeledTask, rows: Readable, batch_size: int) -> Tensor:
    """Answers for every row, float (M, width) on the CPU."""
    device = next(objective.parameters()).device
    batches = rows.read(torch.arange(len(rows)).split(batch_size))
    with evaluating(objective), torch.no_grad():
        return torch.cat([objective.answer(to_device(batch, device)).cpu() for batch in batches])


class HeadLearner(Learner[X]):
    """Learns a head on frozen features, a learning rate at a time.

    Args:
        lr: candidates for the peak learning rate.
        steps: optimizer steps; few rows are passed through more often.
        batch_rows: rows of a step, at most all of them.
        weight_decay: of AdamW.
    """

    trains: ClassVar[bool] = True

    def __init__(self, lr: tuple[float, ...], steps: int, batch_rows: int, weight_decay: float) -> None:
        super().__init__()
        self.lr, self.steps, self.batch_rows, self.weight_decay = lr, steps, batch_rows, weight_decay

    def settings(self) -> Sequence[Setting]:
        """Learning rates, the lowest first."""
        return [{"lr": lr} for lr in sorted(self.lr)]

    def fit_heads(
        self,
        network: Callable[[], nn.Module],
        inputs: Sequence[str],
        target: Target,
        rows: Readable,
        labels: Tensor,
        test: Readable,
        settings: Sequence[Setting],
        seed: int,
    ) -> Iterator[Tensor]:
        """`Learner.predict` with rows as they are read.

        Args:
            network: makes one, with random weights; see `HeadTask`.
            inputs: what it takes of a batch of rows; see `HeadTask`.
            target: see `Learner.predict`.
            rows: see `Learner.predict`.
            labels: see `Learner.predict`.
            test: see `Learner.predict`.
            settings: see `Learner.predict`.
            seed: of weights and order.
        """
        for setting in settings:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                task = HeadTask(network(), inputs, target, target.units(labels))
            train(
                task,
                rows,
                target.matrix(labels),
                lr=setting["lr"],
                weight_decay=self.weight_decay,
                steps=self.steps,
                batch_rows=self.batch_rows,
                seed=seed,
            )
            yield answers(task, test, 4 * self.batch_rows)
