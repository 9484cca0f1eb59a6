"""The contract of a probe, and the protocol of those that learn from labeled rows.

Hyper-parameters are chosen on held-out training rows, never on test rows, anew for every encoder and depth, with the
first seed; then the probe learns from all training rows. Test rows are looked at once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmssl import registry
from mmssl.adaptation.features import POOLED
from mmssl.adaptation.labeled import LabeledRows, Question
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import Split, in_order
from mmssl.adaptation.table import CONSTANT, PRETRAINED, RANDOM, Row, Table
from mmssl.adaptation.targets.base import HELD_OUT, Target
from mmssl.batch import Batch
from mmssl.encoders import reinitialized
from mmssl.encoders.base import Encoder
from mmssl.errors import DataError, RecipeError, counted
from mmssl.ops.draws import mix_seed

Setting = Mapping[str, float]
VALIDATED = 300
"""Validation rows, over all hold-outs, from which on no further one is drawn."""


class Probe:
    """One way to ask what a network has learned; a module of this room, found by its name.

    Subclasses take keyword-only hyper-parameters, of which some may be lists of candidates.

    Attributes:
        column: of the labels, where no other is named.
    """

    column: ClassVar[str] = "label"

    @property
    def name(self) -> str:
        """That of its module."""
        return type(self).__module__.rpartition(".")[2]

    def check(self, model: Model, request: Request) -> None:
        """Raise what `score` would before it encodes a row; labels are read for that."""

    def score(self, model: Model, request: Request) -> Table:
        """The table of the network and its baselines; the network stays as it was.

        Raises:
            RecipeError: for a request that makes no sense to this probe.
            DataError: for a source, column or label that is not there or does not fit.
            RunError: where features are not finite.
        """
        raise TypeError(f"{type(self).__name__} scores nothing")


class RawRows:
    """Rows that are decoded when they are read, with the encoder that reads them: for a probe that trains it.

    Args:
        encoder: reads them.
        split: where they are.
        ids: their numbers there, int64 (N,).
    """

    def __init__(self, encoder: Encoder, split: Split, ids: Tensor) -> None:
        self.encoder, self.split, self.ids = encoder, split, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Tensor) -> RawRows:
        return RawRows(self.encoder, self.split, self.ids[index])

    def read(self, picks: Iterable[Tensor]) -> Iterator[Batch]:
        """A batch for each of `picks`, places of rows, int64."""
        return self.split.read(self.ids[pick].tolist() for pick in picks)


class Indexed(Protocol):
    """Rows that can be selected: features or raw rows."""

    def __getitem__(self, index: Any, /) -> Self:
        """Those of `index`, int64 or bool."""
        ...


X = TypeVar("X", bound=Indexed)
View = dict[str, Any]
"""Depth -> rows X, as one encoder sees them."""


@dataclass(frozen=True)
class Answers:
    """What a probe says of every test row.

    Attributes:
        encoder: as in `Row`.
        depth: `pooled` or the depth that was probed.
        seed: of the probe.
        target: what the labels are.
        answers: of that target, float (M, width).
        test: the M rows, with their labels.
    """

    encoder: str
    depth: str
    seed: int
    target: Target
    answers: Tensor
    test: LabeledRows


class Learner(Probe, Generic[X]):
    """Learns from labeled rows `X`: features float32 (N, D), tokens, or `RawRows` where `frozen` is False.

    Attributes:
        frozen: whether it works on pooled features and leaves the encoder as it is.
        trains: whether it trains a network from random weights, so that another seed gives other answers.
        learns: names of the targets that it can learn, and with them those that derive from them.
        hold_outs: how often at most rows are held out to choose a setting; more than once where fits are cheap.
        chosen_on: rows that `choose` scores settings on, for the table.
        warnings: sentences about fits that did not go as they should; printed under the table.
    """

    frozen: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    learns: ClassVar[tuple[str, ...]] = ("classes", "labels", "values")
    hold_outs: ClassVar[int] = 1
    chosen_on: ClassVar[str] = "a fifth of the training rows"

    def __init__(self) -> None:
        self.warnings: list[str] = []

    @property
    def tells_depths(self) -> bool:
        """Whether it can be asked of every depth."""
        return self.frozen

    @property
    def chooses(self) -> bool:
        """Whether anything is chosen on held-out rows."""
        return len(self.settings()) > 1

    def settings(self) -> Sequence[Setting]:
        """Candidate hyper-parameters, the smoothest model first: of equals on the validation rows it is taken."""
        raise TypeError(f"{type(self).__name__} has no settings")

    def predict(
        self, target: Target, train: X, labels: Tensor, test: X, settings: Sequence[Setting], seed: int
    ) -> Iterator[Tensor]:
        """Learn from `train` with each of `settings`; yields the answers for `test`, float (M, width), one for each.

        Args:
            target: what the labels are.
            train: N rows.
            labels: of `train`, (N, ...).
            test: M rows.
            settings: from `settings()`.
            seed: of whatever is random.
        """
        raise TypeError(f"{type(self).__name__} cannot predict")

    def choose(
        self,
        target: Target,
        train: X,
        labels: Tensor,
        seed: int,
        groups: Tensor | None = None,
        *,
        always: bool = False,
    ) -> tuple[Setting, float | None]:
        """The setting that scores best, by the target's first metric, on a held-out fifth of the training rows.

        Of ten labels a class that is two, by which a setting is chosen as by dice: where validation rows are few,
        scores are averaged over several hold-outs, up to `hold_outs` of them.

        Args:
            target: what the labels are.
            train: N rows.
            labels: (N, ...).
            seed: of the hold-out.
            groups: int64 (N,), rows that must not be divided.
            always: score it even where there is but one, so that depths can be compared.

        Returns:
            The setting, and its score; None where nothing was scored.

        Raises:
            DataError: where there is more than one setting and no row to spare.
        """
        settings = list(self.settings())
        if len(settings) == 1 and not always:
            return settings[0], None
        held = target.hold_out(labels, HELD_OUT, seed, groups)
        if not held.any() and len(settings) == 1:
            return settings[0], None
        if not held.any():
            raise DataError(
                f"no class has two training rows{' of different groups' if groups is not None else ''}, so "
                f"{', '.join(settings[0])} cannot be chosen on a validation split; learn from more than {len(labels)}, "
                "or give it one value"
            )
        times = min(self.hold_outs, -(-VALIDATED // int(held.sum())))
        scores = []
        for number in range(times):
            if number:
                held = target.hold_out(labels, HELD_OUT, mix_seed(seed, number), groups)
            fitted = self.predict(target, train[~held], labels[~held], train[held], settings, seed)
            scores.append([target.score(answers, labels[held])[target.metrics[0].name] for answers in fitted])
        means = np.mean(scores, axis=0)
        return settings[int(np.argmax(means))], float(means.max())

    def ask(self, model: Model, request: Request) -> Question:
        """The labeled rows, and what their labels are; see `Question.of`.

        Raises:
            RecipeError: where this probe cannot learn them.
        """
        if request.layers and not self.tells_depths:
            raise RecipeError(
                f"layers probes frozen features, and {self.name} trains the encoder; use knn, ridge or logistic"
            )
        if request.target is None and len(self.learns) == 1:
            request = replace(request, target=self.learns[0])
        question = Question.of(model, request, hold_out=request.hold_out)
        kinds = {base.__module__.rpartition(".")[2] for base in type(question.target).__mro__}
        if kinds.isdisjoint(self.learns):
            raise RecipeError(
                f"{self.name} learns {' or '.join(self.learns)}, and '{request.label}' holds {question.target.name}"
                f"{_who_learns(question.target)}"
            )
        return question

    def check(self, model: Model, request: Request) -> None:
        """See `Probe`."""
        self.ask(model, request)

    def score(self, model: Model, request: Request) -> Table:
        """See `Probe`."""
        question = self.ask(model, request)
        target = question.target
        train, test, seeds = question.train, question.test, request.seeds
        # Rows are chosen before they are read.
        drawn: list[Tensor | None] = [None] * len(seeds)
        if request.shots:
            picks = [target.draw_shots(train.labels, request.shots, seed) for seed in seeds]
            some = torch.cat(picks).unique()
            train, drawn = train[some], [torch.searchsorted(some, pick) for pick in picks]
        told = target.look(train.labels, test.labels)
        # Of labels that would have to be read for it, those that are not learned from say nothing.
        known = train.labels if target.placed else question.train.labels

        device = next(model.encoder.parameters()).device
        random = [reinitialized(model.encoder, seed).to(device) for seed in seeds] if request.baseline else []
        views, test_views, kept, test_kept = self._views([model.encoder, *random], train, test, request)
        lost = int((~kept).sum() + (~test_kept).sum())
        train, test, place = train[kept], test[test_kept], kept.cumsum(0) - 1
        drawn = [None if pick is None else place[pick[kept[pick]]] for pick in drawn]

        # A frozen encoder and a probe of all rows: nothing is random unless a network is trained; one seed says it all.
        own_seeds = seeds if request.shots or self.trains else seeds[:1]
        plan = [(PRETRAINED, own_seeds, [0] * len(own_seeds))]
        if request.baseline:
            plan.append((RANDOM, seeds, list(range(1, 1 + len(seeds)))))
        rows: list[Row] = []
        for encoder, row_seeds, which in plan:
            pairs = [(views[i], test_views[i]) for i in which]
            rows.extend(self._rows(target, encoder, pairs, train, test, row_seeds, drawn, request))
        constant = target.constant(known)
        constant = constant.expand(len(test), *constant.shape)
        rows.append(Row.of_seeds(CONSTANT, "", [target.score(constant, test.labels)], **_shares(target, test)))
        depths = list(views[0])
        warnings = [*question.warnings, *told, *([f"{counted(lost, 'undecodable row')} left out"] if lost else [])]
        return Table(
            rows=tuple(sorted(rows, key=lambda row: depths.index(row.part or depths[0]))),
            metrics=target.metrics,
            probe=self.name,
            target=target.name,
            label=request.label,
            encoder=model.name,
            train_rows=len(question.train),
            test_rows=len(test),
            counts=target.counts(known),
            shots=request.shots,
            drawn=tuple(len(pick) for pick in drawn if pick is not None),
            test=question.where,
            validation=f"{self.chosen_on}{question.undivided}" if self.chooses else "",
            seeds=seeds,
            notes=question.notes,
            warnings=tuple(dict.fromkeys([*warnings, *self.warnings])),
        )

    def _views(
        self, encoders: Sequence[Encoder], train: LabeledRows, test: LabeledRows, request: Request
    ) -> tuple[list[View], list[View], Tensor, Tensor]:
        """Training and test rows as each encoder sees them, and which of them can be decoded, bool (N,) and (M,)."""
        if train.split is test.split:
            seen = [self._read(encoders, train.split, torch.cat([train.ids, test.ids]).unique(), request)] * 2
        else:
            seen = [self._read(encoders, rows.split, rows.ids, request) for rows in (train, test)]
        views: list[list[View]] = []
        kept: list[Tensor] = []
        for rows, (found, read) in zip((train, test), seen, strict=True):
            kept.append(torch.isin(rows.ids, read))
            places = torch.searchsorted(read, rows.ids[kept[-1]])
            views.append([{depth: x[places] for depth, x in view.items()} for view in found])
        return views[0], views[1], kept[0], kept[1]

    def _read(
        self, encoders: Sequence[Encoder], split: Split, ids: Tensor, request: Request
    ) -> tuple[list[View], Tensor]:
        """What each encoder sees of the rows, and the numbers of those that can be decoded."""
        if self.frozen:
            features, read = request.cache.features(
                encoders, split, ids.numpy(), layers=request.layers, batch_size=request.batch_size
            )
            return [dict(one) for one in features], read
        split = split.random_access(ids.tolist())
        batches = split.read(in_order(ids.numpy(), request.batch_size))
        read = torch.cat([torch.empty(0, dtype=torch.int64), *(batch["id"] for batch in batches)])
        return [{POOLED: RawRows(encoder, split, read)} for encoder in encoders], read

    def _rows(
        self,
        target: Target,
        encoder: str,
        views: Sequence[tuple[View, View]],
        train: LabeledRows,
        test: LabeledRows,
        seeds: Sequence[int],
        drawn: Sequence[Tensor | None],
        request: Request,
    ) -> Iterator[Row]:
        """A line of the table for every depth of one encoder.

        Args:
            target: of the labels.
            encoder: name in the table.
            views: of the training and of the test rows, a pair for each seed.
            train: rows to learn from.
            test: rows to be scored on.
            seeds: as many as there are views.
            drawn: places of the training rows that each seed learns from; None for all.
            request: is told the answers, where it listens.
        """
        for depth in views[0][0]:
            setting: Setting | None = None
            validation: float | None = None
            scores = []
            for seed, pick, (view, test_view) in zip(seeds, drawn, views, strict=False):
                x, rows = view[depth], train
                if pick is not None:
                    x, rows = x[pick], train[pick]
                if setting is None:
                    every_depth = request.layers
                    setting, validation = self.choose(target, x, rows.labels, seed, rows.groups, always=every_depth)
                (answers,) = self.predict(target, x, rows.labels, test_view[depth], [setting], seed)
                scores.append(target.score(answers, test.labels))
                if request.listen is not None:
                    request.listen(Answers(encoder, depth, seed, target, answers, test))
            yield Row.of_seeds(encoder, depth, scores, setting=setting, validation=validation, **_shares(target, test))


def _who_learns(target: Target) -> str:
    """The probes that learn a target which most do not."""
    if not target.placed:
        return ""
    kinds = {name: registry.find("probe", name) for name in registry.components("probe")}
    return "; ask " + " or ".join(name for name, kind in kinds.items() if target.name in getattr(kind, "learns", ()))


def _shares(target: Target, test: LabeledRows) -> dict[str, Any]:
    return {"shares": [metric.name for metric in target.shares], "trials": len(test)}
