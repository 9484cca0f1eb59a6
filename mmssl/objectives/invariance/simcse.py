"""SimCSE: which two readings of a sentence, each with a dropout mask of its own, are of the same one?

Gao, Yao & Chen 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", arXiv 2104.08821, the unsupervised
form. A text is handed to the encoder twice and nothing of it is changed: the network's own dropout makes the two views,
and every cut or deletion of words that the paper tries in its place is worse. The first reading of each row finds its
second among the second readings of the whole global batch.

The projection is Linear and tanh on the pooled vector, and is left out afterwards. The paper pools the start token
(`pool: first`), starts from BERT or RoBERTa (`pretrained`), and trains one epoch of a million sentences in batches of
64 with a rate of 3e-5; dropout is theirs, 0.1.

Known traps. Without dropout both views are one vector and the loss teaches nothing about a text, so an encoder without
any is refused; in evaluation mode they are one, too, and the accuracy says nothing. It is one direction and N
candidates, where SimCLR has both and 2N - 1. Both readings need one pass with a mask a row: masks that the rows of a
batch share give no views. A sentence that is in a batch twice is its own negative, as in the published code. Both
readings share every word, so that the accuracy is near 1 from the start and says little: see
`monitor/.../uniformity`, and probe. Too many steps make it worse: the published code keeps the best of its checkpoints
on labeled pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.side import Side
from mmssl.modules.teacher import has_dropout
from mmssl.modules.views import Crop
from mmssl.objectives.base import EMBEDDINGS, Chance, Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.losses import spread
from mmssl.ops.pairs import info_nce
from mmssl.ranges import Temperature


class SimCSE(Objective):
    """Contrast two readings of a text with those of all other rows.

    Args:
        encoders: holds the encoder, which has to drop something in training.
        encoder: its name.
        temperature: divides the cosine similarity.
    """

    meets = "loss"
    needs = ("text",)

    def __init__(
        self, encoders: Mapping[str, Encoder], *, encoder: str = "text", temperature: Temperature = 0.05
    ) -> None:
        super().__init__(encoders)
        self.side = Side("a", encoder, self.encoder(encoder, "text"), Crop())
        if self.side.encoder.frozen or not has_dropout(self.side.encoder):
            raise RecipeError(
                f"simcse: dropout makes the two views, and the encoder '{encoder}' has none in training; give it some, "
                "for instance hidden_dropout_prob: 0.1 of transformers/bert"
            )
        dim = self.side.encoder.dim
        self.temperature = temperature
        self.projection = nn.Sequential(nn.Linear(dim, dim), nn.Tanh())

    def chance(self, rows: int) -> Chance:
        """One partner among the N second readings."""
        return Chance(math.log(rows), {"accuracy": 1 / rows})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """The texts as they are: `a` int64 (B, L), and `a_valid` where some of it is padding."""
        return self.side.read(batch, draws)

    def predict(self, inputs: Batch) -> Batch:
        """`z` (B, 2, D), unit vectors of both readings."""
        return {"z": self.compared(self.read_twice(inputs))}

    def read_twice(self, inputs: Batch) -> Tensor:
        """Pooled vectors (B, 2, D) of one pass, each reading with its own dropout mask."""
        twice = {key: value.repeat_interleave(2, dim=0) for key, value in inputs.items()}
        return self.side.features(twice).pooled.unflatten(0, (-1, 2))

    def compared(self, pooled: Tensor) -> Tensor:
        """Pooled vectors (B, 2, D) -> unit vectors (B, 2, D)."""
        return F.normalize(self.projection(pooled), dim=-1)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy of equation 4 over the global batch; accuracy: how often the second reading is the nearest."""
        first, second = outputs["z"].unbind(1)
        scale = first.new_full((), 1 / self.temperature)
        loss, accuracy, _ = info_nce(first, second, scale, back=False)
        return {"loss": loss, "accuracy": accuracy, "spread": spread(outputs["z"])}

    def drawn_together(self, inputs: Batch) -> dict[str, Tensor]:
        """Both readings."""
        pooled = self.read_twice(inputs)
        return {self.side.name: pooled, EMBEDDINGS: self.compared(pooled)}

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Each text, and the nearest other one: without dropout its own second reading is itself."""
        first, second = outputs["z"].unbind(1)
        other = (first @ second.T).fill_diagonal_(-math.inf).argmax(1)
        texts = self.side.cells(inputs)
        return [Panel(self.side.name, texts), Panel("nearest other", [texts[int(row)] for row in other])]
