"""Where the words and the sentences of a text end, and which of them a token belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A stop and what closes with it, before white space or the end; a full-width stop, which needs no space; a line break.
# Each is looked for once from where a run of stops or of white space begins, for long ones would take quadratic time.
SENTENCE_END = re.compile(
    r"""(?<![.!?\u2026\u061f\u06d4\u0964])[.!?\u2026\u061f\u06d4\u0964]+["')\]}\u00bb\u2019\u201d]*(?=\s|$)"""
    r"""|[\u3002\uff01\uff1f\uff0e\uff61]+["')\]\u300d\u300f\u2019\u201d\uff09]*"""
    r"""|(?<!\s)\s*[\n\r\u2028\u2029]\s*"""
)


def word_ends(text: str) -> list[int]:
    """The character after each word: runs between white space, every punctuation mark and Chinese character alone."""
    return [end for _, (_, end) in _word_splitter().pre_tokenize_str(text)]


def sentence_ends(text: str) -> list[int]:
    """The character after each sentence."""
    breaks = SENTENCE_END.finditer(text)
    return [b.start() if b[0].isspace() else b.end() for b in breaks] + [len(text)]


def run_ends(text: str) -> list[int]:
    """The character after each run between white space."""
    return [run.end() for run in re.finditer(r"\S+", text)]


@cache
def _word_splitter() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")]
    )


def first_tokens(ends: Sequence[int], starts: np.ndarray, content: np.ndarray) -> np.ndarray:
    """The place of the first token that begins in or before each of the units that end at `ends`, int64 (units,).

    It is -1 for a unit in which no token begins. Arguments are those of `unit_numbers`.
    """
    unit = np.searchsorted(np.array(ends, dtype=np.int64), starts[content], side="right")
    known, first = np.unique(unit, return_index=True)
    places = np.full(len(ends), -1)
    inside = known < len(ends)  # white space after the last one may have a token of its own
    places[known[inside]] = np.flatnonzero(content)[first[inside]]
    return places


def unit_numbers(ends: Sequence[int], starts: np.ndarray, content: np.ndarray) -> Tensor:
    """Which of the units that end at `ends` each token begins in or before.

    Args:
        ends: characters, ascending.
        starts: first character of each token, (L,).
        content: which tokens are text, bool (L,).

    Returns:
        int64 (L,), without gaps; -1 for what is no text.
    """
    unit = np.searchsorted(np.array(ends, dtype=np.int64), starts[content], side="right")
    unit = unit.clip(max=max(len(ends) - 1, 0))  # white space after the last word belongs to it
    numbers = np.full(len(starts), -1)
    numbers[content] = np.cumsum(np.diff(unit, prepend=unit[:1]) != 0)
    return torch.from_numpy(numbers)
