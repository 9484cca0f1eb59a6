"""How far vectors are from a standard normal distribution, told from their shadows on random lines.

SIGReg (Balestriero & LeCun 2025, arXiv 2511.08544, section 4): vectors are N(0, I) if and only if their projection on
every line is N(0, 1), which a test of one dimension tells, that of Epps & Pulley 1983.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.ops.draws import mix_seed
from mmssl.ops.gather import gather, process_share

KNOTS = 17
REACH = 3.0


def draw_directions(width: int, number: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """Unit vectors as columns, (width, number), uniform on the sphere; those of a step are the same on every process.

    Args:
        width: of the vectors that are projected.
        number: of directions.
        step: which set of them.
        device: where they are drawn; CPU and CUDA generators differ.
    """
    generator = torch.Generator(device).manual_seed(mix_seed("directions", step))
    found = torch.randn(width, number, generator=generator, device=device)
    return found / found.norm(dim=0)


def epps_pulley(x: Tensor) -> Tensor:
    """N times the squared distance of the empirical characteristic function from that of N(0, 1).

    Integrated over frequencies from -3 to 3 with the weight exp(-t^2 / 2), by the trapezoidal rule with 17 points on
    the half line, as in the published code; the paper's listing has 17 points from -5 to 5.

    Args:
        x: (B, ...), the rows of this process; N are those of all.

    Returns:
        (...), of the global batch and with its gradient; the same on every process.
    """
    frequencies, weights = _knots(x)
    angles = x[..., None] * frequencies
    # Means of this process, then of all: every process has as many rows.
    means = torch.stack([angles.cos().mean(0), angles.sin().mean(0)])
    real, imaginary = gather(means[None], exact=True).mean(0)
    distance = (real - (-frequencies.square() / 2).exp()).square() + imaginary.square()
    return len(x) * process_share()[1] * (distance @ weights)


def normal_level(like: Tensor) -> Tensor:
    """What `epps_pulley` is on average of rows that are N(0, 1), whatever their number, 0-dim: 1.05."""
    frequencies, weights = _knots(like)
    return (1 - (-frequencies.square()).exp()) @ weights


def collapsed_level(rows: int) -> float:
    """What `epps_pulley` is of so many rows that are all 0: 0.402 times their number."""
    frequencies, weights = _knots(torch.zeros((), dtype=torch.float64))
    return rows * float((1 - (-frequencies.square() / 2).exp()).square() @ weights)


def _knots(like: Tensor) -> tuple[Tensor, Tensor]:
    """Frequencies t from 0 to 3, and what each counts in an integral over both signs, exp(-t^2 / 2) included."""
    frequencies = torch.linspace(0, REACH, KNOTS, dtype=like.dtype, device=like.device)
    step = REACH / (KNOTS - 1)
    ends = torch.ones_like(frequencies)
    ends[:: KNOTS - 1].fill_(0.5)
    return frequencies, 2 * step * ends * (-frequencies.square() / 2).exp()
