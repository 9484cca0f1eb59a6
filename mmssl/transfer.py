"""The one adaptation call: a pretrained network, labeled rows, a probe; out comes a table with its baselines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from mmssl.adaptation.cache import FeatureCache
from mmssl.adaptation.probes import make_probe
from mmssl.adaptation.probes._unfinished import ResumableLearner, Trained, Unfinished
from mmssl.adaptation.probes.base import Answers
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import Labeled, are_batches, where
from mmssl.adaptation.table import PRETRAINED, Table
from mmssl.atomic import writing
from mmssl.encoders.base import Encoder
from mmssl.errors import Interrupted, RecipeError
from mmssl.hub.classifier import UNDECODED, check_room, save_classifier
from mmssl.hub.load import load
from mmssl.objectives.base import Objective
from mmssl.ops.gather import process_share, wait_for_everyone
from mmssl.recipe import Data
from mmssl.report.page import write_report
from mmssl.run_directory import FEATURES, UNFINISHED, Run
from mmssl.training.launch import start_processes
from mmssl.training.lock import locked
from mmssl.training.peers import ending_together
from mmssl.way_on import repeated


def adapt(
    model: Run | str | Path | Encoder | Objective,
    train: Labeled | None = None,
    test: Labeled | None = None,
    *,
    encoder: str | None = None,
    label: str | None = None,
    target: str | None = None,
    probe: str = "knn",
    layers: bool = False,
    baseline: bool = True,
    seed: int = 0,
    seeds: int = 3,
    shots: int | str | None = None,
    groups: str | None = None,
    data: Data | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    max_bad: float | None = None,
    batch_size: int = 256,
    workers: int = 0,
    cache: bool | str | Path | None = None,
    save: str | Path | None = None,
    trust: bool = False,
    **options: Any,
) -> Table:
    """Learn from labeled rows on top of a pretrained encoder, and score rows that were not seen.

    The probes `retrieval`, `zero_shot`, `localization` and `offset` learn nothing: they compare pairs of rows, rows and
    the names of classes, places of a picture and its sound, or moments of a clip, by what a task trained.

    Hyper-parameters are chosen on a fifth of the training rows, anew for every encoder and depth, with the first seed;
    then the probe learns from all training rows. Test rows are looked at once, at the end. The network stays as it was.

    The table of a run is written into it (probes.json, and the report where there is one).

    Where `finetune`, `segmentation` or `detection` was killed, the same call goes on from its last checkpoint and ends
    in the same bits; trainings that ended are not made again. Checkpoints are in the run's directory, or next to
    `save`, until the table is there. On several processes (torchrun) each learns from its part of every batch, and one
    of them writes.

    Args:
        model: a run, its directory, its name on the Hub, an encoder, or a task.
        train: a source as in a recipe (`toy`, folder, parquet file, Hub name ...), a `recipe.Data`, a
            `datasets.Dataset`, or batches with the encoder's key and that of the label; what the run was trained on
            where left out. Batches that are no list are kept in memory.
        test: likewise; of a source that has a test split, that. Where left out, the `test` split of the training
            source, or else its `validation` split; where it has neither, a fifth of the training rows, and for
            `retrieval` and `zero_shot` all of them.
        encoder: name of the encoder that is probed; the first one of the run or task where left out.
        label: column of the labels; where left out `mask` of segmentation, `boxes` of detection, and `label` of others.
            Rows without one are left out: null, NaN, and -1 where the data set names its classes, or in batches.
        target: what the labels are, as `mmssl list` names it: `classes` (names or whole numbers), `labels` (lists of
            these), `values` (real numbers, or lists of them), `masks` (class numbers of pixels), `boxes`, `events`,
            `tags` (a class a word); by the column's cells where left out.
        probe: `knn`, `ridge`, `logistic`, `svm`, `mlp`, `attentive`, `finetune`, `segmentation`, `detection`, `frames`,
            `tagging`, `separation`, `retrieval`, `zero_shot`, `localization` or `offset`; `mmssl list` says what they
            are.
        layers: probe every depth as well.
        baseline: score the same network, random-initialized, as well.
        seed: the first of `seeds` consecutive seeds.
        seeds: random-initialized encoders; also draws of `shots`, and trainings of `finetune`, of heads and
            of detectors.
        shots: learn from only so many rows a class or label, of values, masks and boxes from so many in all; or from
            a share of the labeled training rows, `1%`, of each class its own and at least one. No others are read.
        groups: column (of batches: key) of what a split made here must not divide, such as drawings of one thing; for
            `retrieval`, of rows whose two sides all belong together (without it those of one row, and equal items).
        data: how to decode and name columns, its source is not read; as the run does where left out.
        columns: batch key -> column, as in a recipe.
        limit: rows of `train` and of `test`, each.
        max_bad: share of rows that may be undecodable, and are left out; as in `data` or the run where left out.
        batch_size: rows that go through the encoder at a time.
        workers: processes that decode.
        cache: folder in which features are kept, so that another probe of the same rows encodes nothing. Where left
            out, `features` in the run's directory, and none for an encoder or task; False keeps nothing. Features of a
            stream are never kept.
        save: folder, absent or empty, for the network that `finetune`, `segmentation` or `detection` trained with the
            first seed, with which `mmssl.predict` answers for other rows.
        trust: import the objective or encoder of your own that a run's directory names.
        **options: the probe's hyper-parameters.

    Raises:
        RecipeError: for an unknown probe, target, encoder or option, or a request that makes no sense to the probe.
        DataError: for a source, column or label that is not there or does not fit.
        RunError: for a run that cannot be read, or where features are not finite.
    """
    if not isinstance(probe, str):
        raise RecipeError(f"probe = {probe!r} should be a name, and its options arguments: probe='knn', k=[5]")
    if "LOCAL_RANK" in os.environ:
        start_processes()  # before the device is asked for
    asked = make_probe(probe, options)
    trained: list[Trained] = []
    if save is not None:
        if not isinstance(asked, ResumableLearner):
            raise RecipeError(f"save keeps what finetune, segmentation and detection trained, and not {probe}")
        if data is None and are_batches(train):
            raise RecipeError(UNDECODED)
        check_room(save)
    if isinstance(model, str | Path):
        model = load(model, trust=trust)
        if torch.accelerator.is_available():
            model.objective.to(torch.accelerator.current_accelerator())
    run = model if isinstance(model, Run) and _may_write(model.directory) else None
    if cache is None or cache is True:
        folder = run.directory / FEATURES if run else None
    else:
        folder = Path(cache) if cache else None

    def keep(answers: Answers) -> None:
        made = asked.trained if isinstance(asked, ResumableLearner) else None
        if made and answers.encoder == PRETRAINED and not trained:
            trained.append(made)

    request = Request(
        train=train,
        test=test,
        label=asked.column if label is None else label,
        target=target,
        layers=layers,
        baseline=baseline,
        seeds=tuple(range(seed, seed + seeds)),
        shots=shots,
        groups=groups,
        data=data,
        columns=columns,
        limit=limit,
        max_bad=max_bad,
        batch_size=batch_size,
        workers=workers,
        cache=FeatureCache(folder),
        listen=None if save is None else keep,
    )
    place = run.directory / UNFINISHED if run else _next_to(save)
    kept_in = Path() if place is None else place.parent
    resumes = isinstance(asked, ResumableLearner) and place is not None
    again = "goes on from the last checkpoint" if resumes else "begins anew"
    if isinstance(asked, ResumableLearner) and place is not None:
        asked.unfinished = Unfinished(place)
    with repeated(), ending_together(), _alone(save), writing(kept_in, "save elsewhere"):
        try:
            table = asked.score(Model.of(model, encoder), request)
        except Interrupted as stopped:
            raise Interrupted(f"stopped; the same call, made again, {again}") from stopped
        if isinstance(model, Run) and table.test in {where(data) for data in model.recipe.sources().values()}:
            seen = "the run was trained on these rows, so that they say nothing of new ones; give test rows (--test)"
            table = replace(table, warnings=(*table.warnings, seen))
        if process_share()[0] == 0:
            if run:
                run.add_probe(table.to_json())
                if (run.directory / "report.html").exists():
                    write_report(run)
            if save is not None:
                save_classifier(save, trained[0], table, data)
            if isinstance(asked, ResumableLearner) and asked.unfinished is not None:
                asked.unfinished.clear()
    wait_for_everyone()
    return table


@contextmanager
def _alone(save: str | Path | None) -> Iterator[None]:
    """The lock of the folder that is to be written, for another call would see at its end that it is there."""
    place = _next_to(save)
    if place is None or process_share()[0] > 0:
        yield
        return
    try:
        with locked(place, instead="save elsewhere"):
            yield
    finally:
        with suppress(OSError):  # trainings that the same call goes on with
            place.rmdir()


def _next_to(save: str | Path | None) -> Path | None:
    return None if save is None else Path(save).with_name(f".{Path(save).name}.{UNFINISHED}")


def _may_write(directory: Path) -> bool:
    """Not into the Hub's cache, where files are those of the repository."""
    return os.access(directory, os.W_OK) and not directory.resolve().is_relative_to(Path(HF_HUB_CACHE).resolve())
