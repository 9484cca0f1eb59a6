"""Answers of a saved classifier for every row of a source in one file, beside its columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.adaptation.cache import digest_of
from mmssl.adaptation.rows import Labeled, Reads
from mmssl.adaptation.targets.base import Target
from mmssl.adaptation.targets.classes import Classes
from mmssl.embedding_files import FORMATS
from mmssl.encoders.text import tokenizers_of
from mmssl.errors import RecipeError, RunError
from mmssl.hub.classifier import Classifier, load_classifier
from mmssl.parts import EveryRow, check_target

ANSWER, PROBABILITY = "answer", "probability"


def predict(
    classifier: Classifier | str | Path,
    data: Labeled,
    to: str | Path,
    *,
    scores: bool = False,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    force: bool = False,
    trust: bool = False,
) -> Path:
    """Write what a classifier says of all rows of a source, with their numbers and columns.

    The file has a row a row that can be decoded: `id`, its number in the source; the source's columns but raw media, of
    which the path stays where there is one; `answer`: the class, the list of labels, the value or the list of them; and
    of a class its `probability`. A column of the source that is called like one of these gets a `_` after its name.

    A call that was killed goes on where it was, when it is made again.

    Args:
        classifier: the folder that `mmssl.adapt(..., probe="finetune", save=folder)` wrote, or what was loaded from it.
        data: as for `mmssl.adapt`, but no batches.
        to: `*.csv`, `*.parquet`, or `*.npz` (see `mmssl.embed`); lists in a csv are JSON.
        scores: write the probability of each class or label too, `probability_NAME`.
        split: of a source that is named.
        limit: only so many rows, spread over the split; of a stream the first ones.
        columns: batch key -> column, as in a recipe.
        batch_size: rows that go through the encoder at a time.
        workers: processes that decode.
        force: write over a file that is there.
        trust: import the encoder of your own that the folder names.

    Returns:
        The file.

    Raises:
        RecipeError: for a kind of file that does not exist, or scores of what has none.
        DataError: for rows that are not there, or too many of which cannot be decoded.
        RunError: for a folder that cannot be read, a file that is there or cannot be written, or answers that are not
            finite.
    """
    target = check_target(to, FORMATS, "answers", force)
    if not isinstance(classifier, Classifier):
        classifier = load_classifier(classifier, trust=trust)
        if torch.accelerator.is_available():
            classifier.objective.to(torch.accelerator.current_accelerator())
    encoder, said = classifier.encoder, classifier.target
    if scores and not said.names:
        raise RecipeError(f"'{classifier.label}' holds {said.name}, which have no probabilities; leave scores out")
    rows = EveryRow(
        data,
        Reads((encoder.modality,), tokenizers_of({"": encoder}), workers),
        classifier.decoding,
        columns=columns,
        split=split,
        limit=limit,
        batch_size=batch_size,
        what="predict",
    )
    plan = {
        "encoder": digest_of(encoder),
        "classifier": digest_of(classifier.objective),
        "target": [said.name, said.arguments],
        "scores": scores,
    }
    rows.write(target, lambda batch: _finite(classifier.answer(batch)), lambda a: _columns(said, a, scores), plan)
    return target


def _finite(answers: Tensor) -> Tensor:
    if not answers.isfinite().all():
        raise RunError("answers are not finite: the classifier's training diverged")
    return answers


def _columns(target: Target, answers: Tensor, scores: bool) -> dict[str, Any]:
    """The cells after those of the source."""
    found: dict[str, Any] = {ANSWER: target.decode(answers)}
    if isinstance(target, Classes):
        found[PROBABILITY] = answers.amax(1).numpy()
    if scores:
        each = answers.T.contiguous().numpy()
        found |= {f"{PROBABILITY}_{name}": own for name, own in zip(target.names, each, strict=True)}
    return found
