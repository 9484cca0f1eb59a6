"""Proof that a network does not see later tokens, and a picture of what it predicts.

The proof is its gradient with respect to later tokens, which is exactly zero or not.
"""

from __future__ import annotations

from itertools import groupby, islice

import torch
from torch import Tensor
from torch.func import functional_call

from mmssl.encoders.base import Encoder, Features
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.modules.mode import evaluating

PROOF_TOKENS = 6


def sees_later(text: TextEncoder) -> bool | None:
    """Whether the output at a place depends on a later token, by one run on a short text.

    Args:
        text: the network, whatever its weights; without memory (`meta`) they show nothing, and the answer is None.
    """
    embedding = text.token_embedding
    if embedding.is_meta:
        return None
    # Each token is there once, so that a row of the embedding's gradient belongs to one place.
    words = (i for i in range(len(embedding)) if i not in text.tokenizer.special_ids)
    ids = torch.tensor(list(islice(words, PROOF_TOKENS)), device=embedding.device)
    key = next(key for key, parameter in text.named_parameters() if parameter is embedding)
    leaf = embedding.detach().requires_grad_()  # it may be frozen
    with torch.enable_grad(), evaluating(text):
        seen = functional_call(text, {key: leaf}, (ids[None], torch.ones_like(ids[None], dtype=torch.bool)))
        return leaks(seen.tokens[0], leaf, ids)


def prove_causal(text: TextEncoder, name: str, task: str) -> None:
    """Refuse a text encoder, by its name and for a task, that sees later tokens; see `sees_later`.

    Raises:
        RecipeError: where the output at a place depends on a later token.
    """
    if sees_later(text):
        raise RecipeError(
            f"{task}: the text encoder '{name}' sees later tokens, so that the answer is in the question; take "
            "a causal one: transformers/gpt2, transformers/bert with is_decoder: true, or a text tower of open_clip"
        )


def prove_fusion_causal(fusion: Encoder, name: str, widths: tuple[int, int], task: str) -> None:
    """Refuse a fusion, by its name and for a task, that lets a token of `b` see later ones though told not to.

    Args:
        fusion: of tokens of these `widths`, those of `a` and of `b`.
        name: of the fusion.
        widths: in numbers.
        task: named in the error.

    Raises:
        RecipeError: where what the fusion makes of a token has a gradient on a later one.
    """
    like = next(fusion.parameters())
    if like.is_meta:
        return
    with torch.enable_grad(), evaluating(fusion):
        a, b = (
            torch.linspace(-1, 1, rows * width, device=like.device, dtype=like.dtype).sin().view(1, rows, width)
            for rows, width in zip((3, PROOF_TOKENS), widths, strict=True)
        )
        b.requires_grad_()
        sides = [Features(tokens, tokens.mean(1), tokens.shape[1:2]) for tokens in (a, b)]
        leaking = leaks(fusion(*sides, causal=True).b[0], b, torch.arange(PROOF_TOKENS, device=like.device))
    if leaking:
        raise RecipeError(
            f"{task}: the fusion '{name}' lets a token see later ones though it is told not to, so that the answer "
            "is in the question; take {model: transformers/bert}"
        )


def leaks(places: Tensor, source: Tensor, rows: Tensor) -> bool:
    """Whether one of `places` (L, D) has a gradient on a later one of the rows `rows` (L,) of `source`."""
    weights = torch.linspace(0.5, 1.5, places.shape[1], device=places.device, dtype=places.dtype)
    for t in range(len(places) - 1):
        (gradient,) = torch.autograd.grad(places[t] @ weights, source, retain_graph=True)
        if gradient.flatten(0, -2)[rows[t + 1 :]].any():
            return True
    return False


def blank_misses(tokenizer: Tokenizer, ids: Tensor, choices: Tensor) -> str:
    """The text of `ids` (L,) with `_` for each of them that is not the one in `choices` (L,).

    An untrained network with tied embeddings says again what it has just read: its choices alone look like the text.
    """
    pairs = zip(ids.tolist(), (ids == choices).tolist(), strict=True)
    runs = [(right, [i for i, _ in run]) for right, run in groupby(pairs, key=lambda pair: pair[1])]
    return " ".join(tokenizer.decode(run) if right else "_ " * len(run) for right, run in runs).strip()
