"""Where a run runs: processes, devices, precision, sharding, and the signals that end it."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmssl.alive import end_with_launcher
from mmssl.errors import RecipeError, nearest
from mmssl.objectives.base import Objective
from mmssl.ops.gather import average, process_share
from mmssl.recipe import Training
from mmssl.training.optim import make_optimizer
from mmssl.training.step import ForwardPass

PRECISION = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


def start_processes() -> PartialState:
    """Join the other processes of torchrun or accelerate launch, where there are any; call before the first gather."""
    end_with_launcher()
    # Without an accelerator, accelerate forms a group of processes only when told that the CPU is meant.
    return PartialState(cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available())


def device_name(device: torch.device) -> str:
    """The name of a GPU; `CPU` and the like elsewhere."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def check_trackers(training: Training) -> None:
    """Raise RecipeError for a tracker that is not installed, which accelerate would leave out without a word."""
    available = {str(name) for name in get_available_trackers()}
    for name in training.trackers:
        if name not in available:
            raise RecipeError(f"training.trackers: '{name}' is not installed or not known{nearest(name, available)}")


def make_accelerator(training: Training, directory: Path | None, takes_turns: bool) -> Accelerator:
    """The processes and devices that there are, with the recipe's precision and trackers.

    Args:
        training: the recipe's settings.
        directory: of the run; None where nothing is tracked.
        takes_turns: see `Objective`.

    Raises:
        RecipeError: for a tracker that is not installed.
    """
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
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=takes_turns)],
    )


def check_sharding(accelerator: Accelerator, probe_every: int) -> None:
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


def prepare(objective: Objective, training: Training, accelerator: Accelerator) -> tuple[ForwardPass, nn.Module, Any]:
    """Move the objective to the device, in its precision, and wrap it as the launcher asks.

    Returns:
        Its forward pass bare; the same as DDP or FSDP2 wrapped it; the optimizer, as accelerate wrapped it.
    """
    if process_share()[1] > 1:
        _synchronize_batch_norm(objective, accelerator)
    objective.to(accelerator.device)
    if accelerator.is_fsdp2:  # it cuts no weights whose channels are last in memory
        objective.to(memory_format=torch.contiguous_format)
    passes = ForwardPass(objective)
    if training.compile:
        passes.compile()
    optimizer = make_optimizer(objective, training.optimizer)
    if process_share()[1] == 1 and accelerator.num_processes > 1:  # a probe that one process trains while others wait
        return passes, passes, accelerator.prepare(optimizer)
    with warnings.catch_warnings():  # torch 2.13 renames it, and 2.11 does not know the new name
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        wrapped, optimizer = accelerator.prepare(passes, optimizer)
    if accelerator.is_fsdp2:
        wrapped.collect_shards()
    return passes, wrapped, optimizer


def _synchronize_batch_norm(objective: Objective, accelerator: Accelerator) -> None:
    if objective.local_norms or not any(isinstance(module, _BatchNorm) for module in objective.modules()):
        return
    if accelerator.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    else:
        accelerator.print("BatchNorm is not synchronized on the CPU: statistics are those of each process's rows")


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """New tensors of floats are of this type inside; None for what they are outside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class StopFlag:
    """Turns SIGINT and SIGTERM into a flag that all processes read at the same step."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
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
