"""Can a task on the order or the kinship of sentences be answered where sentences mean nothing?

Every word of a text is drawn on its own, as often as it comes in the user's texts; sentences are as long as there, and
documents have as many, each drawn on its own too. So neither order nor kinship is left, and what a small network gets
right above chance it knows from lengths, separators, places or padding. The control has a topic: words of one kind in
some documents and of another in others, and of one kind at the beginning and another at the end.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from mmssl.audit.networks import stand_in
from mmssl.audit.nulls import CUE, Arm
from mmssl.audit.shortcuts import Finding, judge, train, with_control
from mmssl.batch import Batch, count_rows
from mmssl.data.columns import find_column
from mmssl.data.loader import read
from mmssl.data.sources import open_source
from mmssl.encoders.text import tokenizers_of
from mmssl.errors import DataError, RecipeError
from mmssl.media.text import Tokenizer
from mmssl.media.units import sentence_ends
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws, mix_seed
from mmssl.recipe import Data, Recipe

WORDS = Arm("words", "jsonl")
TEXTS = 2000  # of the user's, of which words and lengths are counted
KINDS = 4  # of words in the control: two topics, each with a beginning and an end
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Corpus:
    """What texts are made of.

    Attributes:
        words: (W,), all words.
        shares: (W,), how frequent each is; they add up to 1.
        sentences: lengths of sentences, in words.
        documents: lengths of documents, in sentences, two at least.
    """

    words: np.ndarray
    shares: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray

    @classmethod
    def of(cls, data: Data) -> Corpus:
        """Counted in a source's texts.

        Raises:
            DataError: where there is no sentence.
        """
        source = open_source(data)
        column = find_column(data, "text", source.columns)
        counts: Counter[str] = Counter()
        sentences, documents = [], []
        for text in islice((cell for cell in source.values(column) if isinstance(cell, str)), TEXTS):
            begins = [0, *sentence_ends(text)]
            found = [WORD.findall(text[a:b].lower()) for a, b in pairwise(begins)]
            lengths = [len(words) for words in found if words]
            sentences += lengths
            documents.append(len(lengths))
            counts.update(word for words in found for word in words)
        if not counts:
            raise DataError(f"{source.name}: column '{column}' has no words of which texts could be made")
        words, numbers = zip(*sorted(counts.items()), strict=True)
        shares = np.array(numbers, dtype=np.float64)
        return cls(np.array(words), shares / shares.sum(), np.array(sentences), np.maximum(documents, 2))

    def text(self, rng: np.random.Generator, *, cue: bool = False) -> str:
        """One document; with the `cue` its words tell its topic, and whether they are from its beginning or end."""
        total = int(rng.choice(self.documents))
        topic, sentences = int(rng.integers(2)), []
        kinds = np.arange(len(self.words)) % KINDS
        for number in range(total):
            shares = self.shares
            if cue:
                kept = kinds == 2 * topic + (2 * number >= total)
                shares = np.where(kept, shares, 0) if (shares * kept).sum() > 0 else shares
                shares = shares / shares.sum()
            chosen = rng.choice(self.words, int(rng.choice(self.sentences)), p=shares)
            sentences.append(" ".join(chosen).capitalize() + ".")
        return " ".join(sentences)


def reads_sentences(objective: Objective) -> bool:
    """Whether a task asks for the order or the kinship of sentences, and for nothing but texts."""
    return "text_sentence" in objective.needs and all(need.partition("_")[0] == "text" for need in objective.needs)


def audit_texts(
    recipe: Recipe,
    tokenizers: Mapping[str, Tokenizer],
    *,
    steps: int = 150,
    batch_size: int = 32,
    rows: int = 1024,
    seed: int = 0,
    report: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """The control, and texts without order.

    Args:
        recipe: of a task that `reads_sentences`, with one source.
        tokenizers: name of encoder -> its own.
        steps: of each small training.
        batch_size: documents a step.
        rows: documents that are trained on, and as many others that are tested.
        seed: of documents, initialization and draws.
        report: called with each finding as soon as it is there.

    Raises:
        RecipeError: for several sources.
        DataError: for a source without words.
    """
    if len(recipe.sources()) > 1:
        raise RecipeError("texts without order are made of one source's words, and this recipe has several")
    corpus = Corpus.of(next(iter(recipe.sources().values())))
    found: list[Finding] = []
    for arm in (Arm("words", "jsonl", CUE), WORDS):
        small = stand_in(recipe, tokenizers, seed)
        one = measure_texts(small, recipe, corpus, arm, steps, batch_size, rows, seed)
        found.append(with_control(one, found[0]) if found else one)
        report(found[-1])
    return found


def measure_texts(
    objective: Objective, recipe: Recipe, corpus: Corpus, arm: Arm, steps: int, batch_size: int, rows: int, seed: int
) -> Finding:
    """What a task over small networks learns on one kind of texts; see `audit_texts`."""
    with tempfile.TemporaryDirectory() as folder:
        given, asked = (
            _written(Path(folder) / f"{part}.jsonl", recipe, corpus, arm, rows, mix_seed(seed, part))
            for part in ("train", "test")
        )
        train(objective, given, steps=steps, batch_size=batch_size, seed=seed)
        return judge(arm, objective, _unseen(objective, asked, batch_size, seed))


def _unseen(objective: Objective, data: Data, batch_size: int, seed: int) -> Iterator[Batch]:
    tokenizers = tokenizers_of(objective.exported)
    batches = read(data, objective.needs, tokenizers=tokenizers, batch_size=batch_size)
    for step, batch in enumerate(batches):
        yield objective.transform(batch, Draws(seed, step, count_rows(batch), stream="unseen"))


def _written(path: Path, recipe: Recipe, corpus: Corpus, arm: Arm, rows: int, seed: int) -> Data:
    """A jsonl file of documents, decoded as the recipe's."""
    with path.open("w") as file:
        for row in range(rows):
            text = corpus.text(np.random.default_rng(mix_seed(seed, row)), cue=arm.artifact == CUE)
            file.write(json.dumps({"text": text}) + "\n")
    return Data(source=str(path), text=next(iter(recipe.sources().values())).text)
