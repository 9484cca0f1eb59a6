"""The only training loop. It knows no task and no modality."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.modules.batchnorm import _BatchNorm

from mmssl.batch import Batch, count_rows, to_device
from mmssl.errors import Interrupted, RecipeError, RunError, nearest
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws, mix_seed
from mmssl.ops.gather import average, process_share
from mmssl.recipe import Training
from mmssl.training import checkpoint
from mmssl.training.optim import lr_factor, make_optimizer, set_lr, set_weight_decay
from mmssl.training.progress import Clock, Reporter, peak_memory, truncate_after
from mmssl.training.step import accumulated_backward, diagnosed

PRECISION = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


class Loader(Protocol):
    """What the loop asks of data: this process's rows of the global batches `start` to `stop - 1`, in order."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches on the CPU, all of one size."""
        ...


def fit(
    objective: Objective,
    loader: Loader,
    training: Training,
    directory: Path | None = None,
    *,
    resume: bool = False,
    probe: Callable[[], dict[str, float]] | None = None,
    probe_every: int = 0,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Train `objective` in place.

    Order of rows and every draw are functions of (seed, step, row of the global batch), so a resumed run gives the
    bits of one that never stopped, and the number of processes or micro-batches changes nothing but rounding.
    Dropout inside a backbone is the exception across layouts: its masks depend on how the batch is cut.

    Args:
        objective: moved to the device.
        loader: the data.
        training: the recipe's settings.
        directory: of the run: checkpoints, metrics.jsonl, TensorBoard; None writes nothing.
        resume: go on from the last whole checkpoint in `directory`, or start where there is none.
        probe: a labeled probe, logged under `probe/`.
        probe_every: steps between its calls; 0 for never.
        quiet: print nothing.

    Returns:
        The records of metrics.jsonl, those of earlier parts of a resumed run included.

    Raises:
        Interrupted: after SIGINT or SIGTERM, once the state is saved.
        RunError: for a loss that is not finite, or a checkpoint that cannot be written or read.
    """
    with _default_dtype(torch.float64 if training.precision == "fp64" else None), _StopFlag() as stop:
        return _fit(objective, loader, training, directory, resume, probe, probe_every, quiet, stop)


def _fit(
    objective: Objective,
    loader: Loader,
    training: Training,
    directory: Path | None,
    resume: bool,
    probe: Callable[[], dict[str, float]] | None,
    probe_every: int,
    quiet: bool,
    stop: _StopFlag,
) -> list[dict[str, Any]]:
    accelerator = _accelerator(training, directory, objective.alternates)
    _check_sharding(accelerator, probe_every if probe else 0, objective.diagnose_every)
    share, shares = process_share()
    main = accelerator.is_main_process
    say_nothing = quiet or not main

    if training.precision == "fp64":
        objective.double()
    objective.train()
    last = checkpoint.newest(directory) if directory and resume else None
    if last:
        checkpoint.load_weights(objective, last / checkpoint.WEIGHTS)
    if shares > 1:
        _synchronize_batch_norm(objective, accelerator)
    if training.compile:
        objective.compile()
    objective.to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(objective, make_optimizer(objective, training.optimizer))
    if accelerator.is_fsdp2:
        whole_outside_forward(wrapped)
    bare_optimizer = optimizer.optimizer

    done = 0
    if last:
        state = checkpoint.read_state(last)
        done = state["step"]
        checkpoint.load_optimizer(objective, bare_optimizer, last)
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
    history = _open_history(directory, done, main)
    trackers = _open_trackers(accelerator, directory, done)

    def save(step: int) -> None:
        if directory is None:
            return
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        checkpoint.save(directory, objective, bare_optimizer, {"step": step, "scaler": scaler}, main)
        accelerator.wait_for_everyone()

    metrics_file = directory / "metrics.jsonl" if directory and main else None
    chance = objective.chance(training.batch_size)
    clock = Clock()
    with Reporter(training.steps, done, chance, metrics_file, say_nothing) as reporter, _finishing(trackers):
        batches = loader.batches(done, training.steps)
        began = time.perf_counter()
        for step in range(done, training.steps):
            if objective.refresh_every and step % objective.refresh_every == 0:
                objective.refresh(WholeData(loader, objective.refresh_every, accelerator.device))
            asked = time.perf_counter()
            batch = to_device(next(batches), accelerator.device)
            clock.waited(time.perf_counter() - asked, training.batch_size)

            draws = Draws(training.seed, step, count_rows(batch), share=share, shares=shares, device=accelerator.device)
            with torch.no_grad():
                inputs = objective.transform(batch, draws)
            lr = training.optimizer.lr * lr_factor(training.schedule, step, training.steps)
            set_lr(bare_optimizer, lr)
            set_weight_decay(bare_optimizer, training.optimizer, step / training.steps)
            reseed = partial(_reseed, training.seed, step, share * training.accumulate)
            numbers: dict[str, torch.Tensor] = {}
            if objective.diagnose_every and (step + 1) % objective.diagnose_every == 0:
                scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
                numbers = diagnosed(
                    objective, inputs, training.accumulate, autocast=accelerator.autocast, reseed=reseed, scale=scale
                )
            losses = accumulated_backward(
                objective,
                wrapped,
                inputs,
                training.accumulate,
                backward=accelerator.backward,
                no_sync=lambda: accelerator.no_sync(wrapped),
                autocast=accelerator.autocast,
                reseed=reseed,
            )
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), training.clip) if training.clip else None
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                objective.after_step((step + 1) / training.steps)

            now = step + 1
            reporter.advance(now)
            ending = now == training.steps or stop.agreed(accelerator.device)
            probing = probe is not None and probe_every > 0 and now % probe_every == 0
            if now % training.log_every == 0 or now == training.steps or probing or numbers:
                record: dict[str, Any] = {"step": now}
                record |= {key: average(value).item() for key, value in losses.items()}
                record |= {key: value.item() for key, value in numbers.items()}
                if not math.isfinite(record["loss"]):
                    raise RunError(
                        f"the loss is {record['loss']} at step {now}; try a lower training.optimizer.lr, "
                        "training.clip=1 or training.precision=fp32"
                    )
                record["lr"] = lr
                if norm is not None:
                    record["gradient_norm"] = float(norm)
                record |= clock.read()
                record["peak_memory_gib"] = peak_memory()
                record["eta"] = (time.perf_counter() - began) / (now - done) * (training.steps - now)
                if probing and probe is not None:
                    record |= {f"probe/{key}": value for key, value in probe().items()}
                    objective.train()
                reporter.log(record)
                for tracker in trackers:
                    tracker.log({k: v for k, v in record.items() if k not in ("step", "eta")}, step=now)
                history.append(record)
            if ending or now % training.save_every == 0:
                save(now)
            if ending and now < training.steps:
                raise Interrupted(f"stopped at step {now} of {training.steps}; go on with --resume")
        if not say_nothing:
            from mmssl.audit.verdict import closing_lines  # its distributions take a second to import

            for line in closing_lines(history, chance, training.batch_size):
                reporter.say(line)
    return history


class WholeData:
    """What `Objective.refresh` reads, from the start at each reading.

    That is an epoch, or where it has no known end as many batches as there are steps until the next refresh.
    """

    def __init__(self, loader: Loader, refresh_every: int, device: torch.device | str) -> None:
        self._loader, self._refresh_every, self._device = loader, refresh_every, device

    def __iter__(self) -> Iterator[Batch]:
        stop = max(1, getattr(self._loader, "steps_per_epoch", None) or self._refresh_every)
        return (to_device(batch, self._device) for batch in self._loader.batches(0, stop))


def whole_outside_forward(sharded: nn.Module) -> None:
    """Let FSDP2 collect the shards for the methods that cached accumulation calls outside `forward`."""
    for method in ("predict", "loss"):
        register_fsdp_forward_method(sharded, method)


def start_processes() -> PartialState:
    """Join the other processes of torchrun or accelerate launch, where there are any; call before the first gather."""
    # Without an accelerator, accelerate forms a group of processes only when told that the CPU is meant.
    return PartialState(cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available())


def check_trackers(training: Training) -> None:
    """Raise RecipeError for a tracker that is not installed, which accelerate would leave out without a word."""
    available = {str(name) for name in get_available_trackers()}
    for name in training.trackers:
        if name not in available:
            raise RecipeError(f"training.trackers: '{name}' is not installed or not known{nearest(name, available)}")


def _accelerator(training: Training, directory: Path | None, alternates: bool) -> Accelerator:
    # Accelerate keeps the mixed precision of the first Accelerator of a process; a second fit may want another.
    start_processes()
    AcceleratorState._reset_state()
    check_trackers(training)
    others = [name for name in training.trackers if name != "tensorboard"]
    return Accelerator(
        mixed_precision=PRECISION[training.precision],
        log_with=others or None if directory else None,
        project_dir=str(directory) if directory else None,
        # Every process computes the same buffers: sending a queue of keys along with each forward pass is waste.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=alternates)],
    )


def _check_sharding(accelerator: Accelerator, probe_every: int, diagnose_every: int) -> None:
    """Raise RecipeError for what cannot work with the launcher's way of splitting a model."""
    kind = accelerator.distributed_type
    sharding = "accelerate launch --use_fsdp --fsdp_version 2"
    if kind == DistributedType.DEEPSPEED:
        raise RecipeError(
            f"DeepSpeed keeps weights and optimizer in a form that checkpoints here do not hold; use {sharding}"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RecipeError(f"FSDP of the first version hides the parameters' names; use {sharding}")
    if accelerator.is_fsdp2 and probe_every:
        raise RecipeError(
            "probe.every: a probe during training runs on one process, and the weights are sharded over all; "
            "set probe.every=0: the probe at the end runs on the whole weights"
        )
    if accelerator.is_fsdp2 and diagnose_every:
        raise RecipeError("gradients of single tasks are not measured on sharded weights; set objective.conflicts=0")


def _open_trackers(accelerator: Accelerator, directory: Path | None, done: int) -> list[Any]:
    if directory is None:
        return []
    # Made by hand: accelerate would name its folder after the project, and the project is what W&B shows.
    board = TensorBoardTracker("tensorboard", logging_dir=str(directory), purge_step=done + 1)
    accelerator.log_with.append(board)
    accelerator.init_trackers("mmssl")
    return accelerator.trackers


def _open_history(directory: Path | None, done: int, main: bool) -> list[dict[str, Any]]:
    if directory is None:
        return []
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "metrics.jsonl"
    if main:
        for name in ("metrics.jsonl", "errors.jsonl"):
            truncate_after(directory / name, done)
    if dist.is_initialized():
        dist.barrier()
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["step"] <= done]


def _reseed(seed: int, step: int, first: int, part: int) -> None:
    """For dropout: its masks repeat in a replay and after resuming, and differ between processes and micro-batches."""
    torch.manual_seed(mix_seed(seed, step, "forward", first + part))


def _synchronize_batch_norm(objective: nn.Module, accelerator: Accelerator) -> None:
    if not any(isinstance(module, _BatchNorm) for module in objective.modules()):
        return
    if accelerator.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    else:
        accelerator.print("BatchNorm is not synchronized on the CPU: statistics are those of each process's rows")


@contextmanager
def _finishing(trackers: list[Any]) -> Iterator[None]:
    # Not accelerator.end_training(), which also takes the process group down under a later probe or fit.
    try:
        yield
    finally:
        for tracker in trackers:
            tracker.finish()


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _StopFlag:
    """Turns SIGINT and SIGTERM into a flag that all processes read at the same step."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopFlag:
        for name in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[name] = signal.signal(name, self._ask)
            except ValueError:  # not the main thread: whoever runs the loop there handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step to end
        self._asked = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop."""
        if process_share()[1] == 1:
            return self._asked
        return average(torch.tensor(float(self._asked), device=device)).item() > 0
