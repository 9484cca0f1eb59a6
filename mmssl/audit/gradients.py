"""What depends on what, exactly and without training: does an answer see other rows, what is hidden, or later tokens?

BatchNorm in training makes every row's output depend on all others, by which contrastive tasks with momentum encoders
can cheat (He et al. 2020, section 3.3); in evaluation nothing may. What a masked task hides, and what comes after the
token that a causal one predicts, may matter to no answer at all.

Floats are asked by their gradient. Whole numbers have none: they are replaced by others, and the answers compared. Both
are exactly zero where nothing depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from mmssl.batch import Batch, count_rows, sub_batch
from mmssl.objectives._concealed import Concealed, Later
from mmssl.objectives.base import Objective
from mmssl.objectives.combine import Combine
from mmssl.ops.draws import Draws
from mmssl.ops.intervals import wilson

CONFIDENCE = 0.99
CUTS = 16  # places at which a text is cut to see whether answers before know what comes after


@runtime_checkable
class Conceals(Protocol):
    """A task that hides something from its network."""

    def concealed(self, inputs: Batch) -> Concealed:
        """What it hides of these inputs."""
        ...


class Leak(NamedTuple):
    """Whether answers depend on what they should not know.

    Attributes:
        what: `other rows, in evaluation`, `other rows, in training`, `what is hidden`, `later tokens`, or `hidden
            things left in the input`.
        largest: of the absolute gradients and changes; of things left in the input, their share.
        leaks: whether that is more than the task allows.
        why: what explains it, in words; may be empty.
    """

    what: str
    largest: float
    leaks: bool
    why: str = ""

    @property
    def verdict(self) -> str:
        """`leaks`, `clean`, or `explained` where answers depend on what they may."""
        if self.leaks:
            return "leaks"
        return "clean" if self.largest == 0 or self.what.startswith(LEFT) else "explained"

    @property
    def text(self) -> str:
        """One sentence."""
        if self.what.startswith(LEFT):
            return f"{self.largest:.1%} of {self.what}{self.why}"
        if self.largest == 0:
            return f"no answer depends on {self.what}"
        return f"answers depend on {self.what} (by {self.largest:.2g}){self.why}"


LEFT = "hidden things left in the input"


def leaks(objective: Objective, batch: Batch, seed: int = 0) -> list[Leak]:
    """All that holds for a task: other rows, and of each task that says what it hides (`Conceals`), whether it does.

    Args:
        objective: left in the mode it was in; statistics that BatchNorm keeps move as in a training step.
        batch: of two rows or more.
        seed: of the transform.
    """
    found = between_rows(objective, batch, seed)
    was_training = objective.training
    objective.eval()
    inputs = _inputs(objective, batch, seed)
    for name, task, own in _tasks(objective, inputs):
        if isinstance(task, Conceals):
            found += [leak._replace(what=leak.what + name) for leak in _unseen(task.concealed(own), own)]
    objective.train(was_training)
    return found


def between_rows(objective: Objective, batch: Batch, seed: int = 0) -> list[Leak]:
    """Whether the first row's outputs depend on the inputs of all others, in evaluation and in training.

    Args:
        objective: see `leaks`.
        batch: see `leaks`.
        seed: see `leaks`.
    """
    was_training = objective.training
    norms = [name for name, module in objective.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    found = []
    for mode in ("evaluation", "training"):
        objective.train(mode == "training")
        inputs = _inputs(objective, batch, seed)
        others = {key: torch.arange(len(value)).to(value.device) > 0 for key, value in inputs.items() if value.ndim}
        others = {key: mask.view(-1, *[1] * (inputs[key].ndim - 1)) for key, mask in others.items()}

        def first(inputs: Batch) -> Tensor:
            rows = [value[0].flatten() for value in objective.predict(inputs).values() if value.ndim]
            return torch.cat([row.float() for row in rows])

        largest = _dependence(first, inputs, others)
        explained = mode == "training" and bool(norms)
        why = f": {len(norms)} BatchNorm layers, as {norms[0]}" if explained else ", which no BatchNorm explains"
        found.append(Leak(f"other rows, in {mode}", largest, largest > 0 and not explained, why if largest else ""))
    objective.train(was_training)
    return found


def _inputs(objective: Objective, batch: Batch, seed: int) -> Batch:
    with torch.no_grad():
        inputs = dict(objective.transform(batch, Draws(seed, 0, count_rows(batch))))
    return {key: value.float() if value.dtype == torch.uint8 else value for key, value in inputs.items()}


def _tasks(objective: Objective, inputs: Batch) -> Iterator[tuple[str, Objective, Batch]]:
    """The task, or all those of a combination, as words that follow a sentence, task and inputs."""
    if not isinstance(objective, Combine):
        yield "", objective, inputs
        return
    for name, task in objective.tasks.items():
        yield f", in {name}", cast(Objective, task), sub_batch(inputs, name)


def _unseen(concealed: Concealed, inputs: Batch) -> list[Leak]:
    found = []
    if concealed.hidden:
        largest = _dependence(concealed.answers, inputs, concealed.hidden)
        found.append(Leak("what is hidden", largest, largest > 0))
    if concealed.shown is not None:
        count = concealed.shown.numel()
        share = concealed.shown.double().mean().item() if count else 0.0
        low, _ = wilson(share, max(count, 1), CONFIDENCE)
        why = f" ({concealed.allowed:.0%} on purpose, {count} looked at)" if concealed.allowed else ""
        found.append(Leak(LEFT, share, low > concealed.allowed, why))
    if concealed.later is not None:
        largest = max(_looks_ahead(concealed.answers, inputs, concealed.later), default=0.0)
        found.append(Leak("later tokens", largest, largest > 0))
    return found


def _looks_ahead(answers: Callable[[Batch], Tensor], inputs: Batch, later: Later) -> Iterator[float]:
    """How much answers about places up to a cut depend on the tokens from there on, for up to 16 cuts."""
    tokens = inputs[later.key]
    place = torch.arange(tokens.shape[1], device=tokens.device)
    last = int(later.place.max()) if len(later.place) else 0
    for cut in sorted({round(x) for x in torch.linspace(0, last, CUTS).tolist()}):

        def before(inputs: Batch, cut: int = cut) -> Tensor:
            return answers(inputs)[later.place <= cut]

        yield _dependence(before, inputs, {later.key: place >= cut})


def _dependence(answers: Callable[[Batch], Tensor], inputs: Batch, hidden: Mapping[str, Tensor]) -> float:
    """The largest gradient of the answers on hidden floats, or their largest change by other whole numbers there."""
    return max(_gradient(answers, inputs, hidden), _change(answers, inputs, hidden))


def _gradient(answers: Callable[[Batch], Tensor], inputs: Batch, hidden: Mapping[str, Tensor]) -> float:
    floats = [key for key in hidden if inputs[key].is_floating_point() and inputs[key].ndim]
    leaves = {key: inputs[key].detach().clone().requires_grad_() for key in floats}
    if not leaves:
        return 0.0
    with torch.enable_grad():
        said = answers({**inputs, **leaves})
        if not said.requires_grad:
            return 0.0
        # Weights of their own, so that no two gradients cancel.
        weights = torch.linspace(0.5, 1.5, said.numel(), device=said.device, dtype=said.dtype).view_as(said)
        gradients = torch.autograd.grad((said * weights).sum(), list(leaves.values()), allow_unused=True)
    return max(
        gradient.masked_fill(~hidden[key], 0).abs().max().item() if gradient is not None else 0.0
        for key, gradient in zip(leaves, gradients, strict=True)
    )


@torch.no_grad()
def _change(answers: Callable[[Batch], Tensor], inputs: Batch, hidden: Mapping[str, Tensor]) -> float:
    """By the largest number in place of the smallest, and so on: they are others, and every one of them is valid."""
    numbers = {key: inputs[key] for key in hidden if inputs[key].dtype == torch.int64 and inputs[key].ndim}
    others = {key: torch.where(hidden[key], value.max() + value.min() - value, value) for key, value in numbers.items()}
    if not numbers:
        return 0.0
    said = []
    for given in (inputs, {**inputs, **others}):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of dropout
            said.append(answers(given))
    if said[0].shape != said[1].shape:
        return math.inf
    return (said[0] - said[1]).abs().max().item() if said[0].numel() else 0.0
