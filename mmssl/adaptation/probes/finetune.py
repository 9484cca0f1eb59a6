"""Fine-tuning: a linear head on pooled features, trained together with a copy of the encoder."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.adaptation.features import POOLED, inputs_of
from mmssl.adaptation.probes.base import Learner, RawRows, Setting
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import Split
from mmssl.adaptation.targets.base import Target
from mmssl.batch import Batch, to_device
from mmssl.encoders.base import Encoder
from mmssl.modules.mode import evaluating
from mmssl.objectives.base import Chance, Objective
from mmssl.ops.draws import Draws, mix_seed
from mmssl.recipe import Optimizer, Schedule, Training
from mmssl.training.loop import fit


class Supervised(Objective):
    """The target's loss of a linear head on normalized pooled features. It reads labels, which no pretext task does.

    Args:
        encoder: trained along.
        target: what the labels are.
        units: shift and scale of values, as `Target.units` makes them of the training labels.
    """

    def __init__(self, encoder: Encoder, target: Target, units: tuple[Tensor, Tensor]) -> None:
        super().__init__({encoder.modality: encoder})
        self.target, self.inputs = target, inputs_of(encoder)
        self.needs = (encoder.modality, "label")
        norm = nn.LayerNorm(encoder.dim, elementwise_affine=False)
        self.head = nn.Sequential(norm, nn.Linear(encoder.dim, target.width))
        self.shift, self.scale = map(nn.Buffer, units)

    def chance(self, rows: int) -> Chance:
        """Not known before the labels are."""
        return Chance(None)

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Rows as they are; no augmentation."""
        return {key: batch[key] for key in (*self.inputs, "label") if key in batch}

    def predict(self, inputs: Batch) -> Batch:
        """`outputs` (B, width)."""
        key, valid_key = self.inputs
        return {"outputs": self.head(self.encoder(key)(inputs[key], inputs.get(valid_key)).pooled)}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """That of the target."""
        return {"loss": self.target.loss(outputs["outputs"], (inputs["label"] - self.shift) / self.scale)}

    def answer(self, inputs: Batch) -> Tensor:
        """The target's answers, (B, width), in the units of the labels."""
        return self.target.answer(self.predict(inputs)["outputs"]) * self.scale + self.shift


class Trained(NamedTuple):
    """What one training made.

    Attributes:
        objective: encoder and head.
        split: where its rows were.
    """

    objective: Supervised
    split: Split


class Finetune(Learner[RawRows]):
    """AdamW with a cosine schedule and layer-wise learning rates, decay^(depth from the head) (He et al. 2022, A.1).

    The paper's decay is 0.75 for ViT-L; 1.0 is there because a random-initialized encoder must train its first
    layers, and a baseline deserves settings of its own. There is no augmentation.

    Args:
        lr: candidates for the peak learning rate.
        decay: candidates for the factor between a layer and the next.
        steps: optimizer steps; a subset of few rows is passed through more often.
        batch_rows: rows of a step, at most all of them.
        weight_decay: of AdamW.

    Attributes:
        trained: what `predict` trained last.
    """

    frozen: ClassVar[bool] = False
    trained: Trained | None = None

    def __init__(
        self,
        *,
        lr: tuple[float, ...] = (3e-4, 1e-3),
        decay: tuple[float, ...] = (0.75, 1.0),
        steps: int = 300,
        batch_rows: int = 64,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.lr, self.decay, self.steps, self.batch_rows, self.weight_decay = lr, decay, steps, batch_rows, weight_decay

    def settings(self) -> Sequence[Setting]:
        """Every pair of learning rate and decay, the least change of the encoder first."""
        return [{"lr": lr, "decay": decay} for lr, decay in itertools.product(sorted(self.lr), sorted(self.decay))]

    def predict(
        self, target: Target, train: RawRows, labels: Tensor, test: RawRows, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`; the encoder of `train` is copied, never changed."""
        for setting in settings:
            objective = self.train(target, train, labels, setting, seed)
            self.trained = Trained(objective, train.split)
            yield answers(objective, test, 4 * self.batch_rows)

    def training_rows(self, model: Model, request: Request) -> tuple[Target, RawRows, Tensor]:
        """What `train` takes, of the training rows that can be decoded; raises as `score` does."""
        question = self.ask(model, request)
        (view,), read = self._read([model.encoder], question.train.split, question.train.ids, request)
        return question.target, view[POOLED], question.train.labels[torch.isin(question.train.ids, read)]

    def train(self, target: Target, rows: RawRows, labels: Tensor, setting: Setting, seed: int) -> Supervised:
        """One training on all of `rows`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoder = copy.deepcopy(rows.encoder)
            if encoder.frozen:
                encoder.freeze(False)
            objective = Supervised(encoder, target, target.units(labels))
        scale_by_depth(objective.encoder(rows.encoder.modality), setting["decay"])
        training = Training(
            steps=self.steps,
            batch_size=min(self.batch_rows, len(rows)),
            seed=seed,
            optimizer=Optimizer(lr=setting["lr"], weight_decay=self.weight_decay),
            schedule=Schedule(warmup=self.steps // 10),
        )
        fit(objective, Shuffled(rows, target.matrix(labels), training.batch_size, seed), training, quiet=True)
        return objective


class Shuffled:
    """Rows in an order that is new in each epoch, decoded as they come; the loop's loader.

    Args:
        rows: N of them.
        labels: float32 (N, width), for the key `label`.
        batch_size: rows of a step, at most N.
        seed: of the order.
    """

    def __init__(self, rows: RawRows, labels: Tensor, batch_size: int, seed: int) -> None:
        self.rows, self.labels, self.batch_size, self.seed = rows, labels, batch_size, seed

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches `start` to `stop - 1`; an epoch may end inside of one."""
        chosen = [self._choose(step) for step in range(start, stop)]
        read = self.rows.split.read(self.rows.ids[index].tolist() for index in chosen)
        for index, batch in zip(chosen, read, strict=True):
            yield {**batch, "label": self.labels[index]}

    def _choose(self, step: int) -> Tensor:
        total = len(self.rows)
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = {e: np.random.default_rng(mix_seed(self.seed, e)).permutation(total) for e in {*places // total}}
        return torch.tensor([epochs[place // total][place % total] for place in places])


def answers(objective: Supervised, rows: RawRows, batch_size: int) -> Tensor:
    """Answers for every row, float (M, width) on the CPU."""
    device = next(objective.parameters()).device
    with evaluating(objective), torch.no_grad():
        return torch.cat([objective.answer(to_device(batch, device)).cpu() for batch in rows.batches(batch_size)])


def scale_by_depth(encoder: Encoder, decay: float) -> None:
    """Set `lr_scale` of every parameter to decay^(n + 1 - i), i the number of its block of n (MAE's rule).

    Depth is the order in which blocks appear: a block is named by a parameter's name up to its first number, as
    in `blocks.3` or `layer2.0`. What lies between blocks belongs to the one before; what comes before all of them, and
    every embedding, has i = 0; what follows the last, n + 1.
    """
    embeddings = {p for m in encoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    blocks: dict[str, int] = {}
    depths: list[tuple[nn.Parameter, float]] = []
    for name, parameter in encoder.named_parameters():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            depths.append((parameter, blocks.setdefault(".".join(parts[: number + 1]), len(blocks) + 1)))
        else:
            depths.append((parameter, 0 if parameter in embeddings else len(blocks) + 0.5))
    last = len(blocks)
    for parameter, depth in depths:
        i = last + 1 if depth > last else int(depth)
        parameter.lr_scale = decay ** (last + 1 - i)  # type: ignore[attr-defined]
