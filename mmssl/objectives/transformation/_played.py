"""What tasks have in common that play a sound in several ways and tell these apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over
from mmssl.ops.moments import SILENT, audible

EDGE = 0.85  # of the lowest speed at which a sound is read, where the filter cuts
LEVEL = 0.1  # root mean square of every window


class Played(Objective):
    """Classify in which of K ways a sound is played; as in rotation a row is heard in each of them.

    Args:
        encoders: holds the audio encoder.
        encoder: its name.
        kind: of the ways, for previews.
        ways: their names.
    """

    needs = ("audio",)
    divisors = ("scored_rows",)

    def __init__(self, encoders: Mapping[str, Encoder], encoder: str, kind: str, ways: Sequence[str]) -> None:
        super().__init__(encoders)
        self.name, self.kind, self.ways = encoder, kind, tuple(ways)
        self.head = nn.Linear(self.encoder(encoder, "audio").dim, len(ways))

    def chance(self, rows: int) -> Chance:
        """Any way."""
        return Chance(math.log(len(self.ways)), {"accuracy": 1 / len(self.ways)})

    def inputs_of(self, windows: Tensor, scored: Tensor) -> Batch:
        """Windows (B, K, s) as loud as each other, and which rows count, (B,).

        A short sound is left out, and one of which a window is silent: there is nothing to be told in it.
        """
        power = windows.square().mean(2, keepdim=True).sqrt()
        scored = scored & audible(windows).all(1)
        return {
            "audio": windows * (LEVEL / power.clamp(min=SILENT)),
            "scored": scored,
            "scored_rows": scored.sum(),
        }

    def predict(self, inputs: Batch) -> Batch:
        """`logits` (B, K windows, K ways)."""
        pooled = self.encoder(self.name)(inputs["audio"].flatten(0, 1)).pooled
        return {"logits": self.head(pooled).unflatten(0, (-1, len(self.ways)))}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and accuracy over all windows of the rows that count; `valid`, their share."""
        logits, scored, count = outputs["logits"], inputs["scored"][:, None], inputs["scored_rows"]
        number = logits.shape[1]
        way = torch.arange(number, device=logits.device).expand(len(logits), -1)
        errors = F.cross_entropy(logits.mT, way, reduction="none")
        right = (logits.argmax(2) == way).to(logits.dtype)
        return {
            "loss": mean_over(errors, scored, count * number),
            "accuracy": mean_over(right, scored, count * number),
            "valid": scored.to(logits.dtype).mean(),
        }

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The sound played in each way, and what the network takes each for."""
        scale = self.encoder(self.name).scale(inputs["audio"][0, 0])
        sounds = [
            Panel(f"{self.kind} {way}", list(inputs["audio"][:, k]), scale=scale) for k, way in enumerate(self.ways)
        ]
        guesses = [
            "  ".join(f"{'✓' if k == right else '✗'} {self.ways[k]}" for right, k in enumerate(row))
            if counts
            else "does not count"
            for row, counts in zip(outputs["logits"].argmax(-1).tolist(), inputs["scored"].tolist(), strict=True)
        ]
        return [*sounds, Panel("prediction", guesses)]


def draw_start(batch: Batch, span: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """Where to begin in each sound so that `span` samples follow, int64 (B,), and which are long enough, bool (B,)."""
    audio = batch["audio"]
    whole = torch.full_like(audio[:, 0], audio.shape[1]).long()
    lengths = batch["audio_mask"].sum(1) if "audio_mask" in batch else whole
    free = (lengths - span).clamp(min=0)
    return (draws.uniform() * (free + 1)).long().minimum(free), lengths >= span
