"""The contract of every pretext task: transform, predict, then the loss.

A task is one file that reads like its paper. `transform` makes inputs and targets from raw rows without labels and
without gradient; `predict` runs encoders and head row by row; `loss` is where rows meet. The cut between the last two
is what makes gradient accumulation exact: see `mmssl.training.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.ops.draws import Draws

Meets = Literal["nowhere", "transform", "loss"]

ONCE = 2**62
"""As `refresh_every`: before the first step and never again."""


@dataclass(frozen=True)
class Chance:
    """What guessing scores.

    Attributes:
        loss: expected loss of a guess that knows the rules of the task and nothing of the input; None where only the
            data tell it, as for an error of raw pixels. Such a task has a metric of known level, for instance
            `relative_error`: its error over that of the best constant.
        metrics: the same for other entries of the loss dictionary, such as `accuracy`. Those named `accuracy` or
            `ranking`, or beginning so, are the better the higher; all others the lower.
    """

    loss: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def levels(self) -> dict[str, float]:
        """Name -> level of everything that has one, the loss first."""
        return {**({} if self.loss is None else {"loss": self.loss}), **self.metrics}


class Panel(NamedTuple):
    """One column of the picture that `mmssl show` draws; its cells stand beside those of the other columns.

    Attributes:
        title: what is seen: "input", "target", "prediction".
        cells: one a sample: (3, H, W) a picture in [0, 1], (T, 3, H, W) a strip of frames, (H, W) a map or
            spectrogram, (S,) a waveform, or a line of text.
    """

    title: str
    cells: Sequence[Tensor | str]


class Pair(NamedTuple):
    """Two encoders whose rows a task compares: what retrieval and zero-shot classification ask a task for.

    Attributes:
        a: name of an encoder out of `exported`.
        b: likewise.
        embed: from the Features of `a`, and of `b`, to unit vectors (B, W): their inner product says how well the two
            belong together. None where the task has no space for both.
        match: Features of `a` and Features of `b`, row by row a pair, -> logits (B,) of belonging together. None where
            no network of the task sees both.
    """

    a: str
    b: str
    embed: tuple[Callable[[Features], Tensor], Callable[[Features], Tensor]] | None = None
    match: Callable[[Features, Features], Tensor] | None = None


def full_precision(outputs: Mapping[str, Tensor]) -> Batch:
    """Half-precision outputs as float32: logits divided by a temperature do not survive 8 bits of mantissa."""
    half = (torch.float16, torch.bfloat16)
    return {key: value.float() if value.dtype in half else value for key, value in outputs.items()}


class Objective(nn.Module):
    """One pretext task over named encoders.

    Subclasses take the encoders and keyword-only hyper-parameters whose defaults are the paper's: the signature is the
    schema of the recipe. All state (queues, teachers, centers) is parameters and buffers, so that checkpoints hold it.

    Every tensor of `inputs` and `outputs` has the batch's rows first (views of a row stand in the second dimension).

    Attributes:
        needs: batch keys that `transform` reads; checked against the data before step 0.
        divisors: 0-dim entries of `inputs` that a mean divides by, for instance the number of masked tokens: the loop
            replaces them by their mean over all micro-batches and processes, so that the average of the parts is the
            mean over the global batch. Every 0-dim entry is one.
        meets: where rows of a batch meet: `nowhere`, in the `transform` (a sample is made of two rows) or in the `loss`
            (contrastive negatives, queues). A task of the last kind is accumulated by cached outputs, any other by
            plain averaging; where rows meet, it takes two of them.
        spec: name and hyper-parameters that build this task again; None where it was not made by `mmssl.objective`.
        alternates: whether a step may leave some of the parameters without gradient, which then stay as they are.
        refresh_every: steps between calls of `refresh`; 0 for never, `ONCE` for before the first step alone.
        diagnose_every: steps between calls of `diagnose`; 0 for never.
    """

    needs: tuple[str, ...] = ()
    divisors: tuple[str, ...] = ()
    spec: dict[str, Any] | None = None
    meets: Meets = "nowhere"
    alternates: bool = False
    refresh_every: int = 0
    diagnose_every: int = 0

    def __init__(self, encoders: Mapping[str, Encoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)

    def encoder(self, name: str) -> Encoder:
        """The encoder of that name; raises ValueError naming those there are."""
        if name not in self.encoders:
            have = ", ".join(self.encoders) or "none"
            raise ValueError(f"{type(self).__name__} needs an encoder named '{name}'; the recipe has: {have}")
        return cast(Encoder, self.encoders[name])

    @property
    def exported(self) -> dict[str, Encoder]:
        """Name -> the encoder that leaves the run under it: is probed, exported and published. A teacher may do so."""
        return {name: self.encoder(name) for name in self.encoders}

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of encoders that the task has learned to compare; none by default."""
        return ()

    def fresh(self, seed: int) -> Objective:
        """The same task over the same networks, all with new random weights, in evaluation mode on the CPU.

        Raises:
            TypeError: where the task was made by its class, so that its arguments are not known.
        """
        from mmssl.encoders import create as create_encoder
        from mmssl.objectives import create

        if self.spec is None:
            raise TypeError(
                f"{type(self).__name__} was made by its class; mmssl.objective makes one that can be repeated"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoders = {name: create_encoder(**self.encoder(name).spec) for name in self.encoders}
            return create(encoders=encoders, **self.spec).eval()

    def chance(self, rows: int) -> Chance:
        """The score of guessing with a global batch of `rows`."""
        raise TypeError(f"{type(self).__name__} states no chance level")

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Raw rows -> inputs and targets; no gradient, and random through `draws` alone."""
        raise TypeError(f"{type(self).__name__} has no transform")

    def predict(self, inputs: Batch) -> Batch:
        """Inputs -> outputs, row by row: no row may depend on another (BatchNorm excepted)."""
        raise TypeError(f"{type(self).__name__} has no predict")

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """`loss` is minimized, the other 0-dim entries are logged; each is a mean over this process's rows."""
        raise TypeError(f"{type(self).__name__} has no loss")

    def forward(
        self, inputs: Batch, pull: Batch | None = None, whole: tuple[Batch, Batch] | None = None
    ) -> dict[str, Tensor]:
        """What DDP, FSDP and torch.compile wrap: `loss(predict(inputs), inputs)`.

        With `pull`, the gradient of an already known loss with respect to these outputs, the result is the scalar
        whose backward pass carries that gradient into the parameters. With `whole`, outputs without gradient and inputs
        of all micro-batches, the gradient of parameters that the loss itself owns comes with it.
        """
        outputs = full_precision(self.predict(inputs))
        with torch.autocast(next(iter(outputs.values())).device.type, enabled=False):
            if pull is None:
                return self.loss(outputs, inputs)
            terms = [(outputs[key] * gradient).sum() for key, gradient in pull.items()]
            if whole is not None:
                terms.append(self.loss(*whole)["loss"])
            return {"loss": torch.stack(terms).sum()}

    def after_step(self, progress: float) -> None:
        """After each optimizer step, without gradient: momentum teachers, clamps. `progress` runs from 0 to 1."""

    def refresh(self, batches: Iterable[Batch]) -> None:
        """Before the first step and every `refresh_every` steps, on the whole data: clusters, codebooks.

        Args:
            batches: this process's rows; may be read several times, and need not be read to the end, but by every
                process equally far.
        """

    def diagnose(self, inputs: Batch, gradients: Callable[[Objective, Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Every `diagnose_every` steps, before the step: numbers that cost a backward pass of their own; logged.

        Args:
            inputs: of this process's rows.
            gradients: (objective, its inputs) -> gradient of its loss over the global batch, by name of the parameter;
                those that the loss does not reach are left out. Nothing else changes.
        """
        raise TypeError(f"{type(self).__name__} has nothing to diagnose")

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The columns that `mmssl show` draws: input, target, prediction."""
        raise TypeError(f"{type(self).__name__} has no preview")
