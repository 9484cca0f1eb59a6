"""The contract of every pretext task: transform, predict, then the loss.

A task is one file that reads like its paper. `transform` makes inputs and targets from raw rows without labels and
without gradient; `predict` runs encoders and head row by row; `loss` is where rows meet. The cut between the last two
is what makes gradient accumulation exact: see `mmssl.training.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features, Scale
from mmssl.errors import RecipeError
from mmssl.ops.draws import Draws

EMBEDDINGS = "embeddings"
"""See `Objective.drawn_together`."""
VALID = "valid"
"""Entry of the losses of a task that leaves rows out: the share of those that count, over which all else is a mean."""
Meets = Literal["nowhere", "transform", "loss"]


@dataclass(frozen=True)
class Chance:
    """What guessing scores.

    Attributes:
        loss: expected loss of a guess that knows the rules of the task and nothing of the input; None where only the
            data tell it, as for an error of raw pixels. Such a task has a metric of known level, for instance
            `relative_error`: its error over that of the best constant.
        metrics: the same for other entries of the loss dictionary, such as `accuracy`. Those named `accuracy` or
            `ranking`, or beginning so, are the better the higher; all others the lower.
        filled: entry -> steps in which it is measured against vectors that are at first random, from which any row is
            told; those records say nothing of the network.
    """

    loss: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    filled: Mapping[str, int] = field(default_factory=dict)

    @property
    def levels(self) -> dict[str, float]:
        """Name -> level of everything that has one, the loss first."""
        return {**({} if self.loss is None else {"loss": self.loss}), **self.metrics}


class Panel(NamedTuple):
    """One column of the picture that `mmssl show` draws; its cells are next to those of the other columns.

    Attributes:
        title: what is seen: "input", "target", "prediction".
        cells: one a sample: (3, H, W) a picture in [0, 1], (T, 3, H, W) a strip of frames, (H, W) a map or,
            with `scale`, a spectrogram, (S,) a waveform, or a line of text.
        right: whether each cell is the right answer, which is marked; None for what is no answer.
        scale: of waveforms and spectrograms, what their axes measure.
    """

    title: str
    cells: Sequence[Tensor | str]
    right: Sequence[bool | None] | None = None
    scale: Scale | None = None


class Pair(NamedTuple):
    """Two encoders whose rows a task compares: what retrieval and zero-shot classification ask a task for.

    Attributes:
        a: name of an encoder out of `exported`.
        b: likewise.
        embed: from the Features of `a`, and of `b`, to unit vectors (B, W): their inner product says how well the two
            belong together. None where the task has no space for both.
        match: Features of `a` and Features of `b`, row by row a pair, -> logits (B,) of belonging together. None where
            no network of the task sees both.
        scalars: name -> parameter (1,) that makes logits of the inner products, where `embed` is no more than the
            encoders' own pooled vectors at unit length: all that a CLIP has besides its towers. Empty elsewhere.
        project: the maps of a's and of b's pooled vectors, where `embed` is no more than these and unit length; None
            elsewhere.
    """

    a: str
    b: str
    embed: tuple[Callable[[Features], Tensor], Callable[[Features], Tensor]] | None = None
    match: Callable[[Features, Features], Tensor] | None = None
    scalars: Mapping[str, Tensor] = MappingProxyType({})
    project: tuple[nn.Linear, nn.Linear] | None = None


@dataclass(frozen=True)
class Step:
    """What a task sees before a step of training. One of a number and data alone trains nothing: a look at the task.

    Attributes:
        number: from 0; of a task in a combination, from its own first step.
        data: -> this process's batches of the whole data set, anew at each call; an epoch, or without end where the
            data have none. They need not be read to the end, but by every process equally far.
        prepare: -> `inputs`.
        gradients: (task, its inputs) -> gradient of its loss over the global batch, by name of the trained module's
            parameter; those that the loss does not reach are left out. Everything stays as it was.
        log: numbers, 0-dim and equal on all processes, for the record of this step.
        sharded: whether each process holds a part of every weight; see `need_whole_weights`.
    """

    number: int
    data: Callable[[], Iterable[Batch]]
    prepare: Callable[[], Batch] = dict
    gradients: Callable[[Objective, Batch], dict[str, Tensor]] = field(default=lambda task, inputs: {})
    log: Callable[[Mapping[str, Tensor]], None] = field(default=lambda numbers: None)
    sharded: bool = False

    @cached_property
    def inputs(self) -> Batch:
        """What `transform` makes of this step's rows, and the step then trains on; empty where the task rests."""
        return self.prepare()

    def need_whole_weights(self, setting: str) -> None:
        """Raise RecipeError, naming what asked for it, where no network can run outside of the training step."""
        if self.sharded:
            raise RecipeError(f"{setting} is measured on whole weights, and these are sharded; set {setting}=0")


class Shared(Mapping[str, Encoder]):
    """Encoders that another module registers: a task that is handed these refers to them and has no weights of them.

    So every encoder of a combination has one name in weights and state, whatever number of tasks use it.
    """

    def __init__(self, encoders: Mapping[str, Encoder]) -> None:
        self._encoders = dict(encoders)

    def __getitem__(self, name: str) -> Encoder:
        return self._encoders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._encoders)

    def __len__(self) -> int:
        return len(self._encoders)


def full_precision(outputs: Mapping[str, Tensor]) -> Batch:
    """Half-precision outputs as float32: logits divided by a temperature do not survive 8 bits of mantissa."""
    half = (torch.float16, torch.bfloat16)
    return {key: value.float() if value.dtype in half else value for key, value in outputs.items()}


class Objective(nn.Module):
    """One pretext task over named encoders.

    Subclasses take the encoders and keyword-only hyper-parameters whose defaults are the paper's: the signature is the
    schema of the recipe. All state (queues, teachers, centers) is parameters and buffers, so that checkpoints hold it.

    Every tensor of `inputs` and `outputs` has the batch's rows first (views of a row are the second dimension).

    Attributes:
        needs: batch keys that `transform` reads; checked against the data before step 0.
        divisors: 0-dim entries of `inputs` that a mean divides by, for instance the number of masked tokens: the loop
            replaces them by their mean over all micro-batches and processes, so that the average of the parts is the
            mean over the global batch. Every 0-dim entry is one.
        meets: where rows of a batch meet: `nowhere`, in the `transform` (a sample is made of two rows) or in the `loss`
            (contrastive negatives, queues). A task of the last kind is accumulated by cached outputs, any other by
            plain averaging; where rows meet, it takes two of them.
        takes_turns: whether a step may leave some of the parameters without gradient, which then stay as they are. An
            attribute, because DDP has to be told when it wraps the module, before there is any step to look at.
        local_norms: whether each process's BatchNorm sees its own rows alone; synchronized over all elsewhere.
    """

    needs: tuple[str, ...] = ()
    divisors: tuple[str, ...] = ()
    meets: Meets = "nowhere"
    takes_turns: bool = False
    local_norms: bool = False

    def __init__(self, encoders: Mapping[str, Encoder]) -> None:
        super().__init__()
        self.encoders = encoders if isinstance(encoders, Shared) else nn.ModuleDict(encoders)

    def encoder(self, name: str, *reads: str) -> Encoder:
        """The encoder of that name.

        Args:
            name: as in the recipe.
            *reads: the modalities that will do; any where none is given.

        Raises:
            ValueError: where there is none, naming those there are.
            RecipeError: where it reads another modality.
        """
        if name not in self.encoders:
            have = ", ".join(self.encoders) or "none"
            raise ValueError(f"{type(self).__name__} needs an encoder named '{name}'; the recipe has: {have}")
        encoder = cast(Encoder, self.encoders[name])
        if reads and encoder.modality not in reads:
            task = type(self).__module__.rpartition(".")[2]
            raise RecipeError(f"{task} reads {' or '.join(reads)}, and the encoder '{name}' reads {encoder.modality}")
        return encoder

    @property
    def exported(self) -> dict[str, Encoder]:
        """Name -> the encoder that leaves the run under it, is probed, exported and published. A teacher may do so."""
        return {name: self.encoder(name) for name in self.encoders}

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of encoders that the task has learned to compare; none by default."""
        return ()

    def drawn_together(self, inputs: Batch) -> dict[str, Tensor]:
        """Vectors (B, V, D) of V views of a row that should be alike, for the monitors; none by default.

        Under the name of an encoder its pooled vectors, under `EMBEDDINGS` what the loss compares.
        """
        return {}

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

    def forward(self, inputs: Batch) -> dict[str, Tensor]:
        """`loss(predict(inputs), inputs)`, the loss in full precision."""
        outputs = full_precision(self.predict(inputs))
        with torch.autocast(next(iter(outputs.values())).device.type, enabled=False):
            return self.loss(outputs, inputs)

    def scored(self, inputs: Batch) -> dict[str, Tensor]:
        """Beginning of the names that a task logs under -> 0-dim, 0 where all that its means divide by is 0.

        They are then means over nothing. Of the task itself the beginning is empty; it is left out where a mean is over
        all rows.
        """
        found = [inputs[key].to(torch.get_default_dtype()).abs() for key in self.divisors if key in inputs]
        return {"": torch.stack(found).sum()} if found else {}

    def before_step(self, step: Step) -> None:
        """Before each step, and before its `transform`: clusters and codebooks from the data, numbers to be logged."""

    def after_step(self, progress: float) -> None:
        """After each optimizer step, without gradient: momentum teachers, clamps. `progress` runs from 0 to 1."""

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The columns that `mmssl show` draws: input, target, prediction."""
        raise TypeError(f"{type(self).__name__} has no preview")
