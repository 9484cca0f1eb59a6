"""Captioning: what does the text say about what is seen, word by word?

Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models", arXiv 2205.01917, section 3.2, equation
(3): a causal text tower, above it layers that also attend to the tokens of `a`, and the cross-entropy of each next
token; with `contrastive` beside it, weights 1 and 2, one pass of both towers serves both (`combine`). Li et al. 2022,
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
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features
from mmssl.encoders.fusion import FusionEncoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.objectives._causal import PROOF_TOKENS, evaluating, leaks, prove_causal
from mmssl.objectives.base import Chance, Objective, Panel, Step
from mmssl.ops.augment import random_crop
from mmssl.ops.draws import Draws
from mmssl.ops.gather import average
from mmssl.ops.losses import mean_over, token_gains
from mmssl.ops.unigram import Unigram

BLIND_ROWS = 64  # of each process: enough for a ratio, little against a step


class Captioning(Objective):
    """Predict each token of `b` from those before it and from `a`.

    Args:
        encoders: holds the three networks.
        a: name of the encoder of what is described.
        b: name of the text encoder, which must be causal.
        fusion: name of the fusion, of kind `cross`, that reads `a` and `b`.
        smoothing: share of the target that is spread over all tokens; 0.1 in BLIP.
        area: smallest and largest share of an image that its random square crop covers; None for the whole image.
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
        smoothing: float = 0.0,
        area: tuple[float, float] | None = None,
        blind: int = 0,
    ) -> None:
        super().__init__(encoders)
        text = cast(TextEncoder, self.encoder(b))
        self.modality = self.encoder(a).modality
        if text.modality != "text":
            raise RecipeError(f"captioning predicts text, and the encoder '{b}' reads {text.modality}")
        if self.modality in ("text", "fusion"):
            raise RecipeError(f"captioning describes what is no text, and the encoder '{a}' reads {self.modality}")
        if getattr(self.encoder(fusion), "kind", None) != "cross":
            raise RecipeError(
                f"captioning needs a fusion in which text attends to '{a}', and '{fusion}' is none; "
                f"for instance {fusion}: {{model: transformers/bert, reads: [{a}, {b}]}}"
            )
        if not 0 <= smoothing < 1:
            raise RecipeError(f"captioning: smoothing = {smoothing} should be a share from 0 to below 1")
        if area is not None and self.modality != "image":
            raise RecipeError(f"captioning: area crops images, and the encoder '{a}' reads {self.modality}")
        if blind < 0:
            raise RecipeError(f"captioning: blind = {blind} should be a number of steps, or 0 for never")
        with torch.device("cpu"):  # also where a network without memory is built
            ids, mask = text.tokenizer("", 3)
        if mask.sum() != 2:
            raise RecipeError(
                f"captioning needs a start and an end token around each text, and the tokenizer of '{b}' sets none; "
                "take another, or train:8000 for one made from the texts"
            )
        self.start, self.end = ids[mask].tolist()
        self.a, self.b, self.fusion, self.area, self.blind = a, b, fusion, area, blind
        self.smoothing, self.tokenizer = smoothing, text.tokenizer
        self.needs = (self.modality, "text")
        self.tokens, width = text.token_embedding.shape
        fused = self.encoder(fusion).dim
        self.head = nn.Sequential(nn.Linear(fused, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(self.tokens))
        self.unigram = Unigram(self.tokens, self.tokens)
        prove_causal(text, b, "captioning")
        self._prove_fusion_causal()

    def chance(self, rows: int) -> Chance:
        """Any token of the embedding table, equally likely; the relative error of knowing how frequent each is."""
        return Chance(math.log(self.tokens), {"accuracy": 1 / self.tokens, "relative_error": 1.0})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Both sides as they are, images cropped where asked for: `a`, `b` (B, L), their masks.

        And the number of next tokens, `caption_tokens`, and how much their frequencies alone do not tell of them,
        `unigram_surprise`.
        """
        seen = batch[self.modality]
        inputs = {"a": seen if self.area is None else random_crop(seen, draws, self.area), "b": batch["text"]}
        for side, key in (("a", f"{self.modality}_mask"), ("b", "text_mask")):
            if key in batch:
                inputs[f"{side}_mask"] = batch[key]
        valid, target = _next_valid(inputs), inputs["b"][:, 1:]
        self.unigram.see(target[valid])
        return inputs | {
            "caption_tokens": valid.sum(),
            "unigram_surprise": (self.unigram.surprise(target) * valid).sum(),
        }

    def predict(self, inputs: Batch) -> Batch:
        """Of each next token (B, L - 1): `gain`, nats better than a guess among all, and whether it was `right`.

        `gain_unsmoothed` is the gain without label smoothing. See `token_gains`.
        """
        logits, target, valid = self.logits(inputs), inputs["b"][:, 1:], _next_valid(inputs)
        gain, right = token_gains(logits, target, valid, self.smoothing)
        plain, _ = token_gains(logits.detach(), target, valid) if self.smoothing else (gain.detach(), None)
        return {"gain": gain, "gain_unsmoothed": plain, "right": right}

    def logits(self, inputs: Batch) -> Tensor:
        """Of all N valid next tokens, row by row, (N, V)."""
        # The tower reads the whole text, and not all but its last token, so that other tasks can share the pass.
        hidden = self._read(self._see(inputs), inputs["b"], inputs.get("b_mask"))
        return self._say(hidden[:, :-1][_next_valid(inputs)])

    def _see(self, inputs: Batch) -> Features:
        features: Features = self.encoder(self.a)(inputs["a"], inputs.get("a_mask"))
        return features

    def _read(self, seen: Features, ids: Tensor, mask: Tensor | None) -> Tensor:
        fusion = cast(FusionEncoder, self.encoder(self.fusion))
        return fusion(seen, self.encoder(self.b)(ids, mask), causal=True).b

    def _say(self, hidden: Tensor) -> Tensor:
        return F.linear(self.head(hidden), cast(TextEncoder, self.encoder(self.b)).token_embedding, self.bias)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy, means over the next tokens of the global batch, and the relative error."""
        valid, count, guess = _next_valid(inputs), inputs["caption_tokens"], math.log(self.tokens)
        surprise = guess - outputs["gain_unsmoothed"].detach()
        return {
            "loss": mean_over(guess - outputs["gain"], valid, count),
            "accuracy": mean_over(outputs["right"], valid, count),
            "relative_error": mean_over(surprise, valid, inputs["unigram_surprise"]),
        }

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
        with evaluating(*(self.encoder(name) for name in (self.a, self.b, self.fusion))):
            seen, valid = self._see(rows), _next_valid(rows)
            other = Features(
                seen.tokens.roll(1, 0),
                seen.pooled.roll(1, 0),
                seen.grid,
                None if seen.valid is None else seen.valid.roll(1, 0),
            )
            own, blind = (
                F.cross_entropy(
                    self._say(self._read(side, rows["b"], rows.get("b_mask"))[:, :-1][valid]), rows["b"][:, 1:][valid]
                )
                for side in (seen, other)
            )
        return own / blind

    @torch.no_grad()
    def generate(self, a: Tensor, a_mask: Tensor | None = None, *, length: int) -> Tensor:
        """The likeliest next token again and again; call it in evaluation mode.

        Args:
            a: as the encoder `a` reads it, B rows.
            a_mask: its mask.
            length: number of ids L, start and end included.

        Returns:
            Ids int64 (B, L), padded behind the end token.
        """
        seen = self.encoder(self.a)(a, a_mask)
        ids = torch.full((len(a), 1), self.start, device=a.device)
        for _ in range(length - 1):
            new = self._say(self._read(seen, ids, None)[:, -1]).argmax(-1)
            ended = (ids == self.end).any(1)
            ids = torch.cat([ids, torch.where(ended, self.tokenizer.pad_id, new)[:, None]], 1)
        return ids

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What is seen, its caption, and the one that the network writes."""
        seen, ids = inputs["a"], inputs["b"]
        captions = [self.tokenizer.decode(row[mask]) for row, mask in zip(ids, _valid(inputs), strict=True)]
        cells: list[Tensor | str] = list(seen / 255 if seen.dtype == torch.uint8 else seen)
        written: list[Tensor | str] = []
        for row in self.generate(seen, inputs.get("a_mask"), length=ids.shape[1]).tolist():
            written.append(self.tokenizer.decode(row[: row.index(self.end)] if self.end in row else row))
        return [Panel(self.a, cells), Panel("caption", list[Tensor | str](captions)), Panel("generated", written)]

    def _prove_fusion_causal(self) -> None:
        """Raise RecipeError where what the fusion makes of a token has a gradient on a later one."""
        fusion, text = cast(FusionEncoder, self.encoder(self.fusion)), self.encoder(self.b)
        like = next(fusion.parameters())
        if like.is_meta:
            return
        with torch.enable_grad(), evaluating(fusion):
            a, b = (
                torch.linspace(-1, 1, rows * width, device=like.device, dtype=like.dtype).sin().view(1, rows, width)
                for rows, width in ((3, self.encoder(self.a).dim), (PROOF_TOKENS, text.dim))
            )
            b.requires_grad_()
            sides = [Features(tokens, tokens.mean(1), tokens.shape[1:2]) for tokens in (a, b)]
            leaking = leaks(fusion(*sides, causal=True).b[0], b, torch.arange(PROOF_TOKENS, device=like.device))
        if leaking:
            raise RecipeError(
                f"captioning: the fusion '{self.fusion}' lets a token see later ones though it is told not to, so that "
                "the answer stands in the question; take {model: transformers/bert}"
            )


def _valid(inputs: Batch) -> Tensor:
    return inputs.get("b_mask", torch.ones_like(inputs["b"], dtype=torch.bool))


def _next_valid(inputs: Batch) -> Tensor:
    """Where there is a next token to predict, bool (B, L - 1)."""
    return _valid(inputs)[:, 1:]
