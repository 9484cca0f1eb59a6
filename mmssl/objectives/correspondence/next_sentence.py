"""Next sentence: does this passage follow that one?

Form `nsp`: Devlin, Chang, Lee & Toutanova 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", arXiv 1810.04805: the second part of a pair is what follows the first in its document, or (one in two)
comes out of another row of the global batch. Form `sop`: Lan et al. 2020, "ALBERT: A Lite BERT for Self-supervised
Learning of Language Representations", arXiv 1909.11942: both parts are of one document, in order or (one in two)
swapped. A row is a document of several sentences, cut between two of them, each cut as likely. `[CLS] A [SEP] B [SEP]`
goes through the encoder once, with the two token types where it has those; a layer with tanh and a linear one read its
first token.

Known traps. The published codes take a random document whenever a chunk is one segment long: in BERT that makes more
negatives than positives, in ALBERT it brings back the topic. Here such a row counts for nothing, with either answer,
and so does one whose two answers are the same tokens. A row that fills its length ends within a sentence, which tells
where its document goes on: that sentence is left out. In `nsp` the lengths would tell, too: a document's own second
part is as long as the first leaves room for. So a partner is drawn for every row, and B is cut to the same length
whichever it is: one between half the shorter and the shorter of the two. The topic is what `nsp` is mostly about; in
`sop` both answers have the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch, valid_tokens
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.objectives._causal import sees_later
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.gather import gather
from mmssl.ops.losses import mean_over
from mmssl.ops.pairs import fingerprint

ANSWERS = {"nsp": ("goes on", "another text"), "sop": ("in order", "swapped")}


class _Part(NamedTuple):
    """One passage a row: its ids (B, L) from the left, whatever comes after them, and their number (B,)."""

    ids: Tensor
    length: Tensor


class NextSentence(Objective):
    """Tell a document's continuation from another document's, or its order from the reverse.

    Args:
        encoders: holds the text encoder, whose tokenizer has `[CLS]` and `[SEP]`.
        encoder: its name.
        form: `nsp`, the next or another row's sentences, or `sop`, the order of two.
    """

    needs = ("text", "text_sentence")
    divisors = ("valid_pairs",)

    def __init__(
        self, encoders: Mapping[str, Encoder], *, encoder: str = "text", form: Literal["nsp", "sop"] = "nsp"
    ) -> None:
        super().__init__(encoders)
        text = cast(TextEncoder, self.encoder(encoder, "text"))
        self.tokenizer = text.tokenizer
        if self.tokenizer.pair_ids is None:
            raise RecipeError(
                f"next_sentence puts [CLS] before and [SEP] after the parts of a pair, and the tokenizer of the "
                f"encoder '{encoder}' has no such tokens; take a masked model's, or train:8000 for one made here"
            )
        if sees_later(text) is False:
            raise RecipeError(
                f"next_sentence judges a pair by its first token, and the encoder '{encoder}' is causal, so that this "
                "one sees no other; take transformers/bert"
            )
        self.name, self.form, self.pair_ids = encoder, form, self.tokenizer.pair_ids
        self.meets = "transform" if form == "nsp" else "nowhere"
        self.head = nn.Sequential(nn.Linear(text.dim, text.dim), nn.Tanh(), nn.Linear(text.dim, 2))

    def chance(self, rows: int) -> Chance:
        """A coin."""
        return Chance(math.log(2), {"accuracy": 0.5})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Pairs `text`, `text_mask` and `segments` (B, L), `answer` (B,) 0 or 1, `valid` bool (B,)."""
        text, sentence, mask = batch["text"], batch["text_sentence"], valid_tokens(batch)
        cut = mask.all(1, keepdim=True) & (sentence == sentence.amax(1, keepdim=True))
        content = mask & (sentence >= 0) & ~cut
        sentences = sentence.masked_fill(~content, -1).amax(1) + 1
        first = 1 + (draws.uniform() * (sentences - 1).clamp(min=1)).long()  # sentences before the cut
        words = text.gather(1, (~content).to(torch.uint8).argsort(dim=1, stable=True))
        length_a = (content & (sentence < first[:, None])).sum(1)
        a = _Part(words, length_a.clamp(max=text.shape[1] - 3))
        b = _Part(_from(words, length_a), (content.sum(1) - length_a).minimum(text.shape[1] - 3 - a.length))
        valid = (sentences > 1) & (b.length > 0)
        if self.form == "sop":
            pairs = self._pair(a, b), self._pair(b, a)
        else:
            other, found = _partner(b, text * mask, valid, draws)
            shorter = b.length.minimum(other.length)
            half = (shorter + 1) // 2
            length = half + (draws.uniform() * (shorter - half + 1)).long()
            valid = valid & found
            pairs = self._pair(a, _Part(b.ids, length)), self._pair(a, _Part(other.ids, length))
        valid = valid & (pairs[0]["text"] != pairs[1]["text"]).any(1)
        answer = draws.chance(0.5)
        chosen = {key: torch.where(answer[:, None], pairs[1][key], pairs[0][key]) for key in pairs[0]}
        return {**chosen, "answer": answer.long(), "valid": valid, "valid_pairs": valid.sum()}

    def _pair(self, a: _Part, b: _Part) -> Batch:
        """`[CLS] A [SEP] B [SEP]`, padded."""
        start, separator = self.pair_ids
        place = torch.arange(a.ids.shape[1], device=a.ids.device)
        middle, end = a.length[:, None] + 1, (a.length + b.length)[:, None] + 2
        text = torch.where(place < middle, _from(a.ids, -1), _from(b.ids, -1 - middle[:, 0]))
        text = text.masked_fill(place == 0, start).masked_fill((place == middle) | (place == end), separator)
        mask = place <= end
        segments = ((place > middle) & mask).long()
        return {"text": text.masked_fill(~mask, self.tokenizer.pad_id), "text_mask": mask, "segments": segments}

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, 2) from the first token."""
        text = cast(TextEncoder, self.encoder(self.name))
        segments = {"segments": inputs["segments"]} if text.embeds_segments else {}
        return {"logits": self.head(text(inputs["text"], inputs["text_mask"], **segments).tokens[:, 0])}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy over the pairs that have an answer; `valid`, the share of rows that are such."""
        logits, answer, valid, count = outputs["logits"], inputs["answer"], inputs["valid"], inputs["valid_pairs"]
        surprise = F.cross_entropy(logits, answer, reduction="none")
        right = (logits.argmax(1) == answer).to(logits.dtype)
        return {
            "loss": mean_over(surprise, valid, count),
            "accuracy": mean_over(right, valid, count),
            "valid": valid.to(logits.dtype).mean(),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both parts, the answer, and what the network says."""
        parts = [
            [self.tokenizer.decode(ids[mask & (kind == side)]) for side in range(2)]
            for ids, mask, kind in zip(inputs["text"], inputs["text_mask"], inputs["segments"], strict=True)
        ]
        answers = [
            ANSWERS[self.form][int(answer)] if valid else "does not count"
            for answer, valid in zip(inputs["answer"], inputs["valid"], strict=True)
        ]
        found = [ANSWERS[self.form][int(answer)] for answer in outputs["logits"].argmax(1)]
        right = [a == b if counts else None for a, b, counts in zip(answers, found, inputs["valid"], strict=True)]
        return [
            Panel("A | B", [" | ".join(sides) for sides in parts]),
            Panel("target", answers),
            Panel("prediction", found, right),
        ]


def _from(ids: Tensor, start: Tensor | int) -> Tensor:
    """Each row from `start` (B,) on, to the left or right; what comes from beyond its ends means nothing."""
    place = torch.arange(ids.shape[1], device=ids.device)
    shift = start[:, None] if isinstance(start, Tensor) else start
    return ids.gather(1, (place + shift).clamp(0, ids.shape[1] - 1).expand_as(ids))


def _partner(b: _Part, text: Tensor, usable: Tensor, draws: Draws) -> tuple[_Part, Tensor]:
    """For each row the second part of another one, uniform over those of the global batch that have another text.

    Args:
        b: this process's second parts.
        text: int64 (B, L), the documents.
        usable: bool (B,), which rows have a second part.
        draws: source of randomness.

    Returns:
        Parts, and whether there was any, bool (B,).
    """
    name = fingerprint(text)
    rows = torch.cat([name[:, None], b.length[:, None], usable.long()[:, None], b.ids], dim=1)
    everyone = gather(rows) if draws.shares > 1 else rows
    allowed = (everyone[:, 2] > 0) & (everyone[:, 0] != name[:, None])
    count = allowed.sum(1)
    number = (draws.uniform() * count).long().minimum(count - 1)
    found = everyone[(allowed.cumsum(1) == number[:, None] + 1).long().argmax(1)]
    return _Part(found[:, 3:], found[:, 1]), count > 0
