"""Texts packed into full rows: documents end to end, an end token after each, no padding.

Attention is not cut where one document ends and the next begins, as in GPT-2 and RoBERTa's FULL-SENTENCES (Radford et
al. 2019; Liu et al. 2019, section 4.2). Documents are in the order of the source; rows are permuted as any others.
What is left at the end of the source, or of each reader's part of a stream, is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from mmssl.data.base import MapSource, Row
from mmssl.data.sources import TableSource
from mmssl.errors import RecipeError

TEXTS = 256
NOTE = "documents are packed end to end, and attention is not cut between them"


class WholeTexts(Protocol):
    """What packing needs of a `mmssl.media.text.Tokenizer`."""

    start_id: int | None
    end_id: int | None

    def whole(self, texts: Sequence[str], parts: Sequence[str]) -> list[dict[str, list[int]]]:
        """Texts -> ids of each without special tokens as `text`, and the number of the word of each token."""


class Packing(NamedTuple):
    """How texts become rows.

    Attributes:
        column: of the texts; empty ones are passed over.
        tokenizer: makes the ids.
        length: number of ids of a row. The first is the start token where the tokenizer has one of its own.
        parts: `text_word` or nothing.
    """

    column: str
    tokenizer: WholeTexts
    length: int
    parts: tuple[str, ...]

    def check(self) -> None:
        """Raise RecipeError for a tokenizer without an end token, or parts that do not survive packing."""
        if self.tokenizer.end_id is None:
            raise RecipeError("text.pack puts an end token after each document, and this tokenizer has none")
        if set(self.parts) - {"text_word"}:
            raise RecipeError(
                "text.pack joins documents; a task that compares sentences reads them one by one: pack: false"
            )


class Place(NamedTuple):
    """Where a packed row begins: the number of its first document, and how many of that one's tokens are before it."""

    document: int
    token: int


def pack(source: MapSource, packing: Packing) -> MapSource:
    """Rows of `length` ids out of the texts of a table, which are tokenized once and kept in the cache of `datasets`.

    Returns:
        A source with the one column, whose cells are `{"text": ids, part: numbers}`.
    """
    import datasets

    lists = datasets.Sequence(datasets.Value("int32"))
    features = datasets.Features({packing.column: dict.fromkeys(("text", *packing.parts), lists)})
    table = datasets.Dataset.from_generator(
        _rows_of_table, features=features, gen_kwargs={"source": source, "packing": packing}
    )
    packed = TableSource(table, source.name)
    packed.notes = (*source.notes, NOTE)
    return packed


def _rows_of_table(source: MapSource, packing: Packing) -> Iterator[Row]:
    return (row for _, row in packed_rows(source.values(packing.column), packing, Place(0, 0)))


def packed_rows(texts: Iterable[Any], packing: Packing, at: Place) -> Iterator[tuple[Place, Row]]:
    """Rows out of texts, and where each begins.

    Args:
        texts: of document `at.document` and those after it; what is no text, or blank, is a document without tokens.
        packing: how.
        at: where the first row begins.
    """
    column, tokenizer, length, parts = packing
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    front = [] if tokenizer.start_id in (None, tokenizer.end_id) else [tokenizer.start_id]
    room = length - len(front)
    waiting: dict[str, list[int]] = {key: [] for key in ("text", *parts)}
    begins: deque[tuple[int, Place]] = deque()  # of each document that waits: where in `waiting`
    words, skip = 0, at.token
    numbered = ((n, text) for n, text in enumerate(texts, at.document) if isinstance(text, str) and text.strip())
    while some := list(islice(numbered, TEXTS)):
        for (number, _), document in zip(some, tokenizer.whole([text for _, text in some], parts), strict=True):
            begins.append((len(waiting["text"]), Place(number, skip)))
            waiting["text"] += (document["text"] + end)[skip:]
            for part in parts:
                waiting[part] += ([n + words for n in document[part]] + [-1] * len(end))[skip:]
                words += max(document[part], default=-1) + 1
            skip = 0
        first = 0
        while len(waiting["text"]) - first >= room:
            while len(begins) > 1 and begins[1][0] <= first:
                begins.popleft()
            cell = {"text": front + waiting["text"][first : first + room]}
            for part in parts:
                cell[part] = [-1] * len(front) + _dense(waiting[part][first : first + room])
            since, place = begins[0]
            yield Place(place.document, place.token + first - since), {column: cell}
            first += room
        waiting = {key: values[first:] for key, values in waiting.items()}
        begins = deque((since - first, place) for since, place in begins)


def _dense(numbers: list[int]) -> list[int]:
    """Ascending numbers counted from 0, those below 0 as they are."""
    first = next((number for number in numbers if number >= 0), 0)
    return [number - first if number >= 0 else number for number in numbers]
