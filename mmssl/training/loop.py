"""The only training loop. It knows no task and no modality."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmssl.batch import Batch, count_rows, to_device
from mmssl.errors import Interrupted, RunError
from mmssl.modules.blocks import learning_blocks, recomputed
from mmssl.objectives.base import Objective, Step
from mmssl.ops.draws import Draws, mix_seed
from mmssl.ops.gather import gather, process_share, wait_for_everyone
from mmssl.recipe import Training
from mmssl.training import checkpoint
from mmssl.training.history import History
from mmssl.training.launch import (
    StopFlag,
    check_sharding,
    cut_norms,
    default_dtype,
    is_sharded,
    make_accelerator,
    prepare,
    slow_precision,
)
from mmssl.training.monitors import Monitors, averaged, losses_of
from mmssl.training.optim import lr_factor, set_lr, set_weight_decay
from mmssl.training.progress import AUGMENTATION, DECODING, NETWORK, OPTIMIZER, Clock, peak_memory
from mmssl.training.step import accumulated_backward, task_gradients, unchanged
from mmssl.way_on import way_on

ENDLESS = 2**62


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
        The records of metrics.jsonl, those of earlier parts of a resumed run included. The first is of step 0, the
        untrained network on the first batch; the last holds the same rows and draws again, as `same_rows/...`.

    Raises:
        Interrupted: after SIGINT, SIGTERM or SIGUSR1, once the state is saved.
        RunError: for a loss that is not finite, or a checkpoint that cannot be written or read.
    """
    double = training.precision == "fp64"
    blocks = learning_blocks(objective) if training.checkpointing else []
    with default_dtype(torch.float64 if double else None), StopFlag() as stop, recomputed(blocks):
        accelerator = make_accelerator(training, directory, objective.takes_turns)
        check_sharding(training, probe_every if probe else 0)
        device, scaler, (share, shares) = accelerator.device, accelerator.scaler, process_share()
        if double:
            objective.double()
        objective.train()
        last = checkpoint.newest(directory) if directory and resume else None
        if last:
            checkpoint.check_bits(last)
            checkpoint.load_weights(objective, last / checkpoint.WEIGHTS)
        passes, wrapped, scaled = prepare(objective, training, accelerator)
        # accelerate's own step and backward pass search the installed packages and divide by 1, at every step.
        optimizer: torch.optim.Optimizer = scaled.optimizer
        optimizer_step = optimizer.step if scaler is None else scaled.step
        backward = torch.Tensor.backward if scaler is None else accelerator.backward
        done = checkpoint.restore(objective, optimizer, scaler, last) if last else 0
        if last and directory and accelerator.is_main_process:
            checkpoint.settle(directory)
        batches = loader.batches(done, training.steps)
        clock = Clock(device)

        def inputs_of(number: int, batch: Batch) -> Batch:
            """What the task makes of the rows of a step."""
            draws = Draws(training.seed, number, count_rows(batch), share=share, shares=shares, device=device)
            with torch.no_grad():
                return objective.transform(batch, draws)

        def next_inputs(number: int) -> Batch:
            clock.enter(DECODING)
            batch = to_device(clock.waiting_for(batches, training.batch_size), device)
            clock.enter(AUGMENTATION)
            inputs = inputs_of(number, monitors.keep(number, batch))
            clock.enter("")
            return inputs

        def first_rows_again() -> dict[str, float]:
            """The losses of step 0 with the network as it is now."""
            reseed = partial(_reseed, training, 0, share, device)
            with unchanged(objective):
                inputs = inputs_of(0, to_device(next(iter(loader.batches(0, 1))), device))
                again = losses_of(passes, inputs, training.accumulate, accelerator.autocast, reseed)
            if not all(map(math.isfinite, again.values())):
                advice = checkpoint.way_out(directory)
                raise RunError(f"the trained network's loss is not finite on the rows of step 1; {advice}")
            return again

        chance, finite = objective.chance(training.batch_size), _Finite(device)
        monitors = Monitors(objective, training, accelerator.autocast, is_sharded(training))
        with History(accelerator, directory, training.steps, done, chance, quiet) as history:
            for note in (slow_precision(training, device), cut_norms(objective, training)):
                if note:
                    history.say(note)
            began = time.perf_counter()
            for number in range(done, training.steps):
                parts, reseed = training.accumulate, partial(_reseed, training, number, share, device)
                numbers: dict[str, Tensor] = {}
                step = Step(
                    number,
                    data=partial(whole_data, loader, device),
                    prepare=partial(next_inputs, number),
                    gradients=partial(
                        task_gradients,
                        objective,
                        parts=parts,
                        autocast=accelerator.autocast,
                        reseed=reseed,
                        scale=scaler.get_scale() if scaler is not None else 1.0,
                        sent=passes.sent,
                    ),
                    log=numbers.update,
                    sharded=is_sharded(training),
                )
                objective.before_step(step)
                untrained = monitors.read(step.inputs) if number == 0 else {}
                lr = training.optimizer.lr * lr_factor(training, number)
                set_lr(optimizer, lr)
                set_weight_decay(optimizer, training.optimizer, number / training.steps)
                inputs = step.inputs
                clock.enter(NETWORK)
                losses = accumulated_backward(
                    passes,
                    inputs,
                    parts,
                    wrapped=wrapped,
                    backward=backward,
                    no_sync=partial(accelerator.no_sync, wrapped),
                    autocast=accelerator.autocast,
                    reseed=reseed,
                )
                clock.enter("")
                if scaler is None:  # which passes over a step that overflows
                    finite.see(number, losses["loss"])
                if number == 0:  # the losses are those of a network that no step has changed
                    finite.see(number, losses["loss"])
                    finite.check(loader, directory)
                    history.log({"step": 0} | averaged(losses, objective.scored(inputs)) | untrained)
                clock.enter(OPTIMIZER)
                norm = accelerator.clip_grad_norm_(wrapped.parameters(), training.clip) if training.clip else None
                optimizer_step()
                optimizer.zero_grad()
                now = number + 1
                with torch.no_grad():
                    objective.after_step(now / training.steps)
                clock.enter("")

                history.advance(now)
                ending = now == training.steps or stop.agreed(device)
                probing = probe is not None and probe_every > 0 and now % probe_every == 0
                if now % training.log_every == 0 or now == training.steps or probing or numbers:
                    record: dict[str, Any] = {"step": now}
                    finite.see(number, losses["loss"])
                    finite.check(loader, directory)
                    record |= averaged(losses, objective.scored(inputs))
                    record |= {key: value.item() for key, value in numbers.items()}
                    record["lr"] = lr
                    if norm is not None:
                        record["gradient_norm"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
                    record |= clock.read()
                    record |= monitors.read(step.inputs) if monitors.due(now) else {}
                    record |= first_rows_again() if now == training.steps else {}
                    record["peak_memory_gib"] = peak_memory()
                    if undecodable := getattr(loader, "undecodable", 0):
                        record["undecodable"] = undecodable
                    record["eta"] = (time.perf_counter() - began) / (now - done) * (training.steps - now)
                    if probing and probe is not None:
                        record |= {f"probe/{key}": value for key, value in probe().items()}
                        objective.train()
                    history.log(record)
                if directory and (ending or now % training.save_every == 0):
                    finite.check(loader, directory)
                    state = {"step": now, "scaler": scaler.state_dict() if scaler is not None else None}
                    checkpoint.save(directory, objective, optimizer, state, accelerator.is_main_process)
                    wait_for_everyone()
                if ending and (bound := clock.bound_by()):
                    history.say(bound)
                if ending and now < training.steps:
                    end = f"; {way_on()}" if directory else ""
                    raise Interrupted(f"stopped at step {now} of {training.steps}{end}")
    return history.records


def whole_data(loader: Loader, device: torch.device | str) -> Iterator[Batch]:
    """See `Step.data`."""
    stop = max(1, getattr(loader, "steps_per_epoch", None) or ENDLESS)
    return (to_device(batch, device) for batch in loader.batches(0, stop))


def _reseed(training: Training, number: int, share: int, device: torch.device, part: int) -> None:
    """For dropout: its masks repeat in a replay and after resuming, and differ between processes and micro-batches."""
    seed = mix_seed(training.seed, number, "forward", share * training.accumulate + part)
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    # Not torch.manual_seed, which prints the stack into a text for every kind of device that is not there.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class _Finite:
    """The first step whose loss is not finite: seen at every step, and asked of the device only where it matters."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.tensor(-1, device=device)

    def see(self, number: int, loss: Tensor) -> None:
        """Take note of a step's loss, without waiting for it."""
        self._first = torch.where((self._first < 0) & ~loss.detach().isfinite(), number, self._first)

    def check(self, loader: Loader, directory: Path | None) -> None:
        """Raise RunError where a loss was not finite, on whichever process."""
        firsts = [int(first) for first in gather(self._first[None])]
        if max(firsts) < 0:
            return
        number = min(first for first in firsts if first >= 0)
        ids = next(iter(loader.batches(number, number + 1))).get("id")
        some = "" if ids is None else f", of rows {ids[:8].tolist()}{' and more' if len(ids) > 8 else ''}"
        raise RunError(f"the loss is not finite at step {number + 1}{some}; {checkpoint.way_out(directory)}")
