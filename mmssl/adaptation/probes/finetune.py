"""Fine-tuning: a linear head on pooled features, trained together with a copy of the encoder."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from mmssl.adaptation.features import POOLED, encode, inputs_of
from mmssl.adaptation.probes._layers import freeze_blocks, rest, scale_by_depth
from mmssl.adaptation.probes._lora import add_adapters, check_peft, merge
from mmssl.adaptation.probes._trained import LabeledTask, answers, train
from mmssl.adaptation.probes._unfinished import HEAD, WHOLE, Place, ResumableLearner, Trained
from mmssl.adaptation.probes.base import RawRows, Setting
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.targets.base import HELD_OUT, Target
from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import DataError, RecipeError
from mmssl.objectives.base import Step
from mmssl.ops.draws import Draws
from mmssl.ops.gather import average
from mmssl.ops.mixing import mix_rows
from mmssl.ranges import AboveZero, Count, Positive, Share, Weight
from mmssl.training.step import unchanged

EVALUATIONS = 20
"""In a training that may be stopped early."""


class Supervised(LabeledTask):
    """A linear head on pooled features.

    They are centered and divided by their spread over the first step's rows, so that a learning rate means the same for
    every encoder. Both are constants from then on, so that it all is one linear map, which a library's own class holds.

    Args:
        encoder: trained along.
        target: what the labels are.
        units: see `LabeledTask`.
        mixup: see `Finetune`.
        cutmix: see `Finetune`.

    Attributes:
        center: of the features, (D,).
        spread: their standard deviation, one number; 0 before it is known.
    """

    def __init__(
        self,
        encoder: Encoder,
        target: Target,
        units: tuple[Tensor, Tensor],
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__({encoder.modality: encoder}, inputs_of(encoder), target, units)
        if (mixup or cutmix) and encoder.modality not in ("image", "video"):
            raise RecipeError(f"mixup and cutmix mix pictures and clips, and this encoder reads {encoder.modality}")
        self.mixup, self.cutmix = mixup, cutmix
        self.meets = "transform" if mixup or cutmix else "nowhere"
        self.center, self.spread = nn.Buffer(torch.zeros(encoder.dim)), nn.Buffer(torch.zeros(()))
        self.head = nn.Linear(encoder.dim, target.width)

    def train(self, mode: bool = True) -> Self:
        """See `torch.nn.Module.train`; what learns nothing stays in evaluation mode."""
        super().train(mode)
        rest(self)
        return self

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Rows as they are, or mixed."""
        inputs = super().transform(batch, draws)
        if self.mixup or self.cutmix:
            key = self.inputs[0]
            x = inputs[key] if inputs[key].is_floating_point() else inputs[key] / 255
            mixed = mix_rows(x, inputs["label"], draws, by_mixup=self.mixup, by_cutmix=self.cutmix)
            inputs[key], inputs["label"] = mixed
        return inputs

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
        return encode(self.encoder(key), inputs[key], inputs.get(valid_key)).pooled

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


class Watch:
    """What early stopping saw: scores of held-out rows while their network learned.

    Args:
        target: whose first metric counts.
        rows: held out.
        labels: of them.
        patience: evaluations without a better score before it is enough.
        every: steps between two evaluations.
        batch_size: rows that are answered at a time.
        place: where a call that was killed left scores, and where they are kept.

    Attributes:
        scores: of each evaluation, in order.
    """

    def __init__(
        self,
        target: Target,
        rows: RawRows,
        labels: Tensor,
        patience: int,
        every: int,
        batch_size: int,
        place: Place | None = None,
    ) -> None:
        self.target, self.rows, self.labels, self.place = target, rows, labels, place
        self.patience, self.every, self.batch_size = patience, every, batch_size
        self.scores = [] if place is None else place.scores(WHOLE, every)

    @property
    def best(self) -> tuple[float, int]:
        """The highest score, and after how many steps it came first."""
        score = max(self.scores)
        return score, (self.scores.index(score) + 1) * self.every

    def outcome(self, objective: Supervised) -> Tensor:
        """`best` of the training that it watched, float64 (2,)."""
        return torch.tensor(self.best, dtype=torch.float64)

    def is_enough(self, objective: Supervised) -> bool:
        """Score the network as it is now, and say whether to stop."""
        said = answers(objective, self.rows, self.batch_size)
        score = self.target.score(said, self.labels)[self.target.metrics[0].name]
        # All processes have to agree on when it is enough.
        self.scores.append(average(objective.spread.new_tensor(score, dtype=torch.float64)).item())
        if self.place is not None:
            self.place.keep_scores(self.scores)
        return len(self.scores) - self.best[1] // self.every >= self.patience


class Finetune(ResumableLearner[RawRows]):
    """AdamW with a cosine schedule and layer-wise learning rates, decay^(depth from the head) (He et al. 2022, A.1).

    The paper's decay is 0.75 for ViT-L; 1.0 is there because a random-initialized encoder must train its first
    layers, and a baseline deserves settings of its own. There is no augmentation but mixing.

    Args:
        lr: candidates for the peak learning rate.
        decay: candidates for the factor between a layer and the next.
        steps: optimizer steps; a subset of few rows is passed through more often.
        batch_rows: rows of a step, at most all of them.
        weight_decay: of AdamW.
        mixup: alpha of the Beta distribution that says how much of each picture is another one's (Zhang et al. 2018;
            0.2 there, 0.8 for transformers), its label likewise; 0 for none. With `cutmix`, one of both by a coin.
        cutmix: likewise of the area that is another picture's (Yun et al. 2019; 1.0 there).
        freeze: so many blocks, and the embeddings before them, stay as they are.
        head_steps: steps in which the head alone learns, before the others (Kumar et al. 2022, arXiv 2202.10054).
        early_stop: evaluations without a better score, of 20 in a training, after which a candidate is given up. They
            are of the held-out rows that choose among candidates, and the best one's step is chosen with it: the
            training on all rows ends there (Goodfellow et al. 2016, algorithm 7.2). 0 for never.
        lora: rank of adapters next to all linear layers, which learn in place of these and are merged at the end; 0 for
            none. It takes `pip install "mmssl[lora]"`.
    """

    def __init__(
        self,
        *,
        lr: tuple[AboveZero, ...] = (3e-4, 1e-3),
        decay: tuple[Share, ...] = (0.75, 1.0),
        steps: Positive = 300,
        batch_rows: Positive = 64,
        weight_decay: Weight = 0.05,
        mixup: Weight = 0.0,
        cutmix: Weight = 0.0,
        freeze: Count = 0,
        head_steps: Count = 0,
        early_stop: Count = 0,
        lora: Count = 0,
    ) -> None:
        super().__init__()
        if lora:
            check_peft()
            if freeze:
                raise RecipeError(f"freeze = {freeze} and lora = {lora}: with lora no block learns; leave freeze out")
        self.lr, self.decay, self.steps, self.batch_rows, self.weight_decay = lr, decay, steps, batch_rows, weight_decay
        self.mixup, self.cutmix = mixup, cutmix
        self.freeze, self.head_steps, self.early_stop, self.lora = freeze, head_steps, early_stop, lora

    @property
    def chooses(self) -> bool:
        """See `Learner`; with `early_stop` at least the step."""
        return super().chooses or self.early_stop > 0

    def settings(self) -> Sequence[Setting]:
        """Every pair of learning rate and decay, the least change of the encoder first."""
        return [{"lr": lr, "decay": decay} for lr, decay in itertools.product(sorted(self.lr), sorted(self.decay))]

    def choose(
        self,
        target: Target,
        train: RawRows,
        labels: Tensor,
        seed: int,
        groups: Tensor | None = None,
        *,
        always: bool = False,
    ) -> tuple[Setting, float | None]:
        """See `Learner.choose`; with `early_stop` the setting says at which of the steps to stop."""
        if not self.early_stop:
            return super().choose(target, train, labels, seed, groups, always=always)
        held = target.hold_out(labels, HELD_OUT, seed, groups)
        if not held.any():
            raise DataError("no class has two training rows to spare, so early_stop has none to look at; leave it out")
        every = max(1, self.steps // EVALUATIONS)
        chosen: list[tuple[float, int, Setting]] = []
        for setting in self.settings():
            some, rest_of = (train[~held], labels[~held]), train[held]
            place = self._place(target, *some, rest_of, setting, seed, "watched")
            watch = Watch(target, rest_of, labels[held], self.early_stop, every, 4 * self.batch_rows, place)
            _, best = self.finish(
                place,
                partial(self.train, target, *some, setting, seed, watch, place),
                partial(self._untrained, target, *some, seed),
                watch.outcome,
                last=False,
            )
            score, step = best.tolist()
            chosen.append((score, int(step), setting))
        score, step, setting = max(chosen, key=lambda one: one[0])
        return {**setting, "steps": step}, score

    def predict(
        self, target: Target, train: RawRows, labels: Tensor, test: RawRows, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """See `Learner.predict`; the encoder of `train` is copied, never changed."""
        last = len(settings) == 1  # and no choice among them
        for setting in settings:
            place = self._place(target, train, labels, test, setting, seed)
            objective, answered = self.finish(
                place,
                partial(self.train, target, train, labels, setting, seed, place=place),
                partial(self._untrained, target, train, labels, seed),
                partial(answers, rows=test, batch_size=4 * self.batch_rows),
                last=last,
            )
            if objective is not None:
                self.trained = Trained(objective, train.split)
            yield answered

    def _place(
        self, target: Target, rows: RawRows, labels: Tensor, others: RawRows, setting: Setting, seed: int, *how: str
    ) -> Place | None:
        options = {key: value for key, value in vars(self).items() if isinstance(value, int | float)}
        return self.place(rows, labels, others, seed, target.name, target.arguments, dict(setting), options, *how)

    def training_rows(self, model: Model, request: Request) -> tuple[Target, RawRows, Tensor]:
        """What `train` takes, of the training rows that can be decoded; raises as `score` does."""
        question = self.ask(model, request)
        (view,), read = self._read([model.encoder], question.train.split, question.train.ids, request)
        return question.target, view[POOLED], question.train.labels[torch.isin(question.train.ids, read)]

    def train(
        self,
        target: Target,
        rows: RawRows,
        labels: Tensor,
        setting: Setting,
        seed: int,
        watch: Watch | None = None,
        place: Place | None = None,
    ) -> Supervised:
        """One training on all of `rows`.

        Args:
            target: what the labels are.
            rows: N of them.
            labels: of them.
            setting: learning rate, decay, and where to stop before the end of the schedule `steps`.
            seed: of the head, of the order and of every draw.
            watch: may stop it.
            place: of checkpoints, from the last of which it goes on.
        """
        objective = self._untrained(target, rows, labels, seed)
        encoder = objective.encoder(rows.encoder.modality)
        fit = partial(
            train,
            objective,
            rows,
            target.matrix(labels),
            lr=setting["lr"],
            weight_decay=self.weight_decay,
            batch_rows=self.batch_rows,
            seed=seed,
        )
        if self.head_steps:
            learning = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
            encoder.requires_grad_(False)
            fit(steps=self.head_steps, directory=None if place is None else place.part(HEAD))
            for parameter in learning:
                parameter.requires_grad_(True)
        adapters = None
        if self.lora:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                adapters = add_adapters(encoder, self.lora)
        freeze_blocks(encoder, self.freeze)
        scale_by_depth(encoder, setting["decay"])
        directory = None if place is None else place.part(WHOLE)
        fit(steps=self.steps, stop=int(setting.get("steps", 0)), watch=watch, directory=directory)
        if adapters is not None:
            merge(adapters)
        return objective

    def _untrained(self, target: Target, rows: RawRows, labels: Tensor, seed: int) -> Supervised:
        """A copy of the encoder, with a new head."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoder = copy.deepcopy(rows.encoder).float()  # of a run in float64, too
            if encoder.frozen:
                encoder.freeze(False)
            return Supervised(encoder, target, target.units(labels), mixup=self.mixup, cutmix=self.cutmix)
