"""Features of every row of a source in one file, beside its columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.adaptation.cache import digest_of
from mmssl.adaptation.features import POOLED, extract
from mmssl.adaptation.request import Model
from mmssl.adaptation.rows import Labeled
from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError, nearest
from mmssl.hub.load import load
from mmssl.objectives.base import Objective
from mmssl.parts import EveryRow, check_target
from mmssl.run_directory import Run

FEATURES = "features"


def embed(
    model: Run | str | Path | Encoder | Objective,
    data: Labeled,
    to: str | Path,
    *,
    encoder: str | None = None,
    layer: str | None = None,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    force: bool = False,
    trust: bool = False,
) -> Path:
    """Write the features of all rows of a source, with their numbers and columns.

    The file has a row a row that can be decoded: `id`, its number in the source; the source's columns but raw media, of
    which the path stays where there is one, with classes by name; `features`, float32 (D,). A column of the source that
    is called like one of these two gets a `_` after its name.

    A call that was killed goes on where it was, when it is made again.

    Args:
        model: a run, its directory, its name on the Hub, an encoder, or a task.
        data: as for `mmssl.adapt`, but no batches.
        to: `*.parquet`, or `*.npz` (an array a column, texts and lists as strings, lists in JSON).
        encoder: whose features; the first one of the run or task where left out.
        layer: depth whose mean over places is written in place of the pooled features; see `Encoder.layers`.
        split: of a source that is named.
        limit: only so many rows, spread over the split; of a stream the first ones.
        columns: batch key -> column, as in a recipe.
        batch_size: rows that go through the encoder at a time.
        workers: processes that decode.
        force: write over a file that is there.
        trust: import the objective or encoder of your own that a run's directory names.

    Returns:
        The file.

    Raises:
        RecipeError: for a name or kind of file that does not exist.
        DataError: for rows that are not there, or of which none can be decoded.
        RunError: where the file is there, or cannot be written, or features are not finite.
    """
    target = check_target(to, (".parquet", ".npz"), FEATURES, force)
    if isinstance(model, str | Path):
        model = load(model, trust=trust)
        if torch.accelerator.is_available():
            model.objective.to(torch.accelerator.current_accelerator())
    asked = Model.of(model, encoder)
    network, modality = asked.encoder, asked.encoder.modality
    if modality == "fusion":
        raise RecipeError(f"'{asked.name}' is a fusion, which reads no data of its own; name another encoder")
    rows = EveryRow(
        data,
        asked.reads([modality], workers),
        asked.run.decoding(modality) if asked.run else network.reading(),
        columns=columns,
        split=split,
        limit=limit,
        batch_size=batch_size,
        what="embed",
    )

    def pooled(batch: Batch) -> Tensor:
        (features,), _ = extract([network], [batch], layers=layer is not None)
        depth = POOLED if layer is None else layer
        if depth not in features:
            raise RecipeError(f"the encoder has no layer '{layer}'{nearest(depth, features)}")
        return features[depth]

    rows.write(target, pooled, _column, {"encoder": digest_of(network), "layer": layer})
    return target


def _column(vectors: Tensor) -> dict[str, Any]:
    import pyarrow

    flat = pyarrow.array(vectors.reshape(-1).numpy())
    return {FEATURES: pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
