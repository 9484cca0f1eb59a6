"""Where in a long text to begin, so that all of it is read over the epochs and not its beginning alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from mmssl.media.text import CHARACTERS_PER_TOKEN
from mmssl.media.units import SENTENCE_END
from mmssl.media.vocabulary import clean

Start = Literal["first", "random", "sentence"]
Starts = Callable[[str], Sequence[int]]

# The first character after white space; Chinese and Japanese characters, which are written without any.
WORD = re.compile(r"(?<!\S)\S|[\u3040-\u30ff\u3400-\u9fff]")


def passage(text: str, token_starts: Starts, length: int, start: Start, window: float) -> str:
    """The text from a random place on: `length` ids of it are read, and the rest is cut by the tokenizer.

    A text that fits is read from its beginning. In a longer one the place is uniform over the characters up to the last
    one from which a whole row is left, and then moved on to where a word begins, or a sentence, so that the end of the
    text is among what is read.

    Args:
        text: any string.
        token_starts: text -> the character at which each of its tokens begins.
        length: number of ids of a row, start and end token included.
        start: `first` for the beginning of the text, `random` for any word's, `sentence` for any sentence's, or any
            word's where no sentence ends.
        window: random number in [0, 1).
    """
    if start == "first":
        return text
    text = clean(text)
    last = _last_start(text, token_starts, length)
    if last == 0:
        return text
    place = int(window * (last + 1))
    if place == 0:
        return text
    begins = [match.end() for match in SENTENCE_END.finditer(text)]
    if start == "random" or not begins:
        begin = WORD.search(text, place)
        return text[begin.start() if begin else place :]
    after = next((begin for begin in begins if begin >= place and text[begin:].strip()), None)
    if after is None:
        after = next((begin for begin in reversed(begins) if text[begin:].strip()), 0)
    return text[after:].lstrip()


def _last_start(text: str, token_starts: Starts, length: int) -> int:
    """The last character from which a row of ids is left; 0 where the text fits into one."""
    reach = CHARACTERS_PER_TOKEN * length
    tail = text[-reach:]
    begins = token_starts(tail)
    room = length - 2
    if len(begins) <= room:
        return max(0, len(text) - reach)
    return len(text) - len(tail) + begins[len(begins) - room]
