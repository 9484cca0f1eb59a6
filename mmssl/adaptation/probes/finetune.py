"""Fine-tuning: a linear head on pooled features, trained together with a copy of the encoder."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmssl.adaptation.features import POOLED, inputs_of
from mmssl.adaptation.probes._trained import LabeledTask, answers, train
from mmssl.adaptation.probes.base import Learner, RawRows, Setting
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import Split
from mmssl.adaptation.targets.base import Target
from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.objectives.base import Step
from mmssl.ops.gather import average
from mmssl.training.step import unchanged


class Supervised(LabeledTask):
    """A linear head on pooled features.

    They are centered and divided by their spread over the first step's rows, so that a learning rate means the same for
    every encoder. Both are constants from then on, so that it all is one linear map, which a library's own class holds.

    Args:
        encoder: trained along.
        target: what the labels are.
        units: see `LabeledTask`.

    Attributes:
        center: of the features, (D,).
        spread: their standard deviation, one number; 0 before it is known.
    """

    def __init__(self, encoder: Encoder, target: Target, units: tuple[Tensor, Tensor]) -> None:
        super().__init__({encoder.modality: encoder}, inputs_of(encoder), target, units)
        self.center, self.spread = nn.Buffer(torch.zeros(encoder.dim)), nn.Buffer(torch.zeros(()))
        self.head = nn.Linear(encoder.dim, target.width)

    def before_step(self, step: Step) -> None:
        """Look at the first step's features, as that step sees them."""
        if step.number or self.spread > 0:
            return
        with torch.no_grad():
            with unchanged(self):
                torch.manual_seed(0)  # of dropout
                pooled = self._pooled(step.inputs)
            self.center.copy_(average(pooled.mean(0)))
            self.spread.copy_(average((pooled - self.center).square().mean()).sqrt().clamp(min=1e-6))

    def _pooled(self, inputs: Batch) -> Tensor:
        key, valid_key = self.inputs
        pooled: Tensor = self.encoder(key)(inputs[key], inputs.get(valid_key)).pooled
        return pooled

    def predict(self, inputs: Batch) -> Batch:
        """`outputs` (B, width)."""
        return {"outputs": self.head((self._pooled(inputs) - self.center) / self.spread)}

    def linear(self) -> tuple[Tensor, Tensor]:
        """Weight (width, D) and bias (width,) from pooled features as they are to logits, or to values in their units.

        float32, on the CPU.
        """
        parts = (*self.head.parameters(), self.center, self.spread, self.shift, self.scale)
        weight, bias, center, spread, shift, scale = (part.detach().double().cpu() for part in parts)
        weight = weight / spread
        return (weight * scale[:, None]).float(), ((bias - weight @ center) * scale + shift).float()


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
    trains: ClassVar[bool] = True
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
        train(
            objective,
            rows,
            target.matrix(labels),
            lr=setting["lr"],
            weight_decay=self.weight_decay,
            steps=self.steps,
            batch_rows=self.batch_rows,
            seed=seed,
        )
        return objective


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
