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
from torch.distributed.fsdp import register_fsdp_forward_method

from mmssl.batch import Batch, split_rows
from mmssl.modules.mode import frozen_statistics
from mmssl.objectives.base import Objective, full_precision
from mmssl.ops.gather import average, sent_as

Context = Callable[[], AbstractContextManager]
Forward = Callable[..., dict[str, Tensor]]


class ForwardPass(nn.Module):
    """What DDP, FSDP2 and torch.compile wrap: the objective, and the replay of a part of its batch.

    Args:
        objective: the bare one.
        sent: in what features travel between processes in the loss; None for what they are.
    """

    def __init__(self, objective: Objective, sent: torch.dtype | None = None) -> None:
        super().__init__()
        self.objective = objective
        self.sent = sent
        self.autocast: Context = nullcontext

    def forward(
        self, inputs: Batch, pull: Batch | None = None, whole: tuple[Batch, Batch] | None = None
    ) -> dict[str, Tensor]:
        """The loss of `inputs`; with `pull`, the scalar whose backward pass carries a known gradient to the parameters.

        Args:
            inputs: of a micro-batch.
            pull: gradient of the loss with respect to the outputs of this micro-batch.
            whole: outputs without gradient and inputs of all micro-batches, for the gradient of parameters that the
                loss itself owns.
        """
        with self.autocast():
            outputs = self.predict(inputs)
            if pull is None:
                return self.loss(outputs, inputs)
            terms = [(outputs[key] * gradient).sum() for key, gradient in pull.items()]
            if whole is not None:
                terms.append(self.loss(*whole)["loss"])
            return {"loss": torch.stack(terms).sum()}

    def predict(self, inputs: Batch) -> Batch:
        """The objective's outputs, none in half precision."""
        return full_precision(self.objective.predict(inputs))

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The objective's loss, in full precision."""
        traveling = nullcontext() if self.sent is None else sent_as(self.sent)
        with torch.autocast(next(iter(outputs.values())).device.type, enabled=False), traveling:
            losses = self.objective.loss(outputs, inputs)
        # A logged weight is that of this step: the optimizer changes it in place, and FSDP2 gives its memory back.
        return {key: value if key == "loss" else value.detach().clone() for key, value in losses.items()}

    def collect_shards(self, autocast: Context = nullcontext) -> None:
        """Let FSDP2 collect the shards for what is called outside of `forward`; call it once they are made.

        Args:
            autocast: context of `forward`, which nothing else wraps.
        """
        self.autocast = autocast
        for method in ("predict", "loss"):
            register_fsdp_forward_method(self, method)


def accumulated_backward(
    passes: ForwardPass,
    inputs: Batch,
    parts: int = 1,
    *,
    wrapped: Forward | None = None,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    no_sync: Context = nullcontext,
    autocast: Context = nullcontext,
    reseed: Callable[[int], None] = lambda part: None,
) -> dict[str, Tensor]:
    """Leave in `.grad` what the mean over the global batch gives, and return the logged values.

    Args:
        passes: of the bare objective.
        inputs: what `transform` made of this process's rows.
        parts: micro-batches, of which only one at a time holds activations.
        wrapped: `passes` as DDP or FSDP wrapped it; itself where nothing does.
        backward: the backward pass, scaled where half precision asks for it.
        no_sync: suspends the averaging of gradients over processes; entered for all but the last micro-batch.
        autocast: context of the forward pass without gradient.
        reseed: called with the number of a micro-batch before its forward pass, so that dropout repeats in the replay.

    Returns:
        The entries of the objective's loss dictionary, detached, averaged over the micro-batches of this process.
    """
    forward, objective = wrapped or passes, passes.objective
    divisors = [key for key in objective.divisors if key in inputs]
    inputs = inputs | {key: average(inputs[key].to(torch.get_default_dtype())) for key in divisors}
    if parts == 1:
        reseed(0)
        losses = forward(inputs)
        backward(losses["loss"])
        return {key: value.detach() for key, value in losses.items()}
    micro_batches = split_rows(inputs, parts)
    if objective.meets == "loss":
        return _cached(passes, forward, inputs, micro_batches, backward, no_sync, autocast, reseed)
    logs: dict[str, Tensor] = {}
    for i, micro_batch in enumerate(micro_batches):
        micro_batch.update({key: micro_batch[key] / parts for key in divisors})
        with no_sync() if i < parts - 1 else nullcontext():
            reseed(i)
            losses = forward(micro_batch)
            backward(losses["loss"] / parts)
        for key, value in losses.items():
            logs[key] = logs.get(key, torch.zeros_like(value)) + value.detach() / parts
    return logs


def _cached(
    passes: ForwardPass,
    forward: Forward,
    inputs: Batch,
    micro_batches: list[Batch],
    backward: Callable[[Tensor], None],
    no_sync: Context,
    autocast: Context,
    reseed: Callable[[int], None],
) -> dict[str, Tensor]:
    pieces: list[Batch] = []
    with torch.no_grad(), autocast(), frozen_statistics(passes):
        for i, micro_batch in enumerate(micro_batches):
            reseed(i)
            pieces.append(passes.predict(micro_batch))
    outputs = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
    leaves = {key: value.requires_grad_() for key, value in outputs.items() if value.is_floating_point()}

    losses = passes.loss(outputs, inputs)
    gradients = torch.autograd.grad(losses["loss"], list(leaves.values()), allow_unused=True)
    pull = {key: g for key, g in zip(leaves, gradients, strict=True) if g is not None}

    pulls = split_rows(pull, len(micro_batches))
    for i, (micro_batch, part_pull) in enumerate(zip(micro_batches, pulls, strict=True)):
        last = i == len(micro_batches) - 1
        with nullcontext() if last else no_sync():
            reseed(i)
            # The loss's own parameters take part in the last replay: the one whose gradients DDP or FSDP averages.
            whole = ({key: value.detach() for key, value in outputs.items()}, inputs) if last else None
            backward(forward(micro_batch, part_pull, whole)["loss"])
    return {key: value.detach() for key, value in losses.items()}


def task_gradients(
    trained: nn.Module,
    task: Objective,
    inputs: Batch,
    parts: int = 1,
    *,
    autocast: Context = nullcontext,
    reseed: Callable[[int], None] = lambda part: None,
    scale: float = 1.0,
    sent: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The gradient of one task's loss over the global batch, exact however that batch is cut; see `Step.gradients`.

    The run goes on as if it had not been taken: parameters, `.grad`, buffers and random numbers are left as they are.
    It holds the activations of one micro-batch at a time, and none of DDP's hooks sees it.

    Args:
        trained: the bare module whose parameters are asked for: the task or the combination that it belongs to.
        task: whose loss it is.
        inputs: of the task, from this process's rows.
        parts: micro-batches.
        autocast: context of the forward pass.
        reseed: as for `accumulated_backward`.
        scale: of the loss during the backward pass, for half precision.
        sent: as for `ForwardPass`.

    Returns:
        Name of the parameter in `trained` -> gradient, for those that the loss reaches.
    """
    parameters = {name: parameter for name, parameter in trained.named_parameters() if parameter.requires_grad}
    totals: dict[str, Tensor] = {}
    passes = ForwardPass(task, sent)

    def forward(*arguments: Batch) -> dict[str, Tensor]:
        with autocast():
            losses: dict[str, Tensor] = passes(*arguments)
            return losses

    def collect(scalar: Tensor) -> None:
        found = torch.autograd.grad(scalar * scale, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                totals[name] = totals[name] + gradient if name in totals else gradient

    with unchanged(trained):
        accumulated_backward(passes, inputs, parts, wrapped=forward, backward=collect, autocast=autocast, reseed=reseed)
    return {name: average(total) / scale for name, total in totals.items()}


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Afterwards buffers and random numbers are what they were."""
    saved = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        yield
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(saved[name])
