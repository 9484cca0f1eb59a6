"""Ranges of hyper-parameters: annotations in a constructor that `check_keywords` holds a recipe's numbers to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from annotated_types import Ge, Gt, Le, Lt

Share = Annotated[float, Ge(0), Le(1)]
"""From 0 to 1."""
Ratio = Annotated[float, Gt(0), Lt(1)]
"""Between 0 and 1."""
Part = Annotated[float, Gt(0), Le(1)]
"""From above 0 to 1."""
BelowOne = Annotated[float, Ge(0), Lt(1)]
"""From 0 to below 1."""
Weight = Annotated[float, Ge(0)]
"""0 or more."""
AboveZero = Annotated[float, Gt(0)]
"""Above 0."""
Temperature = Annotated[float, Ge(1e-3), Le(100)]
"""What logits are divided by: a colder one leaves no digit of a cosine."""
Seconds = Annotated[float, Gt(0), Le(3600)]
"""Up to an hour."""
Decibels = Annotated[float, Ge(-200), Le(200)]
"""Ratio of two powers."""
Positive = Annotated[int, Ge(1), Lt(2**31)]
"""1 or more."""
Count = Annotated[int, Ge(0), Lt(2**31)]
"""0 or more."""
Width = Annotated[int, Ge(1), Le(2**20)]
"""Numbers in a vector, or channels."""
Pixels = Annotated[int, Ge(1), Le(2**13)]
"""Extent of a picture or of a part of one."""
Distance = Annotated[int, Ge(0), Le(2**13)]
"""Between two places in a picture, in pixels."""

WORDS = {Ge: ("from", "ge"), Gt: ("above", "gt"), Le: ("to", "le"), Lt: ("to below", "lt")}


def describe(hint: Any) -> str:
    """The range that an annotation states, as "from 0 to 1"; several are joined with "or", none is empty."""
    return " or ".join(dict.fromkeys(_ranges(hint)))


def takes_truth_for_number(hint: Any, value: Any) -> bool:
    """Whether a value holds `true` or `false` where an annotation means numbers, for which Python would take them."""
    kinds = {*_leaves(hint)}
    return bool(kinds & {int, float}) and bool not in kinds and _holds_truth(value)


def _leaves(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and not get_args(hint):
        yield hint
    for part in get_args(hint):
        yield from _leaves(part)


def _holds_truth(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_truth, value)))


def _ranges(hint: Any) -> Iterator[str]:
    bounds = [bound for bound in getattr(hint, "__metadata__", ()) if type(bound) in WORDS]
    if bounds:
        yield " ".join(f"{word} {getattr(b, name):.10g}" for b in bounds for word, name in [WORDS[type(b)]])
    else:
        for part in get_args(hint):
            yield from _ranges(part)
