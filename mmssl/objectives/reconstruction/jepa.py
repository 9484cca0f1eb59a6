"""JEPA: what would a slowly moving copy of the network say about the hidden parts of this image, clip or sound?

Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", arXiv
2301.08243 (form `ijepa`): the teacher, a moving average of the encoder, reads the whole picture; four blocks of its
tokens are hidden. The encoder reads a large block of patches, less those four, and a narrow transformer predicts each
of the four from that and mask tokens at their places. Bardes et al. 2024, "Revisiting Feature Prediction for Learning
Visual Representations from Video", arXiv 2404.08471 (form `vjepa`): of a clip the same places are hidden in all frames,
once the union of eight small blocks and once that of two large ones; the encoder reads what is left, each time. Nothing
is compared with pixels. A spectrogram is a picture of one channel, whose padding is left out: of it blocks of time and
frequency are hidden, where Audio-JEPA (Tuncay et al. 2025, arXiv 2507.02915) takes 40 to 60 % of single patches.

Rows have as many tokens as each other: three quarters of what a draw leaves on average are read, and of a block so many
predicted as the smallest one has. A row with more leaves some out at random, one with fewer has some twice. The
published code draws one size of block for all rows of a batch, and cuts all of them to the shortest.

Known traps. Blocks are cut out of what the teacher says of the whole, not out of what it sees. Its tokens are
normalized, without parameters, so that their scale says nothing. The loss says nothing, either: it falls when all
tokens become alike and rises while they grow apart. Read `relative_error`, which is 1 for one answer to everything, the
running mean of all targets, with `spread`, which is 0 where the teacher says the same of every row, and with
`monitor/embeddings/rank`, which falls to less than two where it says the same of them but for a number: without a
teacher of its own, or with a gradient through its targets, that takes a few dozen steps, while spread stays and the
error falls. Published blocks of `ijepa` never touch the last row and column (`randint` without its end); here they do.
What leaves the run is the teacher's encoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, masked_mean
from mmssl.modules.decoders import PatchDecoder, check_decoder
from mmssl.modules.pictures import as_read, channels_first, check_patches, cut, read_picture
from mmssl.modules.running_mean import RunningMean
from mmssl.modules.views import Crop
from mmssl.objectives._concealed import Concealed
from mmssl.objectives._taught import Taught
from mmssl.objectives.base import EMBEDDINGS, Chance, Panel
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over, spread
from mmssl.ops.masking import draw_rectangles, take
from mmssl.ops.patches import unpatchify
from mmssl.ranges import Positive, Share, Width

VIEWS = {"area": (0.3, 1.0), "flip": 0.0}
ASPECT = (0.75, 1.5)  # height / width of hidden blocks
CONTEXT = (0.85, 1.0)  # area of the block that `ijepa` reads from
READ = 0.75  # of what is left on average


class Hidden(NamedTuple):
    """One way to hide.

    Attributes:
        blocks: how many.
        area: of each, smallest and largest, as shares of the picture.
        apart: whether each block is predicted for itself, or the union of all.
    """

    blocks: int
    area: tuple[float, float]
    apart: bool


WAYS = {
    "ijepa": (Hidden(4, (0.15, 0.2), apart=True),),
    "vjepa": (Hidden(8, (0.15, 0.15), apart=False), Hidden(2, (0.7, 0.7), apart=False)),
}
MOMENTUM = {"ijepa": 0.996, "vjepa": 0.998}


class JEPA(Taught):
    """Predict a momentum teacher's tokens of hidden blocks.

    Args:
        encoders: holds the encoder, a transformer whose tokens are patches.
        encoder: its name; whether it reads images, clips or sound decides what a patch is.
        form: `ijepa`, or `vjepa`.
        momentum: share of itself that the teacher keeps at the first step; rises to 1 along a line. 0.996 (ijepa) or
            0.998 (vjepa) where left out.
        views: of images and clips: how they are cropped, see `Crop`.
        predictor_depth: blocks of the predictor.
        predictor_width: their width.
        predictor_heads: their attention heads.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        form: Literal["ijepa", "vjepa"] = "ijepa",
        momentum: Share | None = None,
        views: dict[str, Any] = VIEWS,
        predictor_depth: Positive = 6,
        predictor_width: Width = 384,
        predictor_heads: Positive = 12,
    ) -> None:
        super().__init__(encoders)
        network = self.encoder(encoder, "image", "audio", "video")
        self.modality = network.modality
        check_decoder("jepa", predictor_width, predictor_heads, "predictor")
        self.needs = (self.modality,)
        self.name, self.form, self.patch = encoder, form, check_patches("jepa", network)
        self.momentum = MOMENTUM[form] if momentum is None else momentum
        self.ways, self.crop = WAYS[form], Crop.of(VIEWS, views)
        self.divisors = tuple(f"scored_{way}" for way in range(len(self.ways)))
        self.predictor = PatchDecoder(
            network.dim, network.dim, predictor_depth, predictor_width, predictor_heads, pooled=False
        )
        self.mean = RunningMean(network.dim)
        self.begin_teaching()

    def chance(self, rows: int) -> Chance:
        """The error of one answer to everything: the running mean of the targets."""
        return Chance(None, {"relative_error": 1.0})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, W), `video` (B, T, 3, H, W) or `audio` (B, S) -> what is read, and places of its patches.

        `image` (B, 3, h, w) or `video` (B, T, 3, h, w) in [0, 1], or `audio` (B, mels, frames). For each way to hide,
        number i: `seen_i` (B, K), `hidden_i` (B, M, P) of M blocks, or of one union, `valid_i` (B, M, P), False for
        padding and where nothing is left to be read, and `scored_i`, how many are not. Of sounds with padding also
        `sounding` (B, N), False where a place is padding: it is neither read nor predicted, and the teacher attends to
        none of it.
        """
        picture, pixels, sounding = read_picture(self.encoder(self.name), batch, draws, self.crop)
        grid = cut("jepa", pixels.shape[2:], self.patch)
        frames, flat = math.prod(grid[:-2]), (grid[-2], grid[-1])
        places = math.prod(flat)
        inputs = {self.modality: picture} | ({} if sounding is None else {"sounding": sounding})
        for number, way in enumerate(self.ways):
            blocks = draw_rectangles(flat, way.blocks, way.area, ASPECT, draws)
            covered = 1 - (1 - sum(way.area) / 2) ** way.blocks
            left, kept = ~blocks.any(1), 1 - covered
            if self.form == "ijepa":
                left = left & draw_rectangles(flat, 1, CONTEXT, (1.0, 1.0), draws)[:, 0]
                kept *= sum(CONTEXT) / 2
            if sounding is not None:
                left = left & sounding
            if not way.apart:
                blocks = blocks.any(1, keepdim=True)
            read, asked = READ * kept, way.area[0] if way.apart else covered
            seen, some = _pick(left[:, None], max(1, int(read * places)), draws)
            hidden, _ = _pick(blocks, max(1, int(asked * places)), draws)
            # The same places in every frame.
            seen, hidden = (_in_frames(one, frames, places) for one in (seen, hidden))
            valid = some[:, :, None].expand_as(hidden)
            if sounding is not None:
                valid = valid & sounding.gather(1, hidden.flatten(1)).view_as(hidden)
            inputs |= {f"seen_{number}": seen[:, 0], f"hidden_{number}": hidden, f"valid_{number}": valid}
            inputs[f"scored_{number}"] = valid.sum()
        return inputs

    def _grid(self, picture: Tensor) -> tuple[int, ...]:
        extents = channels_first(picture, self.modality).shape[2:]
        return tuple(extent // size for extent, size in zip(extents, self.patch, strict=True))

    @torch.no_grad()
    def targets(self, inputs: Batch) -> Tensor:
        """What the teacher says of each place of the whole, (B, N, D)."""
        return self.told(self._taught, inputs)

    def told(self, encoder: Encoder, inputs: Batch) -> Tensor:
        """What an encoder says of each place of the whole, normalized, (B, N, D)."""
        tokens = encoder.encode(encoder.embed(inputs[self.modality]), inputs.get("sounding")).tokens
        return F.layer_norm(tokens, tokens.shape[2:])

    def predict(self, inputs: Batch) -> Batch:
        """For each way to hide `prediction_i` and `target_i` (B, M, P, D); the teacher's mean token `taught` (B, D)."""
        encoder, picture = self.encoder(self.name), inputs[self.modality]
        tokens, grid = encoder.embed(picture), self._grid(picture)
        taught = self.targets(inputs)
        outputs = {"taught": masked_mean(taught, inputs.get("sounding"))}
        for number in range(len(self.ways)):
            seen, hidden = inputs[f"seen_{number}"], inputs[f"hidden_{number}"]
            features, blocks = encoder.encode(take(tokens, seen)), hidden.shape[1]
            again = features._replace(
                tokens=features.tokens.repeat_interleave(blocks, 0), pooled=features.pooled.repeat_interleave(blocks, 0)
            )
            made = self.predictor(again, seen.repeat_interleave(blocks, 0), hidden.flatten(0, 1), grid)
            outputs[f"prediction_{number}"] = made.unflatten(0, hidden.shape[:2])
            outputs[f"target_{number}"] = take(taught, hidden.flatten(1)).unflatten(1, hidden.shape[1:])
        return outputs

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B, M, P): smooth, or (vjepa) absolute error, a mean over the D."""
        wrong = F.l1_loss if self.form == "vjepa" else F.smooth_l1_loss
        prediction, target = torch.broadcast_tensors(prediction, target)
        return wrong(prediction, target, reduction="none").mean(3)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Mean error of each way to hide, and of these the mean; its ratio to that of a constant, see `chance`.

        Also `spread` of the teacher's mean tokens over the rows: 1 where they are all over the sphere, 0 for collapse.
        """
        losses, ratios = [], []
        for number in range(len(self.ways)):
            target, valid = outputs[f"target_{number}"].detach(), inputs[f"valid_{number}"]
            error = self._error(outputs[f"prediction_{number}"], target)
            losses.append(mean_over(error.flatten(1), valid.flatten(1), inputs[f"scored_{number}"]))
            constant = self._error(self.mean.value, target)
            ratios.append(RunningMean.ratio(*((one * valid).sum((1, 2)) for one in (error.detach(), constant))))
            self.mean.see(target, valid)
        return {
            "loss": torch.stack(losses).mean(),
            "relative_error": torch.stack(ratios).mean(),
            "spread": spread(outputs["taught"]),
        }

    def drawn_together(self, inputs: Batch) -> dict[str, Tensor]:
        """The teacher's mean token of each row, which has no other view."""
        return {EMBEDDINGS: masked_mean(self.targets(inputs), inputs.get("sounding"))[:, None]}

    def after_step(self, progress: float) -> None:
        """The teacher follows, and the mean of targets moves toward that of those that this step saw."""
        momentum = 1 - (1 - self.momentum) * (1 - progress)
        self.teacher.follow(self._student(), momentum)
        self.mean.move()

    def concealed(self, inputs: Batch) -> Concealed:
        """The pixels that are read in none of the ways, and what is predicted."""
        picture = inputs[self.modality]
        seen = torch.cat([inputs[f"seen_{number}"] for number in range(len(self.ways))], dim=1)
        return Concealed(
            lambda inputs: torch.cat(
                [one.flatten(1) for key, one in self.predict(inputs).items() if key.startswith("prediction")], dim=1
            ),
            {self.modality: ~self._pixels_at(seen, picture)},
        )

    def _pixels_at(self, places: Tensor, picture: Tensor) -> Tensor:
        """Bool like `picture`, True in the patches (B, n)."""
        extents = tuple(channels_first(picture, self.modality).shape[2:])
        channels = 1 if self.modality == "audio" else picture.shape[-3]
        patches = picture.new_zeros(len(picture), math.prod(self._grid(picture)), channels * math.prod(self.patch))
        index = places[:, :, None].expand(-1, -1, patches.shape[2])
        mask = unpatchify(patches.scatter(1, index, 1.0), self.patch, extents) > 0
        return as_read(mask, self.modality)

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What is read, the first block that is hidden, and the row whose block is nearest to what is predicted."""
        encoder, picture = self.encoder(self.name), inputs[self.modality]
        shown = picture if self.modality == "audio" else as_floats(picture)
        gray = shown.mean() if self.modality == "audio" else 0.5
        read = torch.where(self._pixels_at(inputs["seen_0"], picture), shown, gray)
        block = torch.where(self._pixels_at(inputs["hidden_0"][:, 0], picture), shown, gray)
        made, target = (outputs[key][:, 0].mean(1) for key in ("prediction_0", "target_0"))
        nearest = torch.cdist(made.float(), target.float()).argmin(1)
        scale = encoder.scale(picture[0])
        return [
            Panel("input", list(shown), scale=scale),
            Panel("read", list(read), scale=scale),
            Panel("hidden", list(block), scale=scale),
            Panel(
                "nearest to the prediction",
                list(block[nearest]),
                [found == row for row, found in enumerate(nearest.tolist())],
                scale,
            ),
        ]


def _pick(places: Tensor, slots: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """So many of the places that are True in (B, M, N), some of them twice where there are fewer.

    Returns:
        int64 (B, M, slots), and bool (B, M), False where there is none to pick from.
    """
    order = draws.uniform(*places.shape[1:]).masked_fill(~places, 2.0).argsort(dim=2, stable=True)
    count = places.sum(2, keepdim=True).clamp(1, slots)
    return order.gather(2, torch.arange(slots, device=places.device) % count), places.any(2)


def _in_frames(places: Tensor, frames: int, number: int) -> Tensor:
    """Places (B, M, n) of one frame of `number` -> those of all frames, (B, M, frames * n)."""
    first = number * torch.arange(frames, device=places.device)
    return (places[:, :, None] + first[:, None]).flatten(2)
