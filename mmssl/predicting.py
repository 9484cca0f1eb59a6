"""Answers of a saved network for every row of a source, in one file beside its columns, or as a folder of masks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmssl.adaptation.cache import digest_of
from mmssl.adaptation.placed import frame_of
from mmssl.adaptation.probes.segmentation import Pixels
from mmssl.adaptation.rows import Labeled, Reads
from mmssl.adaptation.targets.base import Target
from mmssl.adaptation.targets.classes import Classes
from mmssl.atomic import write_text
from mmssl.batch import Batch
from mmssl.data.stream import StreamSource
from mmssl.embedding_files import FORMATS
from mmssl.encoders.text import tokenizers_of
from mmssl.errors import DataError, RecipeError, RunError
from mmssl.hub.classifier import Classifier, DenseClassifier, load_saved
from mmssl.media.mask import Frame, palette
from mmssl.parts import ID, EveryRow, check_target

ANSWER, PROBABILITY = "answer", "probability"
MASK, ROWS, NAMES = "mask", "rows.csv", "names.json"


def predict(
    classifier: Classifier | DenseClassifier | str | Path,
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
    """Write what a saved network says of all rows of a source, with their numbers and columns.

    The file has a row a row that can be decoded: `id`, its number in the source; the source's columns but raw media, of
    which the path stays where there is one; `answer`: the class, the list of labels, the value or the list of them; and
    of a class its `probability`. A column of the source that is called like one of these gets a `_` after its name.

    Of a detector it has `boxes`, [left, top, right, bottom] in pixels of the file's picture as it is shown, at most 100
    with the best first, their `classes` and `scores`. What `segmentation` trained writes a folder: a PNG a row, of the
    size of its picture, whose pixels are class numbers with the palette of PASCAL VOC, 255 where `fit: crop` cuts the
    picture off; `rows.csv`, which has the row's columns and the path of its `mask`; and `names.json`.

    A call that was killed goes on where it was, when it is made again.

    Args:
        classifier: the folder that `mmssl.adapt(..., save=folder)` wrote, or what was loaded from it.
        data: as for `mmssl.adapt`, but no batches.
        to: `*.csv`, `*.parquet`, `*.json`, or `*.npz` (see `mmssl.embed`); lists in a csv are JSON. A folder for masks.
        scores: write the probability of each class or label too, `probability_NAME`.
        split: of a source that is named.
        limit: only so many rows, spread over the split; of a stream the first ones.
        columns: batch key -> column, as in a recipe.
        batch_size: rows that go through the encoder at a time.
        workers: processes that decode.
        force: write over a file that is there.
        trust: import the encoder of your own that the folder names.

    Returns:
        The file, or the folder of masks.

    Raises:
        RecipeError: for a kind of file that does not exist, or scores of what has none.
        DataError: for rows that are not there, or of which none can be decoded.
        RunError: for a folder that cannot be read, a file that is there or cannot be written, or answers that are not
            finite.
    """
    if isinstance(classifier, str | Path):
        classifier = load_saved(classifier, trust=trust)
        if torch.accelerator.is_available():
            classifier.objective.to(torch.accelerator.current_accelerator())
    paints = isinstance(classifier, DenseClassifier) and isinstance(classifier.objective.built, Pixels)
    target = _check_folder(to, force) if paints else check_target(to, FORMATS, "answers", force)
    encoder = classifier.encoder
    if scores and (isinstance(classifier, DenseClassifier) or not classifier.target.names):
        kind = classifier.table.target
        raise RecipeError(f"'{classifier.label}' holds {kind}, which have no probabilities; leave scores out")
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
    plan: dict[str, Any] = {"encoder": digest_of(encoder), "classifier": digest_of(classifier.objective)}
    if isinstance(classifier, DenseClassifier):
        if isinstance(rows.rows.source, StreamSource):
            raise DataError(f"{rows.rows.where}: places are read in any order, and a stream has one; download it")
        plan["built"] = classifier.objective.built.model_dump_json()
        if paints:
            _write_masks(classifier, rows, target, plan)
        else:
            names = classifier.objective.built.names
            rows.write(target, _boxes_of(classifier, rows), lambda found: _box_columns(names, found), plan)
        return target
    said = classifier.target
    plan |= {"target": [said.name, said.arguments], "scores": scores}
    rows.write(target, lambda batch: _finite(classifier.answer(batch)), lambda a: _columns(said, a, scores), plan)
    return target


def _check_folder(to: str | Path, force: bool) -> Path:
    """Where masks go, absent, empty, or what a call that was killed left."""
    folder = Path(to)
    if folder.suffix in FORMATS:
        raise RecipeError(f"{folder}: masks are written to a folder; name one")
    begun = folder.is_dir() and not (folder / ROWS).exists() and any(folder.glob(f".{ROWS}.*"))
    if folder.exists() and not begun and (not folder.is_dir() or (any(folder.iterdir()) and not force)):
        raise RunError(f"{folder} is there already; name another folder, or write into it with --force (force=True)")
    return folder


def _frames(rows: EveryRow, batch: Batch) -> list[Frame]:
    """How the pictures of a batch are seen."""
    found = [frame_of(rows.rows, int(row), "image") for row in batch[ID]]
    return [frame for frame in found if frame is not None]  # rows of a source always have one


def _write_masks(classifier: DenseClassifier, rows: EveryRow, folder: Path, plan: Mapping[str, Any]) -> None:
    built, colors = classifier.objective.built, palette()
    assert isinstance(built, Pixels)  # `predict` has looked

    def paint(batch: Batch) -> Tensor:
        for row, frame, square in zip(batch[ID], _frames(rows, batch), classifier.answer(batch), strict=True):
            picture = Image.fromarray(frame.mask_in_picture(square.numpy()))
            picture.putpalette(colors)
            picture.save(_mask_file(folder, int(row)))
        return batch[ID]

    def columns(ids: Tensor) -> dict[str, Any]:
        return {MASK: [str(_mask_file(folder, row)) for row in ids.tolist()]}

    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = dict(zip(map(str, built.classes), built.names, strict=True))
        write_text(folder / NAMES, json.dumps(names, indent=1, ensure_ascii=False))
        rows.write(folder / ROWS, paint, columns, plan)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error}") from error
    finally:
        if [path.name for path in folder.glob("*")] == [NAMES]:  # no row could be read
            shutil.rmtree(folder)


def _mask_file(folder: Path, row: int) -> Path:
    return folder / f"{row:08d}.png"


def _boxes_of(classifier: DenseClassifier, rows: EveryRow) -> Callable[[Batch], Tensor]:
    """Batch -> boxes in pixels of each picture, float32 (B, 100, 6), see `Boxes`."""

    def find(batch: Batch) -> Tensor:
        found = _finite(classifier.answer(batch))
        for frame, boxes in zip(_frames(rows, batch), found, strict=True):
            there = boxes[:, 5] >= 0
            corners = frame.boxes_in_picture(boxes[there, :4].double().numpy())
            boxes[there, :4] = torch.from_numpy(corners).float()
        return found

    return find


def _box_columns(names: tuple[str | int, ...], answers: Tensor) -> dict[str, Any]:
    """Typed, for a part may have no box at all."""
    import pyarrow

    number, text = pyarrow.float32(), pyarrow.string() if isinstance(names[0], str) else pyarrow.int64()
    kept = [row[row[:, 5] >= 0] for row in answers]
    found = {
        "boxes": ([row[:, :4].tolist() for row in kept], pyarrow.list_(pyarrow.list_(number))),
        "classes": ([[names[int(one)] for one in row[:, 5]] for row in kept], pyarrow.list_(text)),
        "scores": ([row[:, 4].tolist() for row in kept], pyarrow.list_(number)),
    }
    return {name: pyarrow.array(cells, type=kind) for name, (cells, kind) in found.items()}


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
