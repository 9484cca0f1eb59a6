"""Which layer of an encoder learns, and how fast."""

from __future__ import annotations

from torch import nn

from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError


def depths(encoder: Encoder) -> tuple[list[tuple[nn.Parameter, int]], int]:
    """Parameters with the number of their block, 1 to n, and n.

    Depth is the order in which blocks appear: a block is named by a parameter's name up to its first number, as
    in `blocks.3` or `layer2.0`. What lies between blocks belongs to the one before; what comes before all of them, and
    every embedding, has the number 0; what follows the last, n + 1.
    """
    embeddings = {p for m in encoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    blocks: dict[str, int] = {}
    found: list[tuple[nn.Parameter, float]] = []
    for name, parameter in encoder.named_parameters():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            found.append((parameter, blocks.setdefault(".".join(parts[: number + 1]), len(blocks) + 1)))
        else:
            found.append((parameter, 0 if parameter in embeddings else len(blocks) + 0.5))
    last = len(blocks)
    return [(parameter, last + 1 if depth > last else int(depth)) for parameter, depth in found], last


def scale_by_depth(encoder: Encoder, decay: float) -> None:
    """Set `lr_scale` of every parameter to decay^(n + 1 - i), i the number of its block of n (MAE's rule)."""
    numbered, last = depths(encoder)
    for parameter, i in numbered:
        parameter.lr_scale = decay ** (last + 1 - i)  # type: ignore[attr-defined]


def freeze_blocks(encoder: Encoder, blocks: int) -> None:
    """Let the embeddings and the first blocks learn nothing.

    Raises:
        RecipeError: where there are fewer.
    """
    numbered, last = depths(encoder)
    if blocks > last:
        raise RecipeError(f"freeze = {blocks}: {encoder.spec['model']} has {last} blocks")
    for parameter, i in numbered:
        if i <= blocks:
            parameter.requires_grad_(False)


def rest(module: nn.Module) -> None:
    """Put into evaluation mode what has parameters and learns none of them, so that no running statistics change."""
    for part in module.modules():
        own = list(part.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            part.eval()
