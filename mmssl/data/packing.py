"""Texts packed into full rows: documents end to end, an end token after each, no padding.

Attention is not cut where one document ends and the next begins, as in GPT-2 and RoBERTa's FULL-SENTENCES (Radford et
al. 2019; Liu et al. 2019, section 4.2). Documents are in the order of the source; rows are permuted as any others.
What is left at the end of the source is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from mmssl.data.sources import Source, StreamSource, TableSource
from mmssl.errors import RecipeError

TEXTS = 256


class WholeTexts(Protocol):
    """What packing needs of a `mmssl.media.text.Tokenizer`."""

    start_id: int | None
    end_id: int | None

    def whole(self, texts: Sequence[str], parts: Sequence[str]) -> list[dict[str, list[int]]]:
        """Texts -> ids of each without special tokens as `text`, and the number of the word of each token."""


def pack(source: Source, column: str, tokenizer: WholeTexts, length: int, parts: Sequence[str]) -> Source:
    """Rows of `length` ids out of the texts of a column.

    Args:
        source: a table, whose rows are tokenized once and kept in the cache of `datasets`, or a stream.
        column: of the texts; empty ones are passed over.
        tokenizer: makes the ids.
        length: number of ids of a row. The first is the start token where the tokenizer has one of its own.
        parts: `text_word` or nothing.

    Returns:
        A source with the one column, whose cells are `{"text": ids, part: numbers}`.

    Raises:
        RecipeError: for a tokenizer without an end token, or parts that do not survive packing.
    """
    import datasets

    if tokenizer.end_id is None:
        raise RecipeError("text.pack puts an end token after each document, and this tokenizer has none")
    if set(parts) - {"text_word"}:
        raise RecipeError(
            "text.pack joins documents; a task that compares sentences reads them one by one: pack: false"
        )
    arguments = {
        "source": source,
        "column": column,
        "tokenizer": tokenizer,
        "length": length,
        "parts": list(parts),
    }
    lists = datasets.Sequence(datasets.Value("int32"))
    features = datasets.Features({column: dict.fromkeys(("text", *parts), lists)})
    if isinstance(source, StreamSource):
        stream = datasets.IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)
        packed: Source = StreamSource(stream, source.name)
    else:
        table = datasets.Dataset.from_generator(_rows, features=features, gen_kwargs=arguments)
        packed = TableSource(table, source.name)
    packed.notes = (*source.notes, "documents are packed end to end, and attention is not cut between them")
    return packed


def _rows(
    source: Source, column: str, tokenizer: WholeTexts, length: int, parts: Sequence[str]
) -> Iterator[dict[str, Any]]:
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    front = [] if tokenizer.start_id in (None, tokenizer.end_id) else [tokenizer.start_id]
    room = length - len(front)
    waiting: dict[str, list[int]] = {key: [] for key in ("text", *parts)}
    words = 0
    texts = (text for text in source.values(column) if isinstance(text, str) and text.strip())
    while some := list(islice(texts, TEXTS)):
        for document in tokenizer.whole(some, parts):
            waiting["text"] += document["text"] + end
            for part in parts:
                waiting[part] += [number + words for number in document[part]] + [-1] * len(end)
                words += max(document[part], default=-1) + 1
        first = 0
        while len(waiting["text"]) - first >= room:
            cell = {"text": front + waiting["text"][first : first + room]}
            for part in parts:
                cell[part] = [-1] * len(front) + _dense(waiting[part][first : first + room])
            yield {column: cell}
            first += room
        waiting = {key: values[first:] for key, values in waiting.items()}


def _dense(numbers: list[int]) -> list[int]:
    """Ascending numbers counted from 0, those below 0 as they are."""
    first = next((number for number in numbers if number >= 0), 0)
    return [number - first if number >= 0 else number for number in numbers]
