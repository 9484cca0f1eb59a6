"""Captioning: what does the text say about what is seen, word by word?

Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models", arXiv 2205.01917, section 3.2, equation
(3): a causal text tower, above it layers that also attend to the tokens of `a`, and the cross-entropy of each next
token; with `contrastive`, weights 1 and 2, one pass of both towers serves both (`combine`). Li et al. 2022,
"BLIP", arXiv 2201.12086, trains its decoder so with label smoothing 0.1. `a` may be of any modality: images, sound,
video. The loss is the mean over all valid next tokens of the global batch, the end token included, padding excluded.

What differs from the papers. CoCa reads `a` through 256 learned queries: that pooler is part of the image tower where
the recipe takes one that has it, `open_clip/coca_ViT-B-32`, and is left out elsewhere. The fusion's layers each have
self-attention and cross-attention as in both papers; output goes through the transform and the tied embedding of
BERT's head, as in BLIP, where open_clip's CoCa has a projection of its own. BLIP's text tower reads both ways when it
encodes and forwards when it decodes; here a tower does one or the other, and this task asks for a causal one.

Known traps. A tower that sees later tokens makes the task trivial, whatever the fusion masks: its token t holds token
t + 1 already. So the gradient of both networks is taken once when the task is built. open_clip pads with id 0, which
also is `!`: padding is asked of the mask. A captioner can lower its loss for long without looking at `a` at all:
`relative_error`, the loss over that of the running frequencies of tokens, says that it reads the text, and `blind`
measures whether it looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.modules.mode import evaluating
from mmssl.modules.unigram import Unigram
from mmssl.modules.views import Crop
from mmssl.modules.vocabulary import TiedHead
from mmssl.objectives._causal import prove_causal, prove_fusion_causal
from mmssl.objectives._concealed import Concealed, Later
from mmssl.objectives._two_sides import TwoSides
from mmssl.objectives.base import Chance, Panel, Step
from mmssl.ops.draws import Draws
from mmssl.ops.gather import average
from mmssl.ops.losses import score_tokens, token_losses
from mmssl.ranges import BelowOne, Count

BLIND_ROWS = 64  # of each process: enough for a ratio, little against a step
VIEWS: dict[str, Any] = {}


class Captioning(TwoSides):
    """Predict each token of `b` from those before it and from `a`.

    Args:
        encoders: holds the three networks.
        a: name of the encoder of what is described.
        b: name of the text encoder, which must be causal.
        fusion: name of the fusion, of kind `cross`, that reads `a` and `b`.
        smoothing: share of the target that is spread over all tokens; 0.1 in BLIP.
        views: of images: how they are cropped, see `Crop`; not at all by default.
        blind: steps between measurements of `loss_over_blind`, the loss over that with the `a` of another row: 1 where
            the network does not look. 0 for never. One costs less than two forward passes of 64 rows.
    """

    divisors = ("caption_tokens", "unigram_surprise")

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        a: str = "image",
        b: str = "text",
        fusion: str = "fusion",
        smoothing: BelowOne = 0.0,
        views: dict[str, Any] = VIEWS,
        blind: Count = 0,
    ) -> None:
        super().__init__(encoders, a, b, Crop.of(VIEWS, views))
        text = cast(TextEncoder, self.encoder(b, "text"))
        modality = self.encoder(a, "image", "audio", "video").modality
        if getattr(self.encoder(fusion), "kind", None) != "cross":
            raise RecipeError(
                f"captioning needs a fusion in which text attends to '{a}', and '{fusion}' is none; "
                f"for instance {fusion}: {{model: transformers/bert, reads: [{a}, {b}]}}"
            )
        if self.sides["a"].crop != Crop() and modality != "image":
            raise RecipeError(f"captioning: views crop images, and the encoder '{a}' reads {modality}")
        with torch.device("cpu"):  # also where a network without memory is built
            ids, mask = text.tokenizer("", 3)
        if mask.sum() != 2:
            raise RecipeError(
                f"captioning needs a start and an end token around each text, and the tokenizer of '{b}' sets none; "
                "take another, or train:8000 for one made from the texts"
            )
        self.start, self.end = ids[mask].tolist()
        self.fusion, self.smoothing, self.blind = fusion, smoothing, blind
        self.tokenizer, self.tokens = text.tokenizer, len(text.token_embedding)
        self.head = TiedHead(self.encoder(fusion).dim, text)
        self.unigram = Unigram(self.tokens, self.tokens)
        prove_causal(text, b, "captioning")
        prove_fusion_causal(self.encoder(fusion), fusion, (self.encoder(a).dim, text.dim), "captioning")

    def chance(self, rows: int) -> Chance:
        """Any token of the embedding table, equally likely; the relative error of knowing how frequent each is."""
        return Chance(math.log(self.tokens), {"accuracy": 1 / self.tokens, "relative_error": 1.0})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Both sides, images cropped where asked for: `a`, `b` (B, L), and which of them is valid; see `Side`.

        And the number of next tokens, `caption_tokens`, and how much their frequencies alone do not tell of them,
        `unigram_surprise`.
        """
        inputs = self.read(batch, draws)
        target, valid = self._next(inputs)
        self.unigram.see(target, valid)
        surprise = (self.unigram.surprise(target) * valid).sum()
        return inputs | {"caption_tokens": valid.sum(), "unigram_surprise": surprise}

    def _next(self, inputs: Batch) -> tuple[Tensor, Tensor]:
        """Next tokens (B, L - 1), and where there is one, bool."""
        return inputs["b"][:, 1:], self.sides["b"].valid(inputs)[:, 1:]

    def predict(self, inputs: Batch) -> Batch:
        """Of each next token (B, L - 1) its `log_likelihood_ratio`, and whether it was `right`; see `score_tokens`."""
        return score_tokens(self.logits(inputs), *self._next(inputs), self.smoothing)

    def logits(self, inputs: Batch) -> Tensor:
        """Of all N valid next tokens, row by row, (N, V)."""
        return self._logits(self.sides["a"].features(inputs), inputs)

    def _logits(self, seen: Features, inputs: Batch) -> Tensor:
        # The tower reads the whole text, and not all but its last token, so that other tasks can share the pass.
        text = self.sides["b"]
        hidden = self.encoder(self.fusion)(seen, text.features(inputs), causal=True).b[:, :-1]
        logits: Tensor = self.head(hidden[self._next(inputs)[1]], text.encoder)
        return logits

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy, means over the next tokens of the global batch, and the relative error."""
        unigram = inputs["unigram_surprise"]
        return token_losses(outputs, self.tokens, self._next(inputs)[1], inputs["caption_tokens"], unigram)

    def after_step(self, progress: float) -> None:
        """Count the step's tokens."""
        self.unigram.update()

    def before_step(self, step: Step) -> None:
        """Every `blind` steps `loss_over_blind`; see `_loss_over_blind`."""
        if self.blind:
            step.need_whole_weights("objective.blind")
            if (step.number + 1) % self.blind == 0 and step.inputs:
                step.log({"loss_over_blind": average(self._loss_over_blind(step.inputs))})

    @torch.no_grad()
    def _loss_over_blind(self, inputs: Batch) -> Tensor:
        """The loss over that with the `a` of the row before, of at most 64 rows a process, without dropout."""
        rows = {key: value[:BLIND_ROWS] for key, value in inputs.items() if value.ndim}
        a, b = self.sides.values()
        with evaluating(a.encoder, b.encoder, self.encoder(self.fusion)):
            seen, (target, valid) = a.features(rows), self._next(rows)
            rolled = {name: getattr(seen, name).roll(1, 0) for name in ("tokens", "pooled")}
            other = seen._replace(**rolled, valid=None if seen.valid is None else seen.valid.roll(1, 0))
            own, blind = (F.cross_entropy(self._logits(side, rows), target[valid]) for side in (seen, other))
        return own / blind

    @torch.no_grad()
    def generate(self, inputs: Batch, length: int) -> Tensor:
        """The likeliest next token again and again; call it in evaluation mode.

        Args:
            inputs: `a` as its encoder reads it, B rows, and `a_valid` where some of it is padding.
            length: number of ids L, start and end included.

        Returns:
            Ids int64 (B, L), padded after the end token.
        """
        seen, text, fusion = self.sides["a"].features(inputs), self.sides["b"].encoder, self.encoder(self.fusion)
        ids = torch.full((len(seen.pooled), 1), self.start, device=seen.pooled.device)
        for _ in range(length - 1):
            new = self.head(fusion(seen, text(ids), causal=True).b[:, -1], text).argmax(-1)
            ended = (ids == self.end).any(1)
            ids = torch.cat([ids, torch.where(ended, self.tokenizer.pad_id, new)[:, None]], 1)
        return ids

    def concealed(self, inputs: Batch) -> Concealed:
        """Of each next token itself and all after it."""
        return Concealed(self.logits, later=Later.of("b", self._next(inputs)[1], first=1))

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What is seen, its caption, and the one that the network writes."""
        a, b = self.sides.values()
        written = []
        for row in self.generate(inputs, inputs["b"].shape[1]).tolist():
            written.append(self.tokenizer.decode(row[: row.index(self.end)] if self.end in row else row))
        return [
            Panel(a.name, a.cells(inputs), scale=a.scale(inputs)),
            Panel("caption", b.cells(inputs)),
            Panel("generated", written),
        ]
