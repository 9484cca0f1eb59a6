"""What a batch is: a dictionary of tensors whose first dimension is the row.

| key | dtype | shape | meaning |
|---|---|---|---|
| `image` | uint8 | (B, 3, H, W) | RGB, fixed decode size, not normalized |
| `image_aspect` | float32 | (B,) | width over height of the picture that was squeezed to `image`; only where so |
| `text`, `text_mask` | int64, bool | (B, L) | token ids; True where valid |
| `text_word`, `text_sentence` | int64 | (B, L) | number of the word or sentence, -1 outside text; where asked for |
| `audio`, `audio_mask` | float32, bool | (B, S) | mono in [-1, 1] at the recipe's sample rate; mask only where ragged |
| `video` | uint8 | (B, T, 3, H, W) | RGB at the recipe's frame rate |
| `label` | int64 | (B,) or (B, C) | probes only; an objective that reads it is a bug |
| `id` | int64 | (B,) | row number in the source |

Where `data.windows` is more than 1, probes see so many windows of a row in the second dimension of `audio`,
`audio_mask` and `video`. Objectives see one, without that dimension.

Audio and video of one clip share one clock: sample `s` and frame `t` happen at `s / rate` and `t / fps` seconds after
the same instant. Where several sources are mixed, keys carry the name of the source: `pairs/image`.

The same rule holds for what an objective makes of a batch (`inputs`, `outputs`): rows first, so that any of it can be
cut into micro-batches; a 0-dim tensor is a property of the whole batch.

Shape letters used throughout: B rows, V views of a row, N tokens, D width, T frames, S samples, L text length,
C channels or classes, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

Batch = dict[str, Tensor]

DIMENSIONS = {"image": 4, "text": 2, "audio": 2, "video": 5}
MODALITIES = ("image", "text", "audio", "video")
TEXT_PARTS = ("text_word", "text_sentence")


def count_rows(batch: Mapping[str, Tensor]) -> int:
    """Number of rows that every tensor of `batch` has; raises ValueError where they differ or none has any."""
    sizes = {key: value.shape[0] for key, value in batch.items() if value.ndim}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"a batch needs one number of rows in every tensor, found {sizes}")
    return next(iter(sizes.values()))


def windows_of(key: str, value: Tensor) -> int | None:
    """How many windows of each row a modality's tensor holds in its second dimension; None where that is not there."""
    return value.shape[1] if value.ndim > DIMENSIONS.get(key, value.ndim) else None


def middle_window(batch: Mapping[str, Tensor]) -> Batch:
    """Of rows of several windows the one in the middle, of other rows all."""
    counts = [windows for key, value in batch.items() if (windows := windows_of(key, value))]
    if not counts:
        return dict(batch)
    return {key: value[:, counts[0] // 2] if value.ndim > 1 else value for key, value in batch.items()}


def to_device(batch: Mapping[str, Tensor], device: torch.device | str) -> Batch:
    """Move every tensor; from pinned memory to a CUDA device while it still computes the step before."""
    device = torch.device(device)
    if device.type != "cuda":
        return {key: value.to(device) for key, value in batch.items()}
    copying, computing = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    computing.wait_stream(copying)
    for value in moved.values():
        value.record_stream(computing)  # else its memory might be given away while it is read there
    return moved


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream in which batches come to a device."""
    return torch.cuda.Stream(device)


def split_rows(batch: Mapping[str, Tensor], parts: int) -> list[Batch]:
    """Cut a batch into `parts` micro-batches of equal size, in order; 0-dim tensors go to each of them.

    Entries that are one tensor are one tensor in each part, too.
    """
    if parts == 1:
        return [dict(batch)]
    rows = count_rows(batch)
    if rows % parts:
        raise ValueError(f"{rows} rows cannot be cut into {parts} equal micro-batches")
    cut = {id(value): value.split(rows // parts) if value.ndim else (value,) * parts for value in batch.values()}
    return [{key: cut[id(value)][i] for key, value in batch.items()} for i in range(parts)]


def valid_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Bool (B, L), False for padding: the batch's `text_mask`; True throughout where it has none."""
    return batch["text_mask"] if "text_mask" in batch else torch.ones_like(batch["text"], dtype=torch.bool)


def prefixed(prefix: str, batch: Mapping[str, Tensor]) -> Batch:
    """Every entry `key` as `prefix/key`."""
    return {f"{prefix}/{key}": value for key, value in batch.items()}


def sub_batch(batch: Mapping[str, Tensor], prefix: str) -> Batch:
    """The entries named `prefix/key`, as `key`."""
    start = len(prefix) + 1
    return {key[start:]: value for key, value in batch.items() if key.startswith(f"{prefix}/")}
