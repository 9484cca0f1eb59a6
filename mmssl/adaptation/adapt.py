"""The one adaptation call: an encoder, labeled rows, a probe; out comes a table with its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mmssl import registry
from mmssl.adaptation.features import POOLED, collect, extract
from mmssl.adaptation.layers import probe_depths
from mmssl.adaptation.pairs import Asked, PairProbe
from mmssl.adaptation.probes.base import HELD_OUT, Probe, RawRows, hold_out
from mmssl.adaptation.rows import Labeled, Rows, groups_of, labels_of, open_pair
from mmssl.adaptation.scores import CONSTANT, PRETRAINED, RANDOM, RetrievalScores, Scores, score
from mmssl.batch import Batch
from mmssl.encoders import reinitialized
from mmssl.encoders.base import Encoder
from mmssl.errors import DataError, RecipeError
from mmssl.objectives.base import Objective
from mmssl.recipe import Data


@overload
def adapt(
    encoder: Objective, train: Labeled, test: Labeled | None = None, *, probe: Literal["retrieval"], **settings: Any
) -> RetrievalScores: ...


@overload
def adapt(encoder: Encoder | Objective, train: Labeled, test: Labeled | None = None, **settings: Any) -> Scores: ...


def adapt(
    encoder: Encoder | Objective,
    train: Labeled,
    test: Labeled | None = None,
    *,
    label: str = "label",
    probe: str = "knn",
    layers: bool = False,
    baseline: bool = True,
    seed: int = 0,
    seeds: int = 3,
    shots: int | None = None,
    groups: str | None = None,
    data: Data | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    **options: Any,
) -> Scores | RetrievalScores:
    """Learn classes from labeled rows on top of `encoder`, and score rows that were not seen.

    The probes `retrieval` and `zero_shot` learn nothing: they take a task (`run.objective`) in place of the encoder,
    and compare pairs of rows, or rows and the names of classes, in the space that the task trained.

    Hyper-parameters are chosen on a fifth of the training rows, anew for every encoder and depth, with the first seed;
    then the probe learns from all training rows. Test rows are looked at once, at the end. `encoder` stays as it was.

    Args:
        encoder: pretrained; for `retrieval` and `zero_shot` the task.
        train: a source as in a recipe (`toy`, folder, parquet file, Hub name ...), a `recipe.Data`, a
            `datasets.Dataset`, or batches with the encoder's key and `label`.
        test: likewise; of a source that has a test split, that. Where left out, the `test` split of the training
            source, or else its `validation` split; where it has neither, a stratified fifth of the training rows, and
            for `retrieval` and `zero_shot` all of them.
        label: column of the classes, whole numbers or names; of batches it is always `label`.
        probe: `knn`, `ridge`, `logistic`, `finetune`, `retrieval` or `zero_shot`; `mmssl list` says what each is.
        layers: probe every depth as well.
        baseline: score the same network, random-initialized, as well.
        seed: the first of `seeds` consecutive seeds.
        seeds: random-initialized encoders; also draws of `shots`, and trainings of `finetune`.
        shots: learn from only so many rows a class.
        groups: column (of batches: key) of what a split made here must not divide, such as drawings of one thing; for
            `retrieval`, of rows whose two sides all belong together (without it those of one row, and equal items).
        data: how to decode and name columns; its source is not read.
        columns: batch key -> column, as in a recipe.
        limit: rows of `train` and of `test`, each.
        batch_size: rows that go through the encoder at a time.
        workers: processes that decode.
        **options: the probe's hyper-parameters.

    Raises:
        RecipeError: for an unknown probe or option.
        DataError: for a source, column or label that is not there or does not fit.
        RunError: where features are not finite.
    """
    kind = registry.find("probe", probe)
    learner: Probe | PairProbe = kind(**registry.check_keywords(kind, options, f"probe {probe}"))
    for name, value in {"seeds": seeds, "shots": shots, "limit": limit}.items():
        if value is not None and value < 1:
            raise RecipeError(f"{name} = {value}: expected at least 1")
    every_seed = tuple(range(seed, seed + seeds))
    if isinstance(learner, PairProbe):
        if not isinstance(encoder, Objective):
            raise RecipeError(f"{probe} compares two encoders in the space of their task; give the task: run.objective")
        if layers or shots:
            raise RecipeError(f"{probe} learns nothing and looks at no depths; leave layers and shots out")
        return learner.score(
            encoder,
            Asked(train, test, label, baseline, every_seed, groups, data, columns, limit, batch_size, workers),
        )
    if not isinstance(encoder, Encoder):
        raise RecipeError(f"{probe} learns from the features of one encoder; give that: run.encoders[...]")
    if layers and not learner.frozen:
        raise RecipeError(f"layers probes frozen features, and {probe} trains the encoder; use knn, ridge or logistic")
    known, asked = open_pair(
        train,
        test,
        encoder,
        label=label,
        groups=groups,
        data=data,
        columns=columns,
        limit=limit,
        batch_size=batch_size,
        workers=workers,
    )
    device = next(encoder.parameters()).device
    random = [reinitialized(encoder, number).to(device) for number in every_seed] if baseline else []
    views, rest = _look(learner, [encoder, *random], known, layers)
    labels, together = labels_of(known, rest), groups_of(known, rest, groups)
    undivided = f", '{groups}' undivided" if groups else ""
    if asked is not None:
        test_views, test_rest = _look(learner, [encoder, *random], asked, layers)
        truth, where = labels_of(asked, test_rest), asked.where
    else:
        held = hold_out(labels, HELD_OUT, seed, together)
        test_views, views = _pick(views, held), _pick(views, ~held)
        truth, labels, together = labels[held], labels[~held], None if together is None else together[~held]
        where = f"a fifth of {known.where}, held out by class{undivided}"
    warnings = _check_classes(labels, truth, known.where)

    # A frozen encoder and a probe of all rows: nothing is random, so one seed says it all.
    own_seeds = every_seed if shots or not learner.frozen else every_seed[:1]
    plan = [(PRETRAINED, own_seeds, [0] * len(own_seeds))]
    if baseline:
        plan.append((RANDOM, every_seed, list(range(1, 1 + seeds))))
    rows = [
        row
        for name, row_seeds, which in plan
        for row in probe_depths(
            learner,
            name,
            [views[i] for i in which],
            [test_views[i] for i in which],
            labels,
            truth,
            seeds=row_seeds,
            groups=together,
            shots=shots,
        )
    ]
    rows.append(score(CONSTANT, POOLED, [labels.bincount().argmax().expand(len(truth))], truth))
    depths = list(views[0])
    return Scores(
        rows=tuple(sorted(rows, key=lambda row: depths.index(row.layer))),
        probe=probe,
        label=label,
        train_rows=len(labels),
        test_rows=len(truth),
        classes=len(labels.unique()),
        shots=shots,
        test=where,
        validation=f"a fifth of the training rows, held out by class{undivided}"
        if len(learner.settings()) > 1
        else "nothing: there was one candidate",
        seeds=every_seed,
        warnings=tuple(dict.fromkeys([*warnings, *learner.warnings])),
    )


def _look(
    probe: Probe, encoders: Sequence[Encoder], rows: Rows, layers: bool
) -> tuple[list[dict[str, Tensor | RawRows]], Batch]:
    """The rows as each encoder sees them, and what stands beside the encoders' input."""
    if probe.frozen:
        found, rest = extract(encoders, rows.batches, layers=layers)
        return [dict(view) for view in found], rest
    batch = collect(rows.batches)
    return [{POOLED: RawRows(encoder, batch)} for encoder in encoders], batch


def _pick(views: list[dict[str, Tensor | RawRows]], index: Tensor) -> list[dict[str, Tensor | RawRows]]:
    return [{depth: rows[index] for depth, rows in view.items()} for view in views]


def _check_classes(labels: Tensor, truth: Tensor, where: str) -> list[str]:
    """Raise DataError where there is nothing to learn; warnings for what a reader should know."""
    classes = labels.unique()
    if len(classes) < 2:
        raise DataError(f"{where}: all {len(labels)} training rows are of one class")
    if len(classes) > len(labels) / 2:
        raise DataError(
            f"{where}: {len(classes)} classes in {len(labels)} training rows; is this column really a label?"
        )
    if not len(truth):
        raise DataError(f"{where}: no class has a row to spare for the test; give test rows")
    unknown = int((~torch.isin(truth, classes)).sum())
    return [f"{unknown} test rows are of classes that no training row has; they count as wrong"] if unknown else []
