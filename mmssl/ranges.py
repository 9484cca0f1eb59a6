"""Ranges of hyper-parameters: annotations in a constructor that `check_keywords` holds a recipe's numbers to."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

Share = Annotated[float, Ge(0), Le(1)]
"""From 0 to 1."""
Ratio = Annotated[float, Gt(0), Lt(1)]
"""Between 0 and 1."""
BelowOne = Annotated[float, Ge(0), Lt(1)]
"""From 0 to below 1."""
Weight = Annotated[float, Ge(0)]
"""0 or more."""
Positive = Annotated[int, Ge(1)]
"""1 or more."""
Count = Annotated[int, Ge(0)]
"""0 or more."""
