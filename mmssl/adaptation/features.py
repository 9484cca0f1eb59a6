"""Frozen features: one vector a row, from an encoder that stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmssl.batch import MODALITIES, Batch, to_device, windows_of
from mmssl.encoders.base import Encoder, Features
from mmssl.errors import DataError, RunError
from mmssl.modules.mode import evaluating

POOLED = "pooled"


def features(
    encoder: Encoder, batches: Iterable[Batch], *, layers: bool = False
) -> tuple[Tensor | dict[str, Tensor], Tensor | None, Tensor | None]:
    """Pooled features of every row, in order.

    The encoder runs in evaluation mode without gradient, on its own device, and is left as it was found: parameters,
    running statistics and the training mode of every part.

    Args:
        encoder: reads the batch key of its modality, and the mask of that key where there is one.
        batches: on any device; `label` and `id` are handed through.
        layers: every depth as well, shallow to deep.

    Returns:
        Features float32 (N, D) on the CPU, or with `layers` {"pooled": (N, D), depth: (N, D_depth), ...}; then `label`
        and `id` of the rows, None where the batches have none.

    Raises:
        DataError: where there is no batch, or one without the encoder's key.
        RunError: where features are not finite.
    """
    (found,), others = extract([encoder], batches, layers=layers)
    return found if layers else found[POOLED], others.get("label"), others.get("id")


def extract(
    encoders: Sequence[Encoder], batches: Iterable[Batch], *, layers: bool = False
) -> tuple[list[dict[str, Tensor]], Batch]:
    """`features` of several encoders of one modality in one pass, so that each row is decoded once.

    Only features are kept: batches may be as many as there are.

    Returns:
        {"pooled" or depth: float32 (N, D)} for each encoder, and what the batches hold besides raw media.
    """
    parts: list[dict[str, list[Tensor]]] = [{} for _ in encoders]
    others: list[Batch] = []
    with evaluating(*encoders), torch.no_grad():
        for batch in batches:
            for encoder, lists in zip(encoders, parts, strict=True):
                for depth, features in depths_of(encoder, batch, layers).items():
                    lists.setdefault(depth, []).append(features.pooled.float().cpu())
            others.append({key: value for key, value in batch.items() if key.removesuffix("_mask") not in MODALITIES})
    joined = collect(others)
    found = [{depth: torch.cat(some) for depth, some in lists.items()} for lists in parts]
    for depths in found:
        for depth, vectors in depths.items():
            broken = int((~vectors.isfinite().all(dim=1)).sum())
            if broken:
                raise RunError(
                    f"{broken} of {len(vectors)} {depth} features are not finite: training diverged, or the "
                    "encoder's precision is too low"
                )
    return found, joined


def collect(batches: Iterable[Batch]) -> Batch:
    """All rows as one batch on the CPU; raises DataError where there is none."""
    parts = list(batches)
    if not parts:
        raise DataError("there are no rows that can be decoded")
    return {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}


def inputs_of(encoder: Encoder) -> tuple[str, str]:
    """The batch keys that an encoder reads: its modality's, and that of what is valid in it."""
    return encoder.modality, f"{encoder.modality}_mask"


def depths_of(encoder: Encoder, batch: Batch, layers: bool) -> dict[str, Features]:
    """What an encoder says of a batch, under `pooled`, and with `layers` every depth, shallow to deep.

    Raises:
        DataError: for a batch without the encoder's key.
    """
    key, valid_key = inputs_of(encoder)
    if key not in batch:
        raise DataError(f"the encoder reads '{key}', the batches have: {', '.join(batch) or 'nothing'}")
    inputs = to_device({k: batch[k] for k in (key, valid_key) if k in batch}, next(encoder.parameters()).device)
    x, valid, windows = _one_by_one(encoder, inputs[key], inputs.get(valid_key))
    pooled, deeper = encoder.forward_layers(x, valid) if layers else (encoder(x, valid), {})
    found = {POOLED: pooled, **deeper}
    return {depth: _together(features, windows) for depth, features in found.items()}


def encode(encoder: Encoder, x: Tensor, valid: Tensor | None = None) -> Features:
    """What an encoder says of rows; of several windows a row, the mean of the pooled and all tokens one after another.

    Args:
        encoder: of a modality.
        x: rows of it, or windows in a second dimension; see `mmssl.batch`.
        valid: what is no padding in `x`.
    """
    x, valid, windows = _one_by_one(encoder, x, valid)
    return _together(encoder(x, valid), windows)


def _one_by_one(encoder: Encoder, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None, int | None]:
    windows = windows_of(encoder.modality, x)
    if windows is None:
        return x, valid, None
    return x.flatten(0, 1), None if valid is None else valid.flatten(0, 1), windows


def _together(features: Features, windows: int | None) -> Features:
    """Tokens of several windows are on no grid."""
    if windows is None:
        return features
    tokens, pooled, _, valid = features
    joined = None if valid is None else valid.unflatten(0, (-1, windows)).flatten(1, 2)
    joint = tokens.unflatten(0, (-1, windows)).flatten(1, 2)
    return Features(joint, pooled.unflatten(0, (-1, windows)).mean(1), (), joined)
