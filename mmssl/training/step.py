"""One optimizer step's gradient, exact under any number of micro-batches and processes.

A task whose rows never meet is accumulated by averaging. One whose rows meet (contrastive negatives, queues) is
accumulated by cached outputs: predict every micro-batch without gradient, take one loss of the full batch, then replay
each micro-batch with the gradient of its outputs (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup"). The full batch's negatives are seen, and parameters that the loss itself owns, such as a
learnable temperature, are counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mmssl.batch import Batch, split_rows
from mmssl.objectives.base import Objective, full_precision
from mmssl.ops.gather import average

Context = Callable[[], AbstractContextManager]
Forward = Callable[..., dict[str, Tensor]]


def accumulated_backward(
    objective: Objective,
    wrapped: Forward,
    inputs: Batch,
    parts: int = 1,
    *,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    no_sync: Context = nullcontext,
    autocast: Context = nullcontext,
    reseed: Callable[[int], None] = lambda part: None,
) -> dict[str, Tensor]:
    """Leave in `.grad` what the mean over the global batch gives, and return the logged values.

    Args:
        objective: the bare module.
        wrapped: the same as DDP, FSDP or torch.compile wrapped it; the objective itself where nothing does.
        inputs: what `transform` made of this process's rows.
        parts: micro-batches, of which only one at a time holds activations.
        backward: the backward pass, scaled where half precision asks for it.
        no_sync: suspends the averaging of gradients over processes; entered for all but the last micro-batch.
        autocast: context of the forward pass without gradient.
        reseed: called with the number of a micro-batch before its forward pass, so that dropout repeats in the replay.

    Returns:
        The entries of the objective's loss dictionary, detached, averaged over the micro-batches of this process.
    """
    inputs = _average_divisors(inputs, objective.divisors)
    if parts == 1:
        reseed(0)
        losses = wrapped(inputs)
        backward(losses["loss"])
        return {key: value.detach() for key, value in losses.items()}
    micro_batches = split_rows(inputs, parts)
    if objective.meets == "loss":
        return _cached(objective, wrapped, inputs, micro_batches, backward, no_sync, autocast, reseed)
    for micro_batch in micro_batches:
        micro_batch.update({key: micro_batch[key] / parts for key in objective.divisors if key in micro_batch})
    logs: dict[str, Tensor] = {}
    for i, micro_batch in enumerate(micro_batches):
        with no_sync() if i < parts - 1 else nullcontext():
            reseed(i)
            losses = wrapped(micro_batch)
            backward(losses["loss"] / parts)
        for key, value in losses.items():
            logs[key] = logs.get(key, torch.zeros_like(value)) + value.detach() / parts
    return logs


def _cached(
    objective: Objective,
    wrapped: Forward,
    inputs: Batch,
    micro_batches: list[Batch],
    backward: Callable[[Tensor], None],
    no_sync: Context,
    autocast: Context,
    reseed: Callable[[int], None],
) -> dict[str, Tensor]:
    pieces: list[Batch] = []
    with torch.no_grad(), autocast(), frozen_statistics(objective):
        for i, micro_batch in enumerate(micro_batches):
            reseed(i)
            pieces.append(full_precision(objective.predict(micro_batch)))
    outputs = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
    leaves = {key: value.requires_grad_() for key, value in outputs.items() if value.is_floating_point()}

    losses = objective.loss(outputs, inputs)
    gradients = torch.autograd.grad(losses["loss"], list(leaves.values()), allow_unused=True)
    pull = {key: g for key, g in zip(leaves, gradients, strict=True) if g is not None}

    pulls = split_rows(pull, len(micro_batches))
    for i, (micro_batch, part_pull) in enumerate(zip(micro_batches, pulls, strict=True)):
        last = i == len(micro_batches) - 1
        with nullcontext() if last else no_sync():
            reseed(i)
            # The loss's own parameters take part in the last replay: the one whose gradients DDP or FSDP averages.
            whole = ({key: value.detach() for key, value in outputs.items()}, inputs) if last else None
            backward(wrapped(micro_batch, part_pull, whole)["loss"])
    return {key: value.detach() for key, value in losses.items()}


def diagnosed(
    objective: Objective,
    inputs: Batch,
    parts: int = 1,
    *,
    autocast: Context = nullcontext,
    reseed: Callable[[int], None] = lambda part: None,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """What `objective.diagnose` returns, with gradients that are exact under any number of micro-batches and processes.

    The run goes on as if it had not been called: parameters, `.grad`, buffers and random numbers are left as they are.
    A gradient holds the activations of one micro-batch at a time, and none of DDP's hooks sees it.

    Args:
        objective: the bare module.
        inputs: what `transform` made of this process's rows.
        parts: micro-batches.
        autocast: context of the forward pass.
        reseed: as for `accumulated_backward`.
        scale: of the loss during the backward pass, for half precision.
    """

    def gradients(part: Objective, own: Batch) -> dict[str, Tensor]:
        parameters = {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}
        totals: dict[str, Tensor] = {}

        def forward(*arguments: Batch) -> dict[str, Tensor]:
            with autocast():
                return part(*arguments)

        def collect(scalar: Tensor) -> None:
            found = torch.autograd.grad(scalar * scale, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    totals[name] = totals[name] + gradient if name in totals else gradient

        accumulated_backward(part, forward, own, parts, backward=collect, autocast=autocast, reseed=reseed)
        return {name: average(total) / scale for name, total in totals.items()}

    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    devices = {p.device for p in objective.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        numbers = objective.diagnose(inputs, gradients)
    with torch.no_grad():
        for name, buffer in objective.named_buffers():
            buffer.copy_(buffers[name])
    return numbers


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Undo what a forward pass does to the running statistics of norms: the replay counts each batch once."""
    norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    saved = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
    yield
    for norm, buffers in zip(norms, saved, strict=True):
        for buffer, value in zip(norm.buffers(recurse=False), buffers, strict=True):
            buffer.copy_(value)


def _average_divisors(inputs: Batch, divisors: tuple[str, ...]) -> Batch:
    dtype = torch.get_default_dtype()
    return inputs | {key: average(inputs[key].to(dtype)) for key in divisors if key in inputs}
