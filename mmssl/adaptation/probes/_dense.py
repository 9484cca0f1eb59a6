"""What probes share that answer for places of a picture from feature maps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mmssl.adaptation.labeled import Question
from mmssl.adaptation.maps import MapRows, read_maps
from mmssl.adaptation.probes import _trained
from mmssl.adaptation.probes._layers import scale_by_depth
from mmssl.adaptation.probes._unfinished import WHOLE, ResumableLearner
from mmssl.adaptation.probes.base import RawRows, Setting
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import Split
from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Chance, Objective
from mmssl.ops.draws import Draws
from mmssl.ranges import Width
from mmssl.schema import Section


class LabelsOf:
    """Labels of rows that are read when a step wants them.

    Args:
        read: numbers of labels, int64 -> a tensor, rows first.
        labels: of the rows, int64 (N,).
    """

    def __init__(self, read: Callable[[Tensor], Tensor], labels: Tensor) -> None:
        self.read, self.labels = read, labels

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.read(self.labels[index])


class Built(Section):
    """What builds a network that answers for places again, next to its encoder; a subclass is the probe's own.

    Attributes:
        depths: that are read -> channels of their maps.
        width: of the probe.
        names: of the classes, in the order of the network's.
    """

    depths: dict[str, Width]
    width: Width
    names: tuple[str | int, ...]

    def build(self, encoder: Encoder) -> DenseTask:
        """The network, with random weights but for the encoder's."""
        raise TypeError(f"{type(self).__name__} builds nothing")


class DenseTask(Objective):
    """A network that answers for places of a picture. It reads labels, which no pretext task does.

    Args:
        built: its arguments.

    Attributes:
        inputs: batch keys that it reads.
        reads: the encoder in it; None where rows come as maps.
    """

    inputs: tuple[str, ...]
    reads: Encoder | None

    def __init__(self, built: Built) -> None:
        super().__init__({})
        self.built = built

    def chance(self, rows: int) -> Chance:
        """Not known before the labels are."""
        return Chance(None)

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Rows as they are; no augmentation."""
        return {key: batch[key] for key in (*self.inputs, "label")}

    def answer(self, inputs: Batch) -> Tensor:
        """What the target scores, rows first; in evaluation mode."""
        raise TypeError(f"{type(self).__name__} answers nothing")


T = TypeVar("T", bound=DenseTask)


class DenseLearner(ResumableLearner[MapRows]):
    """Learns a head on maps of a frozen encoder, or of a copy that is trained along.

    Args:
        tune: train the encoder.
        depths: names of `Encoder.layers`; the deepest of each resolution where there are none.
        lr: candidates for the peak learning rate.
        decay: candidates for the factor between a layer of a tuned encoder and the next; 0.75 and 1.0 where there are
            none.
        steps: optimizer steps.
        batch_rows: rows of a step, at most all of them.
        weight_decay: of AdamW.

    Attributes:
        keeps: whether maps of a frozen encoder are kept where they fit; else rows are pictures.
        finest: least distance of places, in pixels, of depths that are not named.
    """

    keeps: ClassVar[bool] = True
    finest: ClassVar[float] = 0.0

    def __init__(
        self,
        *,
        tune: bool,
        depths: tuple[str, ...],
        lr: tuple[float, ...],
        decay: tuple[float, ...],
        steps: int,
        batch_rows: int,
        weight_decay: float,
    ) -> None:
        super().__init__()
        if decay and not tune:
            raise RecipeError(f"{self.name}: decay is for the layers of an encoder that is tuned; set tune: true")
        self.tune, self.depths, self.lr = tune, depths, lr
        self.decay = (decay or (0.75, 1.0)) if tune else ()
        self.options: dict[str, Any] = {"steps": steps, "batch_rows": batch_rows, "weight_decay": weight_decay}

    @property
    def tells_depths(self) -> bool:
        """Where the encoder stays as it is."""
        return not self.tune

    def settings(self) -> Sequence[Setting]:
        """Learning rates, and decays where the encoder is tuned, the least change first."""
        if not self.tune:
            return [{"lr": lr} for lr in sorted(self.lr)]
        return [{"lr": lr, "decay": decay} for lr, decay in itertools.product(sorted(self.lr), sorted(self.decay))]

    def ask(self, model: Model, request: Request) -> Question:
        """See `Learner.ask`."""
        if model.encoder.modality != "image":
            raise RecipeError(f"{self.name} reads pictures, and encoder '{model.name}' reads {model.encoder.modality}")
        return super().ask(model, request)

    def copy_of(self, encoder: Encoder, setting: Setting) -> Encoder:
        """The encoder that is trained, or one that learns nothing."""
        with torch.random.fork_rng():
            own = copy.deepcopy(encoder).float().freeze(not self.tune)
        if self.tune:
            scale_by_depth(own, setting["decay"])
        return own

    def learn(
        self,
        built: Built,
        untrained: Callable[[], T],
        rows: RawRows,
        labels: LabelsOf,
        test: RawRows,
        answers: Callable[[T], Tensor],
        setting: Setting,
        seed: int,
        *,
        last: bool,
    ) -> tuple[T | None, Tensor]:
        """One training on all of `rows`; see `ResumableLearner.finish`.

        Args:
            built: what builds the network.
            untrained: the network, with random weights, on its device.
            rows: N of them.
            labels: of them.
            test: that are answered for.
            answers: of a network, for them.
            setting: learning rate and, of a tuned encoder, decay.
            seed: of the head, of the order and of every draw.
            last: whether the network is asked for.
        """
        network = built.model_dump(mode="json")
        place = self.place(rows, labels, test, seed, network, self.tune, dict(setting), self.options)

        def train() -> T:
            objective = untrained()
            directory = None if place is None else place.part(WHOLE)
            _trained.train(objective, rows, labels, lr=setting["lr"], seed=seed, directory=directory, **self.options)
            return objective

        return self.finish(place, train, untrained, answers, last=last)

    def _read(
        self, encoders: Sequence[Encoder], split: Split, ids: Tensor, request: Request
    ) -> tuple[list[dict[str, MapRows]], Tensor]:
        """See `Learner`."""
        return read_maps(
            encoders,
            split,
            ids,
            self.depths,
            layers=request.layers,
            keep=self.keeps and not self.tune,
            finest=self.finest,
            batch_size=min(request.batch_size, 4 * self.options["batch_rows"]),
        )
