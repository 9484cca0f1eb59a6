"""What a step asks of the device, or tells it: on a GPU each careless copy waits until all work so far is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Tensor | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers known to Python as a tensor on `device`, without waiting for it.

    `torch.tensor(values, device=device)` copies from memory that may be paged out, which waits for a GPU.

    Args:
        values: numbers, nested as they shall be, or a tensor on the CPU.
        device: of the result.
        dtype: of the result; what torch makes of the values where left out.
    """
    here = torch.as_tensor(values, dtype=dtype)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)


def chosen_rows(flags: Tensor) -> list[Tensor]:
    """Where each line of `flags` is True, for a GPU with one wait for all lines.

    Args:
        flags: bool (K, N).

    Returns:
        K int64 tensors of up to N numbers, on the device of `flags`.
    """
    return [upload(line.nonzero()[:, 0], flags.device) for line in flags.cpu()]
