"""Replaced token detection: which tokens of this text are not the original ones?

Clark, Luong, Le & Manning 2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", arXiv
2003.10555. A small generator learns masked language modeling; in place of each token that was hidden from it one is
drawn from what it predicts, and the encoder says of every token whether it is the original. The loss is the
generator's plus 50 times the encoder's, in one backward pass; no gradient goes through the draw, so the generator is
not trained to deceive. In each text exactly max(1, round(0.15 · length)) tokens are chosen, as the published code
counts them, of which the generator sees 85 % as `[MASK]` and 15 % as they are (the paper speaks of all as `[MASK]`:
`masked: 1.0`).

Generator and encoder share their embeddings of tokens and positions. Where the generator is narrower its embedding
stays as wide as the encoder's, and a linear map leads to its own width: `embedding_size` of `transformers/electra`.

Known traps. A token that the generator guesses right is an original and not a replacement. The published code chooses
places *with* replacement, here they are distinct: its texts have some 7 % fewer different places. A scale of the
sampling noise, or the most probable token in place of a drawn one, makes another task. The generator receives no
gradient from the encoder's term, except through the embeddings that both share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over, token_gains
from mmssl.ops.masking import choose_places, corrupt_tokens, take


class ReplacedToken(Objective):
    """Find the tokens that a small masked language model has put in place of others.

    Both networks leave the run: the encoder, which is what transfers, and the generator.

    Args:
        encoders: holds both text encoders, which have one vocabulary with a mask token.
        encoder: name of the one that tells original from replaced tokens.
        generator: name of the one that proposes replacements, a quarter to half as wide.
        rate: share of a text's tokens that the generator predicts.
        masked: share of these that it sees as the mask token; the others it sees as they are.
        weight: of the encoder's term.
        share: whether both have the same embeddings: those of tokens, and every other one of equal name and size.
    """

    needs = ("text",)
    divisors = ("chosen_tokens", "valid_tokens")
    vocabulary: Tensor
    special: Tensor

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "text",
        generator: str = "generator",
        rate: float = 0.15,
        masked: float = 0.85,
        weight: float = 50.0,
        share: bool = True,
    ) -> None:
        super().__init__(encoders)
        if encoder == generator:
            raise RecipeError(f"replaced_token: encoder and generator are both '{encoder}'; it takes two networks")
        text, small = cast(TextEncoder, self.encoder(encoder)), cast(TextEncoder, self.encoder(generator))
        for name, network in ((encoder, text), (generator, small)):
            if network.modality != "text":
                raise RecipeError(f"replaced_token reads text, and the encoder '{name}' reads {network.modality}")
        if not 0 < rate < 1:
            raise RecipeError(f"replaced_token: rate = {rate} should be a share between 0 and 1")
        if not 0 < masked <= 1:
            raise RecipeError(f"replaced_token: masked = {masked} should be a share above 0 and at most 1")
        self.tokenizer = text.tokenizer
        if self.tokenizer != small.tokenizer or text.token_embedding.shape[0] != small.token_embedding.shape[0]:
            raise RecipeError(
                f"replaced_token: the encoders '{encoder}' and '{generator}' have different vocabularies, "
                "and read the same ids; give both one tokenizer"
            )
        if self.tokenizer.mask_id is None:
            raise RecipeError(
                f"replaced_token needs a mask token, and the tokenizer of the encoder '{encoder}' has none; "
                "take a masked model's tokenizer, or train:8000 for one made from the texts"
            )
        if share:
            _share_embeddings(text, small, generator)
        self.name, self.generator = encoder, generator
        self.rate, self.masked, self.weight, self.mask_id = rate, masked, weight, self.tokenizer.mask_id
        special = torch.zeros(self.tokenizer.vocab_size, dtype=torch.bool)
        special[sorted(self.tokenizer.special_ids)] = True
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("vocabulary", (~special).nonzero()[:, 0], persistent=False)
        self.tokens, width = small.token_embedding.shape
        self.language_head = nn.Sequential(nn.Linear(small.dim, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12))
        self.language_bias = nn.Parameter(torch.zeros(self.tokens))
        self.head = nn.Sequential(nn.Linear(text.dim, text.dim), nn.GELU(), nn.Linear(text.dim, 1))

    def chance(self, rows: int) -> Chance:
        """Of `ranking`: how often a replaced token is thought the likelier replacement of the two than an original.

        The loss has no level that holds throughout: fewer tokens are replaced as the generator learns.
        """
        return Chance(None, {"ranking": 0.5})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`text` (B, L) as it is and `hidden` as the generator sees it, `places`, `chosen` bool and `dice` (B, M).

        M is the number of chosen tokens of a text that fills the row; shorter texts leave the last places unchosen.
        """
        text = batch["text"]
        mask = batch.get("text_mask", torch.ones_like(text, dtype=torch.bool))
        count_of = [max(1, round(self.rate * n)) for n in range(text.shape[1] + 1)]
        counts = torch.tensor(count_of, device=text.device)[mask.sum(1)]
        places, chosen = choose_places(mask & ~self.special[text], counts, max(count_of), draws)
        hidden = corrupt_tokens(
            *(text, places, chosen, draws),
            mask_id=self.mask_id,
            vocabulary=self.vocabulary,
            masked=self.masked,
            replaced=0.0,
        )
        return {
            "text": text,
            "text_mask": mask,
            "hidden": hidden,
            "places": places,
            "chosen": chosen,
            "dice": draws.uniform(places.shape[1]),
            "chosen_tokens": chosen.sum(),
            "valid_tokens": mask.sum(),
        }

    def predict(self, inputs: Batch) -> Batch:
        """`gain` and `right` (B, M) of the generator, see `token_gains`; `sampled` (B, M), the tokens that it drew.

        Of the encoder the logits `replaced` (B, L).
        """
        text, small = (cast(TextEncoder, self.encoder(name)) for name in (self.name, self.generator))
        mask, places, chosen = inputs["text_mask"], inputs["places"], inputs["chosen"]
        hidden = take(small(inputs["hidden"], mask).tokens, places)[chosen]
        logits = F.linear(self.language_head(hidden), small.token_embedding, self.language_bias)
        original = inputs["text"].gather(1, places)
        gain, right = token_gains(logits, original, chosen)
        sampled = original.masked_scatter(chosen, draw_tokens(logits, inputs["dice"][chosen]))
        replaced = self.head(text(_filled(inputs, sampled), mask).tokens)[..., 0]
        return {"gain": gain, "right": right, "sampled": sampled.float(), "replaced": replaced}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy at the chosen places, plus `weight` times the binary one at every valid token."""
        replaced, text, chosen, mask = outputs["replaced"], inputs["text"], inputs["chosen"], inputs["text_mask"]
        changed = _filled(inputs, outputs["sampled"].long()) != text
        surprise = math.log(self.tokens) - outputs["gain"]
        doubt = F.binary_cross_entropy_with_logits(replaced, changed.to(replaced.dtype), reduction="none")
        generator = mean_over(surprise, chosen, inputs["chosen_tokens"])
        discriminator = mean_over(doubt, mask, inputs["valid_tokens"])
        return {
            "loss": generator + self.weight * discriminator,
            "generator_loss": generator,
            "discriminator_loss": discriminator,
            "generator_accuracy": mean_over(outputs["right"], chosen, inputs["chosen_tokens"]),
            "replaced": mean_over(changed.to(replaced.dtype), mask, inputs["valid_tokens"]),
            "ranking": _ranking(replaced, mask & changed, mask & ~changed),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What the generator sees, the text with its «replaced» tokens, and with those that the encoder finds."""
        filled = _filled(inputs, outputs["sampled"].long())
        return [
            Panel("generator sees", self._texts(inputs["hidden"], inputs["text_mask"])),
            Panel("replaced", self._texts(filled, inputs["text_mask"], filled != inputs["text"])),
            Panel("found", self._texts(filled, inputs["text_mask"], outputs["replaced"] > 0)),
        ]

    def _texts(self, tokens: Tensor, mask: Tensor, marked: Tensor | None = None) -> list[Tensor | str]:
        marked = torch.zeros_like(mask) if marked is None else marked
        lines: list[Tensor | str] = []
        for ids, marks in (
            (ids[valid].tolist(), marks[valid].tolist()) for ids, valid, marks in zip(tokens, mask, marked, strict=True)
        ):
            parts = []
            for mark, run in itertools.groupby(zip(marks, ids, strict=True), key=lambda pair: pair[0]):
                part = self.tokenizer.decode([token for _, token in run])
                parts.append(f"«{part}»" if mark and part else part)
            lines.append(" ".join(filter(None, parts)))
        return lines


@torch.no_grad()
def draw_tokens(logits: Tensor, dice: Tensor) -> Tensor:
    """One token a place from softmax(logits), by inverting its distribution function: one number a place.

    The published code adds Gumbel noise to every logit and takes the largest, which draws from the same distribution.

    Args:
        logits: (..., V).
        dice: (...), uniform in [0, 1).

    Returns:
        int64 (...). A token of probability 0 is never drawn.
    """
    below = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).cumsum(-1)
    level = dice.to(below.dtype)[..., None] * below[..., -1:]
    return torch.searchsorted(below, level, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


def _filled(inputs: Batch, sampled: Tensor) -> Tensor:
    """The text with the drawn tokens at the chosen places, int64 (B, L)."""
    text, places = inputs["text"], inputs["places"]
    return text.scatter(1, places, torch.where(inputs["chosen"], sampled, text.gather(1, places)))


@torch.no_grad()
def _ranking(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """How often a positive token has a higher logit than a negative one, over all such pairs, 0-dim; 0.5 where none."""
    below = logits.masked_fill(~negative, math.inf).flatten().sort().values
    wins = (torch.searchsorted(below, logits, right=False) + torch.searchsorted(below, logits, right=True)) / 2
    pairs = positive.sum() * negative.sum()
    return torch.where(pairs > 0, (wins * positive).sum() / pairs.clamp(min=1), 0.5).to(logits.dtype)


def _share_embeddings(text: TextEncoder, small: TextEncoder, name: str) -> None:
    """Let the generator `small` use the embeddings of `text` in place of its own."""
    if text.token_embedding.shape != small.token_embedding.shape:
        raise RecipeError(
            f"replaced_token: '{name}' embeds tokens in {small.token_embedding.shape[1]} dimensions and the encoder in "
            f"{text.token_embedding.shape[1]}, so they cannot share them; give transformers/electra one embedding_size "
            "for both, or set share: false"
        )
    theirs = {path: module.weight for path, module in text.named_modules() if isinstance(module, nn.Embedding)}
    for path, module in small.named_modules():
        if isinstance(module, nn.Embedding) and path in theirs and module.weight.shape == theirs[path].shape:
            module.weight = theirs[path]
    if small.token_embedding is not text.token_embedding:
        raise RecipeError(
            f"replaced_token: '{name}' is of another kind than the encoder: take one model, or share: false"
        )
