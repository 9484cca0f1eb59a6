"""CPC: which of these moments comes next?

Form `cpc`: van den Oord, Li & Vinyals 2018, "Representation Learning with Contrastive Predictive Coding", arXiv
1807.03748. A sound or a clip is cut into blocks that do not overlap, the encoder reads each alone, and a recurrent
network reads their vectors in order. From its state after block t a linear map for each k predicts block t + k, and the
inner product has to be larger with that one than with any other block of the batch. Form `dpc`: Han, Xie & Zisserman
2019, "Video Representation Learning by Dense Predictive Coding", arXiv 1909.04656: from the first blocks of a clip the
next one is predicted, fed back, and so on to the last, at each place of the picture; all blocks that are predicted, at
all places of all clips, are candidates. The recurrent network runs at each place (their kernel is 1 x 1).

The paper's encoder of sound makes overlapping frames of 10 ms; blocks let any encoder be used, and share no sample. Its
negatives are a sample of the batch where all blocks are candidates here.

Known traps. The right block is t + k: leaving out t in its place makes the answer its own negative. Candidates differ
by what they are of before they differ by when: who speaks, the room, the colors. So the loss falls without any
prediction; `ranking` compares the right block with others of its own row alone, and stays at one half then. Frames of a
clip are colored each on their own, because one color for all is a fingerprint. BatchNorm sees the future of a row:
encoders without it, or with frozen statistics, have no such way. Blocks after the end of a sound are candidates that
nothing is asked about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.heads import mlp
from mmssl.modules.views import Crop
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.augment import color_jitter, draw_jitter
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.gather import gather, own_rows
from mmssl.ops.losses import mean_over
from mmssl.ops.transfers import upload
from mmssl.ranges import Positive, Weight, Width

FORMS = {"cpc": (16, 4), "dpc": (8, 3)}  # blocks, steps
VIEWS = {"area": (0.5, 1.0), "flip": 0.5}


class CPC(Objective):
    """Tell the blocks to come from all other blocks of the batch.

    Args:
        encoders: holds the encoder.
        encoder: its name; it reads sound or clips.
        form: `cpc` or `dpc`.
        blocks: T, into which a row is cut; 16 (cpc) or 8 (dpc) where left out.
        steps: K, how far ahead is predicted; 4 or 3 where left out. `dpc` predicts the last K blocks.
        context: blocks that are read before anything is predicted; of `cpc` alone.
        dense: whether each place of the picture is predicted for itself; in dpc where left out.
        width: of the recurrent network's state.
        strength: of the color jitter of each frame, s of SimCLR.
        views: of clips: how they are cropped; see `Crop`.
    """

    meets = "loss"
    divisors = ("scored_blocks",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "audio",
        form: Literal["cpc", "dpc"] = "cpc",
        blocks: Annotated[int, Ge(2)] | None = None,
        steps: Positive | None = None,
        context: Positive = 1,
        dense: bool | None = None,
        width: Width = 256,
        strength: Weight = 0.5,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders)
        network = self.encoder(encoder, "audio", "video")
        self.name, self.modality, self.form, self.strength = encoder, network.modality, form, strength
        self.needs = (self.modality,)
        self.blocks = FORMS[form][0] if blocks is None else blocks
        self.steps = FORMS[form][1] if steps is None else steps
        self.context = context if form == "cpc" else self.blocks - self.steps
        self.dense = form == "dpc" and self.modality == "video" if dense is None else dense
        if self.dense and self.modality != "video":
            raise RecipeError("cpc: dense predicts each place of a picture, and a sound has none; take dense: false")
        if self.context < 1 or self.context + (self.steps if form == "cpc" else 0) > self.blocks:
            raise RecipeError(
                f"cpc: {self.blocks} blocks leave no room for steps = {self.steps} after context = {self.context}"
            )
        self.crop = Crop.of(VIEWS, views)
        self.state = nn.GRU(network.dim, width, batch_first=True)
        self.guess: nn.ModuleList | nn.Sequential
        if form == "cpc":
            self.guess = nn.ModuleList(nn.Linear(width, network.dim, bias=False) for _ in range(self.steps))
        else:
            self.guess = mlp(width, width, network.dim, norm=False, last_bias=True)

    @property
    def targets(self) -> list[int]:
        """Which block each prediction is of, in the order of `predict`."""
        if self.form == "dpc":
            return list(range(self.context, self.blocks))
        return [t for k in range(self.steps) for t in range(self.context + k, self.blocks)]

    def chance(self, rows: int) -> Chance:
        """Any candidate. Their number is that of the blocks; where places are predicted, it depends on the picture."""
        metrics = {"relative_error": 1.0, "ranking": 0.5}
        return Chance(None if self.dense else math.log(rows * (self.blocks - self.context)), metrics)

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`audio` (B, S) -> `blocks` (B, T, s); `video` (B, F, 3, H, W) -> (B, T, f, 3, h, h).

        Of ragged sounds also `valid` (B, T, s). `scored` (B, n), whether prediction i is of a whole block.
        """
        x = batch[self.modality]
        size = x.shape[1] // self.blocks
        if size < 1:
            raise RecipeError(f"cpc: {x.shape[1]} frames cannot be cut into blocks = {self.blocks}; take longer clips")
        x = x[:, : size * self.blocks]
        whole = torch.ones(len(x), self.blocks, dtype=torch.bool, device=x.device)
        inputs: Batch = {}
        if self.modality == "video":
            x = as_floats(self.crop(x, draws, batch.get("video_aspect")))
            factors, order = draw_jitter(draws, x.shape[1], strength=self.strength)
            x = color_jitter(x.flatten(0, 1), factors.flatten(0, 1), order.flatten(0, 1)).view_as(x)
        elif "audio_mask" in batch:
            inputs["valid"] = batch["audio_mask"][:, : size * self.blocks].unflatten(1, (self.blocks, size))
            whole = inputs["valid"].all(2)
        scored = whole[:, upload(self.targets, whole.device)]
        blocks = x.unflatten(1, (self.blocks, size))
        return inputs | {"blocks": blocks, "scored": scored, "scored_blocks": scored.sum()}

    def predict(self, inputs: Batch) -> Batch:
        """`found` (B, T, P, D), what the encoder says of each block at each of P places, and `guessed` (B, n, P, D)."""
        valid = inputs["valid"].flatten(0, 1) if "valid" in inputs else None
        features = self.encoder(self.name)(inputs["blocks"].flatten(0, 1), valid)
        vectors = features.pooled[:, None]
        if self.dense:
            vectors = features.tokens.unflatten(1, features.grid).mean(1).flatten(1, -2)
        found = vectors.unflatten(0, (-1, self.blocks))
        guessed = self._guesses(found.transpose(1, 2).flatten(0, 1))  # each place is a row
        return {"found": found, "guessed": guessed.unflatten(0, (len(found), -1)).transpose(1, 2)}

    def _guesses(self, found: Tensor) -> Tensor:
        """(N, T, D) -> (N, n, D)."""
        if self.form == "cpc":
            states, first = self.state(found)[0], self.context - 1
            heads = cast(nn.ModuleList, self.guess)
            return torch.cat([heads[k](states[:, first : self.blocks - 1 - k]) for k in range(self.steps)], dim=1)
        _, state = self.state(found[:, : self.context])
        guesses: list[Tensor] = []
        for _ in range(self.steps):
            if guesses:
                _, state = self.state(guesses[-1], state)
            guesses.append(self.guess(state[0])[:, None])
        return torch.cat(guesses, dim=1)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Cross-entropy over all candidates, the same over that of a guess, and `ranking`, see the module."""
        guessed, scored, count = outputs["guessed"], inputs["scored"], inputs["scored_blocks"]
        rows, number, places, _ = guessed.shape
        candidates = gather(outputs["found"][:, self.context :])
        several = candidates.shape[1]
        which = upload(self.targets, guessed.device) - self.context
        block = own_rows(rows, guessed.device)[:, None] * several + which
        right = block[..., None] * places + torch.arange(places, device=guessed.device)
        logits = guessed.flatten(0, 2) @ candidates.flatten(0, 2).T
        errors = F.cross_entropy(logits, right.flatten(), reduction="none").view(rows, number, places).mean(2)
        loss = mean_over(errors, scored, count)
        return {
            "loss": loss,
            "relative_error": loss.detach() / math.log(logits.shape[1]),
            "ranking": mean_over(self.ranked(outputs), scored, count),
        }

    @torch.no_grad()
    def ranked(self, outputs: Batch) -> Tensor:
        """Share of the other candidates of its row that are less alike than the right one, (B, n); ties half."""
        found = outputs["found"][:, self.context :]
        which = upload(self.targets, found.device) - self.context
        alike = torch.einsum("bnpd,btpd->bnpt", outputs["guessed"], found)
        right = alike.gather(3, which[None, :, None, None].expand(*alike.shape[:3], 1))
        below = (alike < right).sum(3) + ((alike == right).sum(3) - 1) / 2
        return (below / max(1, found.shape[1] - 1)).mean(2).to(found.dtype)

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The sound or the clip, and how often the right block is nearer than others of the row, by how far ahead."""
        blocks, ranked = inputs["blocks"], self.ranked(outputs)
        scale = self.encoder(self.name).scale(blocks[0].flatten(0, 1))
        ahead = [t - self.context + 1 for t in self.targets]
        if self.form == "cpc":
            ahead = [k + 1 for k in range(self.steps) for _ in range(self.context + k, self.blocks)]
        steps = torch.tensor(ahead, device=ranked.device)
        means = torch.stack([ranked[:, steps == k].mean(1) for k in range(1, self.steps + 1)], dim=1).tolist()
        said = ["  ".join(f"+{k}: {share:.0%}" for k, share in enumerate(row, 1)) for row in means]
        return [
            Panel(self.modality, list(blocks.flatten(1, 2)), scale=scale),
            Panel("right block above others of the row", said),
        ]
