"""Does a task that finds partners find those of strangers? Rows of the user, each side from another row.

Pictures and texts, or whatever a task compares, are the user's own, but every partner is a stranger's, drawn anew at
every step: no row's sides belong together, so that what a small network gets right above chance on rows that it was not
trained on, it knows from the transform: a draw that both sides share, a number of the row, a place in the batch. The
control has a code on both sides: one of a few brightnesses, words or levels of a tone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mmssl.audit.clip_rows import KEPT, joined
from mmssl.audit.networks import stand_in
from mmssl.audit.nulls import CODE, Arm
from mmssl.audit.shortcuts import Finding, accuracy_of, judge, train_on, with_control
from mmssl.batch import MODALITIES, Batch, count_rows
from mmssl.data.loader import Loader, read
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws, mix_seed
from mmssl.ops.pairs import fingerprint
from mmssl.recipe import Recipe

STRANGERS = Arm("own rows, each side from another", "as they are")
CODES = 8
STRENGTH = 0.75  # of the code, over what is seen
TONE, PITCH = 0.5, 1000.0  # its loudest tone, in Hz


class Strangers:
    """Batches in which no two sides are of one row.

    Args:
        rows: of all rows, on the CPU.
        batch_size: pairs of a batch; fewer where there are not so many rows.
        seed: of who meets whom, and of the code.
        code: that is planted on both sides; None for none.
    """

    def __init__(self, rows: Batch, batch_size: int, seed: int, code: Code | None) -> None:
        self.rows, self.seed, self.code = rows, seed, code
        self.sides = [modality for modality in MODALITIES if modality in rows]
        self.size = min(batch_size, count_rows(rows) // len(self.sides))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Those of steps `start` to `stop`."""
        for step in range(start, stop):
            chosen = np.random.default_rng(mix_seed(self.seed, step)).permutation(count_rows(self.rows))
            yield self._met(torch.from_numpy(chosen[: self.size * len(self.sides)]), step)

    def once(self) -> Iterator[Batch]:
        """Every row in one pair, in whole batches."""
        wide = self.size * len(self.sides)
        for step in range(count_rows(self.rows) // wide):
            yield self._met(torch.arange(step * wide, (step + 1) * wide), step)

    def _met(self, rows: Tensor, step: int) -> Batch:
        parts = dict(zip(self.sides, rows.chunk(len(self.sides)), strict=True))
        batch = {key: value[parts.get(key.partition("_")[0], parts[self.sides[0]])] for key, value in self.rows.items()}
        if self.code is None:
            return batch
        drawn = np.random.default_rng(mix_seed(self.seed, "code", step)).integers(CODES, size=self.size)
        return self.code.planted(batch, torch.from_numpy(drawn))


class Code(NamedTuple):
    """The control's code.

    Attributes:
        rate: of sounds, in Hz.
        words: size of the vocabulary of texts, whose last words stand for the codes.
    """

    rate: int
    words: int

    def planted(self, batch: Batch, code: Tensor) -> Batch:
        """On all sides of each row its own code, int64 (B,)."""
        level, planted = code / (CODES - 1), dict(batch)
        for key in {"image", "video"} & batch.keys():
            seen = batch[key].float()
            bright = 255 * level.float().view(-1, *[1] * (seen.ndim - 1))
            planted[key] = ((1 - STRENGTH) * seen + STRENGTH * bright).round().to(batch[key].dtype)
        if "audio" in batch:
            moments = torch.arange(batch["audio"].shape[1]) / self.rate
            tone = TONE * level.float()[:, None].square() * torch.sin(2 * math.pi * PITCH * moments)
            planted["audio"] = (batch["audio"] + tone).clamp(-1, 1)
        if "text" in batch:
            ids = batch["text"].clone()
            mask = batch.get("text_mask", torch.ones_like(ids, dtype=torch.bool))
            length = mask.sum(1, keepdim=True)
            place = torch.arange(ids.shape[1])
            first = (place > 0) & (place <= (length - 2).clamp(min=1) // 2 + 1) & mask
            planted["text"] = torch.where(first, self.words - 1 - code[:, None], ids)
        return planted


def compares_sides(objective: Objective) -> bool:
    """Whether a task finds the partners of rows among those of a batch, by two encoders."""
    return objective.meets == "loss" and bool(objective.pairs)


def audit_pairs(
    recipe: Recipe,
    needs: tuple[str, ...],
    tokenizers: Mapping[str, Tokenizer],
    *,
    steps: int = 150,
    batch_size: int = 16,
    rows: int = 1024,
    seed: int = 0,
    report: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """The control, and rows of which each side is from another.

    Args:
        recipe: of a task that `compares_sides`, with one source.
        needs: of the task.
        tokenizers: name of a text encoder -> its own.
        steps: of each small training.
        batch_size: pairs a step.
        rows: of the user's own, at most; half of them are for testing.
        seed: of pairs, initialization and draws.
        report: called with each finding as soon as it is there.

    Raises:
        RecipeError: for several sources, too few rows, or a task that has no right answers.
    """
    accuracy_of(stand_in(recipe, tokenizers, seed), batch_size)
    train, test = own_halves(recipe, needs, tokenizers, rows)
    sides = sum(modality in train for modality in MODALITIES)
    if min(count_rows(train), count_rows(test)) < 2 * sides:
        raise RecipeError(
            f"pairs of strangers take {4 * sides} rows that differ on every side, and there are "
            f"{count_rows(train) + count_rows(test)}"
        )
    code = Code(
        next(iter(recipe.sources().values())).audio.rate, next((t.vocab_size for t in tokenizers.values()), CODES)
    )
    found: list[Finding] = []
    for arm in (Arm(STRANGERS.null, STRANGERS.file, CODE), STRANGERS):
        objective = stand_in(recipe, tokenizers, seed)
        given, asked = (
            Strangers(part, batch_size, mix_seed(seed, name), code if arm.is_control else None)
            for part, name in ((train, "train"), (test, "test"))
        )
        one = measure_pairs(objective, arm, given, asked, steps, seed)
        found.append(with_control(one, found[0]) if found else one)
        report(found[-1])
    return found


def measure_pairs(objective: Objective, arm: Arm, given: Strangers, asked: Strangers, steps: int, seed: int) -> Finding:
    """What a task over whatever networks it has learns of pairs that have nothing in common; see `audit_pairs`."""
    train_on(objective, cast(Loader, given), steps=steps, batch_size=given.size, seed=seed)
    unseen = (
        objective.transform(batch, Draws(seed, step, asked.size, stream="unseen"))
        for step, batch in enumerate(asked.once())
    )
    return judge(arm, objective, unseen, matched=asked.size)


def own_halves(
    recipe: Recipe, needs: tuple[str, ...], tokenizers: Mapping[str, Tokenizer], rows: int
) -> tuple[Batch, Batch]:
    """Rows of the user, to train on and to test, of which no two have an equal side."""
    data = next(iter(recipe.sources().values()))
    known = {"text": next(iter(tokenizers.values()))} if tokenizers else None
    first = joined(read(data.model_copy(update={"cache": None, "limit": 1}), needs, tokenizers=known))
    one = sum(value.nbytes for value in first.values())
    most = min(rows, data.limit or rows, max(4, KEPT // max(1, one)))
    own = joined(read(data.model_copy(update={"cache": None, "limit": most}), needs, tokenizers=known))
    kept, seen = [], {modality: set[int]() for modality in MODALITIES if modality in own}
    marks = {modality: fingerprint(own[modality]).tolist() for modality in seen}
    for row in range(count_rows(own)):
        if all(marks[modality][row] not in seen[modality] for modality in seen):
            kept.append(row)
            for modality in seen:
                seen[modality].add(marks[modality][row])
    middle = len(kept) // 2
    train, test = (
        {key: value[torch.tensor(part)] for key, value in own.items()} for part in (kept[:middle], kept[middle:])
    )
    return train, test
