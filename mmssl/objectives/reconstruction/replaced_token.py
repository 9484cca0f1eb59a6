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

import math
from collections.abc import Mapping
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn

from mmssl.batch import Batch, valid_tokens
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.modules.vocabulary import TiedHead, Vocabulary, decode_rows, mark_rows, tie_embeddings
from mmssl.objectives._concealed import Concealed
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over, score_tokens, token_ranking
from mmssl.ops.masking import draw_tokens, take
from mmssl.ranges import Ratio, Weight


class ReplacedToken(Objective):
    """Find the tokens that a small masked language model has put in place of others.

    Both networks leave the run: the encoder, which is what transfers, and the generator.

    Args:
        encoders: holds both text encoders, which have one vocabulary with a mask token.
        encoder: name of the one that tells original from replaced tokens.
        generator: name of the one that proposes replacements, a quarter to half as wide.
        mask_ratio: share of a text's tokens that the generator predicts.
        masked: share of these that it sees as the mask token; the others it sees as they are.
        weight: of the encoder's term.
        share_embeddings: whether both have the same embeddings, of tokens and every other of equal name and size.
    """

    needs = ("text",)
    divisors = ("chosen_tokens", "valid_tokens")

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "text",
        generator: str = "generator",
        mask_ratio: Ratio = 0.15,
        masked: Annotated[float, Gt(0), Le(1)] = 0.85,
        weight: Weight = 50.0,
        share_embeddings: bool = True,
    ) -> None:
        super().__init__(encoders)
        if encoder == generator:
            raise RecipeError(f"replaced_token: encoder and generator are both '{encoder}'; it takes two networks")
        text, small = (cast(TextEncoder, self.encoder(name, "text")) for name in (encoder, generator))
        if text.tokenizer != small.tokenizer or text.token_embedding.shape[0] != small.token_embedding.shape[0]:
            raise RecipeError(
                f"replaced_token: the encoders '{encoder}' and '{generator}' have different vocabularies, "
                "and read the same ids; give both one tokenizer"
            )
        self.vocabulary = Vocabulary(text, encoder, "replaced_token")
        if share_embeddings:
            tie_embeddings(text, small, generator, "replaced_token")
        self.name, self.generator, self.tokens = encoder, generator, len(small.token_embedding)
        self.mask_ratio, self.masked, self.weight = mask_ratio, masked, weight
        self.language_head = TiedHead(small.dim, small, eps=1e-12)
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
        text, valid = batch["text"], valid_tokens(batch)
        places, chosen = self.vocabulary.choose(text, valid, self.mask_ratio, draws)
        hidden = self.vocabulary.corrupt(text, places, chosen, draws, masked=self.masked, replaced=0.0)
        return {
            "text": text,
            "text_mask": valid,
            "hidden": hidden,
            "places": places,
            "chosen": chosen,
            "dice": draws.uniform(places.shape[1]),
            "chosen_tokens": chosen.sum(),
            "valid_tokens": valid.sum(),
        }

    def predict(self, inputs: Batch) -> Batch:
        """`log_likelihood_ratio` and `right` (B, M) of the generator, see `score_tokens`; `sampled`, its draw.

        Of the encoder the logits `replaced` (B, L).
        """
        text, small = (cast(TextEncoder, self.encoder(name)) for name in (self.name, self.generator))
        mask, places, chosen = inputs["text_mask"], inputs["places"], inputs["chosen"]
        logits = self.language_head(take(small(inputs["hidden"], mask).tokens, places)[chosen], small)
        original = inputs["text"].gather(1, places)
        sampled = original.masked_scatter(chosen, draw_tokens(logits, inputs["dice"][chosen]))
        replaced = self.head(text(_filled(inputs, sampled), mask).tokens)[..., 0]
        return score_tokens(logits, original, chosen) | {"sampled": sampled.float(), "replaced": replaced}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy at the chosen places, plus `weight` times the binary one at every valid token."""
        replaced, text, chosen, mask = outputs["replaced"], inputs["text"], inputs["chosen"], inputs["text_mask"]
        changed = _filled(inputs, outputs["sampled"].long()) != text
        surprise = math.log(self.tokens) - outputs["log_likelihood_ratio"]
        doubt = F.binary_cross_entropy_with_logits(replaced, changed.to(replaced.dtype), reduction="none")
        generator = mean_over(surprise, chosen, inputs["chosen_tokens"])
        discriminator = mean_over(doubt, mask, inputs["valid_tokens"])
        return {
            "loss": generator + self.weight * discriminator,
            "generator_loss": generator,
            "discriminator_loss": discriminator,
            "generator_accuracy": mean_over(outputs["right"], chosen, inputs["chosen_tokens"]),
            "replaced": mean_over(changed.to(replaced.dtype), mask, inputs["valid_tokens"]),
            "ranking": token_ranking(replaced, mask & changed, mask & ~changed),
        }

    def concealed(self, inputs: Batch) -> Concealed:
        """From the encoder the chosen tokens, and from the generator the same but for those it sees as they are."""
        text, places, chosen = inputs["text"], inputs["places"], inputs["chosen"]
        hidden = torch.zeros_like(inputs["text_mask"]).scatter(1, places, chosen)
        return Concealed(
            lambda inputs: self.predict(inputs)["replaced"],
            {"text": hidden},
            shown=(inputs["hidden"].gather(1, places) == text.gather(1, places))[chosen],
            allowed=1 - self.masked,
        )

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What the generator sees, the text with its «replaced» tokens, and with the encoder's guess at them."""
        filled, tokenizer = _filled(inputs, outputs["sampled"].long()), self.vocabulary.tokenizer
        hidden, valid = inputs["hidden"], inputs["text_mask"]
        return [
            Panel("generator sees", decode_rows(tokenizer, hidden, valid)),
            Panel("replaced", mark_rows(tokenizer, filled, valid, filled != inputs["text"])),
            Panel("prediction", mark_rows(tokenizer, filled, valid, outputs["replaced"] > 0)),
        ]


def _filled(inputs: Batch, sampled: Tensor) -> Tensor:
    """The text with the drawn tokens at the chosen places, int64 (B, L)."""
    text, places = inputs["text"], inputs["places"]
    return text.scatter(1, places, torch.where(inputs["chosen"], sampled, text.gather(1, places)))
