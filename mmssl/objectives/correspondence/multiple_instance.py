"""Multiple instances: which of these clips do the sentences around this moment belong to?

Miech, Alayrac, Smaira, Laptev, Sivic & Zisserman 2020, "End-to-End Learning of Visual Representations from Uncurated
Instructional Videos", arXiv 1912.06430 (MIL-NCE): people talk of what they do before or after they do it. So a clip
has several candidates, sentences that are neighbors in time, of which at least one should fit, and the sum over them
is compared with all other clips and sentences of the global batch. The candidates are the sentences of the row's text,
which may be a list of them, a window of them where there are more, and over again from the first one where there are
fewer.

Form `published`: in the authors' code each positive is in the denominator twice, so that the loss is ln 2 at least.
Form `paper`: once, as in equation 1, and 0 at least. Neither divides by a temperature or makes unit vectors;
`normalize` and `temperature` do.

Known traps. With one candidate it is not the symmetric loss of CLIP: both directions are in one sum. The published code
multiplies a mask into scores, so that an infinite one becomes NaN, and its gradient over several processes is the local
part alone. A sentence that two rows share is a negative of itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch, valid_tokens
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop
from mmssl.modules.vocabulary import decode_rows
from mmssl.objectives._two_sides import TwoSides
from mmssl.objectives.base import Chance, Pair, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.pairs import multiple_instance_nce
from mmssl.ranges import Positive, Temperature, Width

VIEWS = {"area": (0.9, 1.0)}


class MultipleInstance(TwoSides):
    """Match clips with several candidate sentences each.

    Args:
        encoders: holds both encoders.
        a: name of the encoder of clips, or of pictures or sound.
        b: name of the text encoder.
        form: `published`, or `paper`.
        candidates: sentences a row, K.
        length: tokens of a sentence, those at its start and end that every text has among them; the rest is left out.
        width: of the shared space.
        normalize: whether vectors are set to unit length before they are compared.
        temperature: divides their inner product.
        views: of images and clips: how they are cropped, see `Crop`.
    """

    meets = "loss"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        a: str = "video",
        b: str = "text",
        form: Literal["published", "paper"] = "published",
        candidates: Positive = 5,
        length: Positive = 24,
        width: Width = 512,
        normalize: bool = False,
        temperature: Temperature = 1.0,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders, a, b, Crop.of(VIEWS, views))
        text = cast(TextEncoder, self.encoder(b, "text"))
        if self.encoder(a).modality == "text":
            raise RecipeError(f"multiple_instance: a = '{a}' reads texts as b does; it should read clips")
        self.tokenizer = text.tokenizer
        self.needs = (*self.needs, "text_sentence")
        self.form, self.candidates, self.length = form, candidates, length
        self.normalize, self.temperature = normalize, temperature
        self.project_a = nn.Linear(self.encoder(a).dim, width, bias=False)
        self.project_b = nn.Linear(text.dim, width, bias=False)

    def chance(self, rows: int) -> Chance:
        """One row among B."""
        loss = math.log(2 * rows if self.form == "published" else 2 * rows - 1)
        return Chance(loss, dict.fromkeys(self.accuracies, 1 / rows))

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`a`, see `Side`; `b` and `b_valid` (B, K, length), each candidate between the tokens that every text has."""
        inputs = self.sides["a"].read(batch, draws)
        text, sentence, mask = batch["text"], batch["text_sentence"], valid_tokens(batch)
        number = (sentence.masked_fill(~mask, -1).amax(1) + 1).clamp(min=1)
        start = (draws.uniform() * (number - self.candidates + 1).clamp(min=1)).long()
        chosen = (start[:, None] + torch.arange(self.candidates, device=text.device)) % number[:, None]
        # Special tokens are of no sentence.
        kept = mask[:, None] & ((sentence[:, None] == chosen[:, :, None]) | (sentence < 0)[:, None])
        place = (~kept).to(torch.uint8).argsort(dim=2, stable=True)[:, :, : self.length]
        valid = kept.gather(2, place)
        words = text[:, None].expand_as(kept).gather(2, place)
        return inputs | {"b": words.masked_fill(~valid, self.tokenizer.pad_id), "b_valid": valid}

    def predict(self, inputs: Batch) -> Batch:
        """`a` (B, width) and `b` (B, K, width)."""
        seen = self.project_a(self.sides["a"].features(inputs).pooled)
        words, valid = inputs["b"].flatten(0, 1), inputs["b_valid"].flatten(0, 1)
        read = self.project_b(self.sides["b"].encoder(words, valid).pooled).unflatten(0, (-1, self.candidates))
        return (
            {"a": F.normalize(seen, dim=-1), "b": F.normalize(read, dim=-1)}
            if self.normalize
            else {"a": seen, "b": read}
        )

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Clips and sentences, by the cosine, whether training made unit vectors or not."""
        embed = partial(self.embed, "a"), partial(self.embed, "b")
        return (Pair(self.a, self.b, embed=embed, project=(self.project_a, self.project_b)),)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """See `multiple_instance_nce`."""
        loss, *accuracies = multiple_instance_nce(
            outputs["a"], outputs["b"], 1 / self.temperature, twice=self.form == "published"
        )
        return {"loss": loss, **dict(zip(self.accuracies, accuracies, strict=True))}

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What is seen, its candidates, and which one of all candidates shown is nearest."""
        texts = [decode_rows(self.tokenizer, *row) for row in zip(inputs["b"], inputs["b_valid"], strict=True)]
        best = (outputs["a"] @ outputs["b"].flatten(0, 1).T).argmax(1).tolist()
        side, number = self.sides["a"], self.candidates
        return [
            Panel(self.a, side.cells(inputs), scale=side.scale(inputs)),
            Panel("candidates", [" | ".join(row) for row in texts]),
            Panel(
                "nearest",
                [texts[i // number][i % number] for i in best],
                [texts[i // number][i % number] in texts[row] for row, i in enumerate(best)],
            ),
        ]
