"""Where a run runs: processes, devices, precision, sharding, and the signals that end it."""

from __future__ import annotations

import os
import signal
import time
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from mmssl.alive import end_with_launcher
from mmssl.errors import Interrupted, RecipeError, RunError, nearest
from mmssl.modules.batch_norm import synchronize
from mmssl.modules.blocks import blocks_of
from mmssl.objectives.base import Objective
from mmssl.ops.gather import average, process_share
from mmssl.recipe import Training
from mmssl.training.optim import make_optimizer
from mmssl.training.step import ForwardPass
from mmssl.way_on import way_on

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
        RecipeError: for a tracker that is not installed, or a launcher that would split the model in a way of its own.
    """
    # Accelerate keeps the mixed precision of the first Accelerator of a process; a second fit may want another.
    start_processes()
    AcceleratorState._reset_state()
    check_trackers(training)
    others = [name for name in training.trackers if name != "tensorboard"]
    ddp = DistributedDataParallelKwargs(
        # Every process computes the same buffers: sending a queue of keys along with each forward pass is waste.
        broadcast_buffers=False,
        # No static_graph: steps take as long, and with micro-batches under no_sync torch's reducer fails an assertion.
        find_unused_parameters=takes_turns,
        gradient_as_bucket_view=True,  # else gradients are held twice
    )
    accelerator = Accelerator(
        mixed_precision=PRECISION[training.precision],
        log_with=others or None if directory else None,
        project_dir=str(directory) if directory else None,
        kwargs_handlers=[ddp],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise RecipeError(
            f"the launcher asks for {accelerator.distributed_type.value}, and how weights are held is the recipe's: "
            "launch without it, and set training.sharded=true, which is FSDP2"
        )
    return accelerator


def is_sharded(training: Training) -> bool:
    """Whether each process holds a part of every weight: where the recipe asks for it, and there is a group of them."""
    return training.sharded and process_share()[1] > 1


def check_sharding(training: Training, probe_every: int) -> None:
    """Raise RecipeError for what cannot work on weights of which each process holds a part."""
    if not is_sharded(training):
        return
    if probe_every:
        raise RecipeError(
            "probe.every: a probe during training runs on one process, and the weights are sharded over all; "
            "set probe.every=0: the probe at the end runs on the whole weights"
        )
    if training.precision == "fp16":
        raise RecipeError("training.sharded: the scaler of fp16 sees one process's part of the gradient; use bf16")
    if training.optimizer.name in ("lars", "lamb"):
        raise RecipeError(
            f"training.sharded: {training.optimizer.name} measures whole weights, and these are sharded; use adamw or "
            "sgd, or training.sharded=false"
        )


def slow_precision(training: Training, device: torch.device) -> str | None:
    """A line where this processor computes in the recipe's half precision more slowly than in full; measured.

    One without instructions for it converts every number back and forth, which costs several times the step.
    """
    if device.type != "cpu" or training.precision not in ("bf16", "fp16"):
        return None
    half = torch.bfloat16 if training.precision == "bf16" else torch.float16
    ratio = _linear_seconds(half) / _linear_seconds(torch.float32)
    if ratio < 1.5:
        return None
    return (
        f"training.precision={training.precision}: a linear layer takes this processor {ratio:.1f} times as long as in "
        "full precision; without a GPU, training.precision=fp32 is faster"
    )


def cut_norms(objective: Objective, training: Training) -> str | None:
    """A line where micro-batches are no mere matter of memory: BatchNorm sees one at a time."""
    if training.accumulate == 1 or not any(isinstance(part, _BatchNorm) for part in objective.modules()):
        return None
    return (
        f"training.accumulate={training.accumulate}: BatchNorm sees micro-batches of "
        f"{training.batch_size // training.accumulate} rows, so that steps are others than those of the whole batch"
    )


def _linear_seconds(dtype: torch.dtype) -> float:
    """Of a linear layer of 256 x 256 on 256 rows, the fastest of five."""
    matrix = torch.ones(256, 256, dtype=dtype)
    found = []
    for _ in range(5):
        began = time.perf_counter()
        nn.functional.linear(matrix, matrix)
        found.append(time.perf_counter() - began)
    return min(found)


def sent_dtype(training: Training) -> torch.dtype | None:
    """In what the features of a loss travel between processes; None for what they are, or where there is one process.

    There is no fp16: the gradient of a mean over a large batch is below what it can hold.
    """
    return torch.bfloat16 if training.gather_precision == "bf16" and process_share()[1] > 1 else None


def prepare(objective: Objective, training: Training, accelerator: Accelerator) -> tuple[ForwardPass, nn.Module, Any]:
    """Move the objective to the device, in its precision, and wrap it where there are several processes.

    Returns:
        Its forward pass bare; the same as DDP or FSDP2 wrapped it; the optimizer, as accelerate wrapped it.
    """
    if process_share()[1] > 1 and not objective.local_norms:
        synchronize(objective, accelerator.device)
    objective.to(accelerator.device)
    if is_sharded(training):  # FSDP2 cuts no weights whose channels are last in memory
        objective.to(memory_format=torch.contiguous_format)
    passes = ForwardPass(objective, sent_dtype(training))
    if training.compile:
        passes.compile()
    optimizer = make_optimizer(objective, training.optimizer)
    if process_share()[1] == 1 and accelerator.num_processes > 1:  # a probe that one process trains while others wait
        return passes, passes, accelerator.prepare(optimizer)
    if is_sharded(training):
        shard(passes, optimizer, accelerator)
        return passes, passes, accelerator.prepare(optimizer)
    with warnings.catch_warnings():  # torch 2.13 renames it, and 2.11 does not know the new name
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        wrapped, optimizer = accelerator.prepare(passes, optimizer)
    return passes, wrapped, optimizer


def shard(passes: ForwardPass, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """FSDP2: cut every weight over the processes, and collect those of a block when it is its turn; in place.

    Weights and gradients travel in their own precision, and the forward pass is in the recipe's by autocast, as with
    DDP. accelerate's own plugin does nothing on a CPU, so that nobody could test it there.

    Args:
        passes: of an objective that is on the device.
        optimizer: of its parameters, which are others afterwards.
        accelerator: of the run.
    """
    # Said of tasks whose outputs are views, which no loss changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    before = dict(passes.named_parameters())
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks_of(passes):
        fully_shard(block, mesh=mesh)
    fully_shard(passes, mesh=mesh)
    passes.collect_shards(accelerator.autocast)
    after = {id(before[name]): parameter for name, parameter in passes.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [after[id(parameter)] for parameter in group["params"]]


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
    """Turns SIGINT, SIGTERM and SIGUSR1, which Slurm sends, into a flag that all processes read at the same step."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            try:
                self._before[name] = signal.signal(name, self._ask)
            except ValueError:  # not the main thread: whoever runs the loop there handles signals
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Put the handlers back.

        Raises:
            Interrupted: in place of an error after the signal, which has ended compilers, workers or other processes,
                too: what is said of them is not what went wrong. A state that cannot be saved stays one.
        """
        for name, handler in self._before.items():
            signal.signal(name, handler)
        if self._asked and isinstance(error, Exception) and not isinstance(error, Interrupted | RunError | OSError):
            raise Interrupted(
                f"stopped before the step was done ({type(error).__name__}); {way_on()} from the last checkpoint"
            ) from error

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step to end
        self._asked = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop."""
        if process_share()[1] == 1:
            return self._asked
        return average(torch.tensor(float(self._asked), device=device)).item() > 0
