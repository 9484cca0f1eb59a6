"""Strings of the user's as Markdown that they cannot close: code spans, fences, cells, plain text."""

from __future__ import annotations

import re
from typing import Any


def one_line(text: Any) -> str:
    """Without line breaks and other control characters, which could close YAML or Markdown blocks."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def code(text: Any) -> str:
    """A Markdown code span that its content cannot close."""
    inner = one_line(text)
    ticks = "`" * (_longest_run(inner) + 1)
    pad = " " if inner.startswith("`") or inner.endswith("`") else ""
    return f"{ticks}{pad}{inner}{pad}{ticks}"


def fence(text: str, language: str) -> str:
    """A Markdown code block that its content cannot close."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def cell(text: Any) -> str:
    """A code span that does not end the cell of a table either."""
    return code(text).replace("|", "\\|")


def markdown(text: Any) -> str:
    """One line of plain text, in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", one_line(text))


def number(value: float | None) -> str:
    """Four significant digits; an em dash where there is none."""
    return "—" if value is None else f"{value:.4g}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
