"""Masked pairs: what was hidden of this image or clip and of its caption, given what is left of both?

Form `flava`: Singh et al. 2022, "FLAVA", arXiv 2112.04482, masked multimodal modeling: 75 of 14 x 14 patches, in
blocks as in BEiT (arXiv 2106.08254), and 15 % of the words are hidden together; a fusion reads both sides, and each
hidden place is classified, a word over the vocabulary, a patch over a codebook. Form `beit3`: Wang et al. 2022, "Image
as a Foreign Language", arXiv 2208.10442, masked data modeling: 40 % of the patches and, with an image, half of the
words. One side alone (`b: null` or `a: null`) is masked image or text modeling, through a multiway fusion or, of
images, without one; a side with ratio 0 is seen whole: `mask_ratio_a: 0` is the masked language model of ALBEF (arXiv
2107.07651), whose text layers read the image. Form `videobert`: Sun et al. 2019, "VideoBERT", arXiv 1904.01766: 15 %
of the video tokens, codes of a hierarchical k-means of 4 levels of 12 (`codes: [12, 12, 12, 12]`), and 15 % of the
words. Its third loss, linguistic-visual alignment, is `matching` with uniform negatives over the same fusion, in a
`combine`; see the recipe videobert_toy. There a video token is what a frozen S3D says of 1.5 s, here it is a tubelet of
the pixels that the encoder reads.

The codebook is learned here, before the first step, in place of the published image tokenizers (DALL-E's dVAE in FLAVA,
BEiT v2's in BEiT-3): k-means on patches of pixels as the network sees them. Its codes say color and edges, no more. The
heads are FLAVA's; that of words is tied to the embedding of the text encoder. The number of hidden words and the
80/10/10 rule are those of masked_language. FLAVA leaves mismatched pairs out of this loss; here `matching` makes its
mismatches itself, so that all pairs are true ones.

Known traps. The codes of blank patches are far more frequent than others: the level to beat is not 1 / K but the
histogram, of codes and of words, which is counted before the first step; `relative_error` (chance 1) is each side's
loss over that of the histogram. Where half of the words are hidden the image has to say which they were; 15 % are often
told by the words around them. A tubelet looks like the one before it: of clips the same places are hidden in all
frames, as in VideoMAE (arXiv 2203.12602), and not a span of time, where the last frame before it would be the answer.
Each side's loss is a mean over its hidden places in the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import torch
from annotated_types import Ge, Lt, MinLen
from torch import Tensor

from mmssl.batch import Batch, prefixed, sub_batch
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.modules.side import SIDES, Side, find_fusion
from mmssl.modules.views import Crop
from mmssl.objectives._concealed import Concealed
from mmssl.objectives.base import Chance, Objective, Panel, Step
from mmssl.objectives.reconstruction._hidden import HiddenPatches, HiddenWords, learn
from mmssl.ops.draws import Draws
from mmssl.ops.losses import score_tokens
from mmssl.ops.masking import KEPT

PATCHES = {"flava": 75 / 196, "beit3": 0.4, "videobert": 0.15}
WORDS = {"flava": (0.15, 0.15), "beit3": (0.5, 0.15), "videobert": (0.15, 0.15)}  # in a pair, alone
VIEWS = {"area": (0.9, 1.0)}
Children = Annotated[int, Ge(2)]


class MaskedPair(Objective):
    """Predict the hidden places of both sides from the fusion of what is left.

    Args:
        encoders: holds the encoders and the fusion.
        a: name of the encoder of images, clips or sound, a network of patches; null for text alone.
        b: name of the text encoder; null for `a` alone.
        fusion: name of the fusion that reads them; null for `a` alone without one.
        form: `flava`, `beit3` or `videobert`: whose ratios.
        mask_ratio_a: share of the patches that is hidden; the form's where left out, 0 for none.
        mask_ratio_b: share of a text's tokens that is predicted, likewise.
        codes: entries of the codebook, K; or of a tree of clusters of clusters the children of a node, level by level,
            whose product K is.
        views: of images and clips: how they are cropped, see `Crop`.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        a: str | None = "image",
        b: str | None = "text",
        fusion: str | None = "fusion",
        form: Literal["flava", "beit3", "videobert"] = "flava",
        mask_ratio_a: Annotated[float, Ge(0), Lt(1)] | None = None,
        mask_ratio_b: Annotated[float, Ge(0), Lt(1)] | None = None,
        codes: Children | Annotated[tuple[Children, ...], MinLen(1)] = 8192,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders)
        self.fusion = fusion
        crop = Crop.of(VIEWS, views)
        self.sides = {k: Side(k, n, self.encoder(n), crop) for k, n in zip(SIDES, (a, b), strict=True) if n is not None}
        self.needs = tuple(dict.fromkeys(side.modality for side in self.sides.values()))
        if mask_ratio_a is None:
            mask_ratio_a = PATCHES[form] if a is not None else 0.0
        if mask_ratio_b is None:
            mask_ratio_b = WORDS[form][len(self.sides) == 1] if b is not None else 0.0
        if (mask_ratio_a == 0 or a is None) and (mask_ratio_b == 0 or b is None):
            raise RecipeError("masked_pair hides nothing; give it a side, a or b, whose mask_ratio is above 0")
        self.mask_ratio = {"a": mask_ratio_a, "b": mask_ratio_b}
        self._check_fusion(a, b)
        self.patches: HiddenPatches | None = None
        self.words: HiddenWords | None = None
        if a is not None and mask_ratio_a:
            self.patches = HiddenPatches(self.encoder(a), self.encoder(fusion or a).dim, codes)
        if b is not None and mask_ratio_b:
            text = cast(TextEncoder, self.encoder(b, "text"))
            self.words = HiddenWords(text, b, self.encoder(fusion or b).dim)
        self.divisors = tuple(f"{key}/{name}" for key, head in self.heads.items() for name in head.divisors)

    def _check_fusion(self, a: str | None, b: str | None) -> None:
        if self.fusion is None:
            if a is None or b is not None:
                raise RecipeError(
                    "masked_pair: without a fusion only patches can be hidden, with b: null; for text alone take "
                    "masked_language"
                )
            return
        both = find_fusion("masked_pair", self.fusion, self.encoder(self.fusion), a, b)
        if both.kind != "multiway" and (a is None or b is None):
            raise RecipeError(
                f"masked_pair: a {both.kind} fusion reads pairs; for one side alone take a multiway one (a timm vision "
                "transformer), or for images fusion: null"
            )
        if both.kind == "cross" and self.mask_ratio["a"]:
            raise RecipeError("masked_pair: a cross fusion says nothing of a; set mask_ratio_a: 0, or take another")

    @property
    def heads(self) -> dict[str, HiddenPatches | HiddenWords]:
        """`a` or `b` -> the head of a side of which something is hidden."""
        return {key: head for key, head in (("a", self.patches), ("b", self.words)) if head is not None}

    def chance(self, rows: int) -> Chance:
        """Of the loss any code and any token, equally likely; of the others the histogram that was counted."""
        metrics: dict[str, float] = {}
        for key, head in self.heads.items():
            levels = {"loss": math.log(head.classes), "accuracy": 1 / head.classes, "relative_error": 1.0}
            levels |= {"relative_mistakes": 1.0} if key == "a" else {}
            metrics |= {f"{self.sides[key].name}/{metric}": level for metric, level in levels.items()}
        return Chance(sum(math.log(head.classes) for head in self.heads.values()), metrics)

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        """Before the first, learn the codebook, and count codes and words, on as many batches as that takes.

        What another task has lent has learned already.
        """
        if step.number:
            return
        patches = None if self.patches is None or self.patches.codebook.counts.any() else self.patches
        words = None if self.words is None or self.words.unigram.counts.any() else self.words
        if patches is not None or words is not None:
            learn(patches, words, self.sides.get("a"), step.data())

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Of each side what its encoder reads, `a` and `a_valid`; of what is hidden `a/...`: see `HiddenPatches`."""
        inputs: Batch = {}
        for key, side in self.sides.items():
            head = self.heads.get(key)
            inputs |= side.read(batch, draws) if head is None else head.hide(side, batch, draws, self.mask_ratio[key])
        return inputs

    def predict(self, inputs: Batch) -> Batch:
        """Of each hidden place (B, M) of a side `a/log_likelihood_ratio` and `a/right`; see `score_tokens`."""
        outputs: Batch = {}
        for key, logits in self.logits(inputs).items():
            outputs |= prefixed(key, score_tokens(logits, inputs[f"{key}/target"], inputs[f"{key}/chosen"]))
        return outputs

    def logits(self, inputs: Batch) -> dict[str, Tensor]:
        """Of all hidden places of a side, row by row: `a` (N, K), `b` (N, V)."""
        features = {key: side.features(inputs) for key, side in self.sides.items() if key == "b" or not self.patches}
        if self.patches is not None:
            network = self.sides["a"].encoder
            tokens = network.embed(inputs["a"], inputs["a/hidden"], self.patches.mask_token)
            features["a"] = network.encode(tokens, inputs.get("a_valid"))
        if self.fusion is not None:
            a, b, _ = self.encoder(self.fusion)(features.get("a"), features.get("b"))
        else:
            a, b = features["a"].tokens, None
        logits: dict[str, Tensor] = {}
        if self.patches is not None:
            logits["a"] = self.patches(a, sub_batch(inputs, "a"))
        if self.words is not None:
            logits["b"] = self.words(b, sub_batch(inputs, "b"), self.sides["b"].encoder)
        return logits

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The sum of both sides' losses; each, and its other scores, sub_batch the name of its encoder."""
        scores = {key: head.scores(sub_batch(outputs, key), sub_batch(inputs, key)) for key, head in self.heads.items()}
        logs: dict[str, Tensor] = {}
        for key, own in scores.items():
            logs |= prefixed(self.sides[key].name, own)
        return {"loss": torch.stack([own["loss"] for own in scores.values()]).sum(), **logs}

    def concealed(self, inputs: Batch) -> Concealed:
        """Hidden patches and the chosen tokens, a tenth of which stays in the text, and what is made of both."""
        hidden = {f"{key}/target": torch.ones_like(inputs[f"{key}/target"], dtype=torch.bool) for key in self.heads}
        shown = None
        if self.patches is not None:
            hidden["a"] = self.patches.covered(inputs["a"], inputs["a/hidden"])
        if self.words is not None:
            target, seen = inputs["b/target"], inputs["b"].gather(1, inputs["b/places"])
            shown = (seen == target)[inputs["b/chosen"]]

        def answers(inputs: Batch) -> Tensor:
            return torch.cat([logits.flatten() for logits in self.logits(inputs).values()])

        return Concealed(answers, hidden, shown, allowed=KEPT if self.words is not None else 0.0)

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Of each side what is seen, what the network makes of it, and what was there."""
        panels: list[Panel] = []
        logits = self.logits(inputs)
        for key, side in self.sides.items():
            if key in self.heads:
                made = self.heads[key].panels(side, inputs, logits[key])
                panels += [panel._replace(title=f"{side.name}: {panel.title}") for panel in made]
            else:
                panels.append(Panel(side.name, side.cells(inputs), scale=side.scale(inputs)))
        return panels
