"""Tokens as answers: which of a text's tokens may be hidden, and the head that says which token was there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.ops.draws import Draws
from mmssl.ops.masking import choose_places, corrupt_tokens
from mmssl.ops.transfers import upload


class Vocabulary(nn.Module):
    """The ids of a text encoder's tokenizer: which are special, and what a hidden token is replaced by.

    Args:
        text: the encoder.
        name: its name, for errors.
        task: that of the task, likewise.

    Attributes:
        special: bool (V,), True for ids that are never hidden.
        ordinary: int64 (K,), all other ids.

    Raises:
        RecipeError: where the tokenizer has no mask token.
    """

    special: Tensor
    ordinary: Tensor

    def __init__(self, text: TextEncoder, name: str, task: str) -> None:
        super().__init__()
        self.tokenizer = text.tokenizer
        if self.tokenizer.mask_id is None:
            raise RecipeError(
                f"{task} needs a mask token, and the tokenizer of the encoder '{name}' has none; "
                "take a masked model's tokenizer, or train:8000 for one made from the texts"
            )
        self.mask_id: int = self.tokenizer.mask_id
        special = torch.zeros(self.tokenizer.vocab_size, dtype=torch.bool)
        special[sorted(self.tokenizer.special_ids)] = True
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("ordinary", (~special).nonzero()[:, 0], persistent=False)

    def choose(self, text: Tensor, valid: Tensor, ratio: float, draws: Draws) -> tuple[Tensor, Tensor]:
        """Of a text of n tokens max(1, round(ratio · n)), n with its start and end token, none of which is chosen.

        Args:
            text: int64 (B, L).
            valid: bool (B, L).
            ratio: share of the tokens.
            draws: source of randomness.

        Returns:
            int64 (B, M) places and bool (B, M), which of them count: M is what a text that fills the row has.
        """
        count_of = [max(1, round(ratio * n)) for n in range(text.shape[1] + 1)]
        counts = upload(count_of, text.device)[valid.sum(1)]
        return choose_places(valid & ~self.special[text], counts, max(count_of), draws)

    def corrupt(self, text: Tensor, places: Tensor, chosen: Tensor, draws: Draws, **settings: Any) -> Tensor:
        """What is seen where tokens are hidden, int64 (B, L); for the settings see `corrupt_tokens`."""
        given = {"mask_id": self.mask_id, "vocabulary": self.ordinary, **settings}
        return corrupt_tokens(text, places, chosen, draws, **given)

    def filled_in(self, seen: Tensor, valid: Tensor, places: Tensor, chosen: Tensor) -> Callable[..., list[str]]:
        """Texts with other tokens at the chosen places: a function of these tokens (N,), row by row.

        Given the target (N,) as well, the function marks what differs from it. Places that are not chosen keep the
        token that the network saw there, which is the original.
        """
        there = seen.gather(1, places)

        def texts(tokens: Tensor, target: Tensor | None = None) -> list[str]:
            filled = seen.scatter(1, places, there.masked_scatter(chosen, tokens))
            if target is None:
                return decode_rows(self.tokenizer, filled, valid)
            wrong = torch.zeros_like(chosen).masked_scatter(chosen, tokens != target)
            return mark_rows(self.tokenizer, filled, valid, torch.zeros_like(valid).scatter(1, places, wrong))

        return texts


class TiedHead(nn.Module):
    """BERT's head: linear, GELU and norm to the width of the input embedding, then that embedding and a bias.

    Args:
        dim: width of what it reads.
        text: encoder whose embedding it is tied to; it stays outside of this module.
        eps: of the norm.
    """

    def __init__(self, dim: int, text: TextEncoder, *, eps: float = 1e-5) -> None:
        super().__init__()
        tokens, width = text.token_embedding.shape
        self.transform = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.LayerNorm(width, eps=eps))
        self.bias = nn.Parameter(torch.zeros(tokens))

    def forward(self, hidden: Tensor, text: TextEncoder) -> Tensor:
        """(..., dim) -> logits (..., V)."""
        return F.linear(self.transform(hidden), text.token_embedding, self.bias)


def decode_rows(tokenizer: Tokenizer, ids: Tensor, valid: Tensor) -> list[str]:
    """The valid ones of ids int64 (B, L) as text, a line a row."""
    return [tokenizer.decode(row[kept]) for row, kept in zip(ids, valid, strict=True)]


def mark_rows(tokenizer: Tokenizer, ids: Tensor, valid: Tensor, marked: Tensor) -> list[str]:
    """As `decode_rows`, with runs of `marked` tokens, bool (B, L), in «guillemets»."""
    lines = []
    for row, kept, marks in zip(ids, valid, marked, strict=True):
        parts = []
        for mark, run in groupby(zip(marks[kept].tolist(), row[kept].tolist(), strict=True), key=lambda pair: pair[0]):
            part = tokenizer.decode([token for _, token in run])
            parts.append(f"«{part}»" if mark and part else part)
        lines.append(" ".join(filter(None, parts)))
    return lines


def tie_embeddings(text: TextEncoder, other: TextEncoder, name: str, task: str) -> None:
    """Let the encoder `other`, by its name and for a task, use the embeddings of `text`, of tokens and of places.

    Raises:
        RecipeError: where the two do not fit.
    """
    if text.token_embedding.shape != other.token_embedding.shape:
        raise RecipeError(
            f"{task}: '{name}' embeds tokens in {other.token_embedding.shape[1]} dimensions and the encoder in "
            f"{text.token_embedding.shape[1]}, so they cannot share them; give transformers/electra one embedding_size "
            "for both, or set share_embeddings: false"
        )
    theirs = {path: module.weight for path, module in text.named_modules() if isinstance(module, nn.Embedding)}
    for path, module in other.named_modules():
        if isinstance(module, nn.Embedding) and path in theirs and module.weight.shape == theirs[path].shape:
            module.weight = theirs[path]
    if other.token_embedding is not text.token_embedding:
        raise RecipeError(
            f"{task}: '{name}' is of another kind than the encoder: take one model, or share_embeddings: false"
        )
