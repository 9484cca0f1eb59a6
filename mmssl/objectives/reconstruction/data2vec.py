"""data2vec: what would a slowly moving copy of the network, over its top layers, say about these hidden places?

Baevski, Hsu, Xu, Babu, Gu & Auli 2022, "data2vec: A General Framework for Self-supervised Learning in Speech, Vision
and Language", arXiv 2202.03555. Blocks of patches of a picture, tokens of a text or spans of frames of a sound are
hidden. A teacher, a moving average of the network, reads the whole; what its top K layers say of a place, normalized
and averaged, is what the network has to tell at the hidden ones, having seen the rest. The same with a spectrogram,
whose patches are hidden like a picture's; no such setting is published.

| | images | texts | waveforms |
|---|---|---|---|
| hidden | 60 % in blocks of BEiT's | 15 %, as BERT's | spans of ten frames, half of all |
| layers, of twelve | 6 | 10 | 8 |
| normalized | each token, then the average's | each token | each channel over time |
| loss | smooth L1, beta 2 | smooth L1, beta 4 | squared error |
| teacher keeps | 0.9998 | 0.999, to 0.9999 in 30 % of the run | 0.999, to 0.9999 in 7.5 % |

Layers are taken at the ends of their blocks, as in the published code for images; that for texts and sounds takes them
before the last addition of a block. There, too, teacher and student share what is before the transformer; here all of
it follows. Colors are not jittered. The loss is a mean over channels, whose sum the code divides by the root of their
number (sounds) or not at all (texts).

Known traps. Without normalization of every layer one layer of large numbers, or a few channels, is the target. The loss
says nothing: it falls when targets become alike. Read `relative_error`, which is 1 for one answer to everything, the
running mean of all targets, with `spread`: how much targets at one place differ from row to row, 1 where they have
nothing in common and 0 where the teacher says the same of every row, even if not of every place. Variance over places,
which the published code watches, stays high there. What leaves the run is the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.modules.mode import evaluating
from mmssl.modules.running_mean import RunningMean
from mmssl.modules.teacher import Teacher
from mmssl.modules.views import Crop
from mmssl.objectives._concealed import Concealed
from mmssl.objectives.base import Chance, Objective, Panel, Step
from mmssl.objectives.reconstruction._masked_places import Masked, MaskedPatches, MaskedWaves, MaskedWords
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over
from mmssl.ops.masking import take
from mmssl.ranges import Positive, Ratio, Share, Weight

VIEWS = {"area": (0.08, 1.0), "flip": 0.5}
EPS = 1e-5


class Published(NamedTuple):
    """Settings of one kind of input.

    Attributes:
        mask_ratio: see `Data2Vec`.
        layers: share of the depth whose layers are averaged.
        beta: of the loss.
        momentum: of the teacher, at the first step and after `rise`.
        rise: share of the run in which it moves from one to the other, along a line.
    """

    mask_ratio: float
    layers: float
    beta: float
    momentum: tuple[float, float]
    rise: float


PUBLISHED = {
    "patches": Published(0.6, 6 / 12, 2.0, (0.9998, 0.9998), 1.0),
    "words": Published(0.15, 10 / 12, 4.0, (0.999, 0.9999), 0.3),
    "waves": Published(0.65, 8 / 12, 0.0, (0.999, 0.9999), 0.075),
}


class Data2Vec(Objective):
    """Predict the average of a momentum teacher's top layers at hidden places.

    Args:
        encoders: holds the encoder, a transformer.
        encoder: its name; whether it reads images, texts or sounds decides what is hidden.
        layers: K, how many of the top layers are averaged; by kind, see above, where left out.
        mask_ratio: share of patches or tokens that is hidden, and of frames of waveforms the share that would be if no
            two spans met; 0.6, 0.15 and 0.65 where left out.
        mask_length: of waveforms, frames of a span.
        beta: error at which the loss goes over from squares to absolute values, 0 for squares alone; by kind, see
            above, where left out.
        momentum: share of itself that the teacher keeps, at the first step and after the published part of the run; by
            kind, see above, where left out.
        views: of images: how they are cropped, see `Crop`.
    """

    divisors = ("scored",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        layers: Positive | None = None,
        mask_ratio: Ratio | None = None,
        mask_length: Annotated[int, Ge(2), Le(1000)] = 10,
        beta: Weight | None = None,
        momentum: tuple[Share, Share] | None = None,
        views: dict[str, Any] = VIEWS,
    ) -> None:
        super().__init__(encoders)
        network = self.encoder(encoder, "image", "text", "audio")
        self.needs, self.name, self.layers = (network.modality,), encoder, layers
        waves = isinstance(network, AudioEncoder) and not network.has_spectrogram
        self.kind = "waves" if waves else "words" if network.modality == "text" else "patches"
        published = PUBLISHED[self.kind]
        self.beta = published.beta if beta is None else beta
        self.momentum = published.momentum if momentum is None else momentum
        ratio = published.mask_ratio if mask_ratio is None else mask_ratio
        self.masked: Masked
        if self.kind == "waves":
            self.masked = MaskedWaves(cast(AudioEncoder, network), ratio, mask_length)
        elif self.kind == "words":
            self.masked = MaskedWords("data2vec", cast(TextEncoder, network), encoder, ratio)
        else:
            self.masked = MaskedPatches("data2vec", network, ratio, Crop.of(VIEWS, views))
        dim = network.dim
        inner = (nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.head = nn.Sequential(*inner) if self.kind == "words" else nn.Linear(dim, dim)
        self.teacher = Teacher({"encoder": network})
        self.mean = RunningMean(dim)

    def chance(self, rows: int) -> Chance:
        """The error of one answer to everything: the running mean of the targets."""
        return Chance(None, {"relative_error": 1.0})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, W), `text` (B, L) or `audio` (B, S) -> what is read, and what of it is hidden.

        `places` (B, M), of which the `chosen` ones are hidden, and `valid` (B, N), False where a place is padding;
        further what the classes of `_masked_places` say.
        """
        return self.masked.hide(self.encoder(self.name), batch, draws)

    @torch.no_grad()
    def targets(self, inputs: Batch) -> Tensor:
        """What the teacher says of each place, (B, N, D).

        Raises:
            RecipeError: for more layers than the network has.
        """
        teacher = cast(Encoder, self.teacher["encoder"])
        x, mask = self.masked.whole(teacher, inputs)
        with evaluating(teacher):
            depths = {name: at.tokens for name, at in teacher.layers(x, mask).items() if name != "embeddings"}
        number = max(1, round(PUBLISHED[self.kind].layers * len(depths))) if self.layers is None else self.layers
        if number > len(depths):
            raise RecipeError(f"data2vec: layers = {number}, and {teacher.spec['model']} has {len(depths)}")
        chosen = list(depths.values())[-number:]
        if self.kind == "waves":
            return torch.stack([over_time(tokens, inputs["valid"]) for tokens in chosen]).mean(0)
        average = torch.stack([F.layer_norm(tokens, tokens.shape[2:], eps=EPS) for tokens in chosen]).mean(0)
        return F.layer_norm(average, average.shape[2:], eps=EPS) if self.kind == "patches" else average

    def predict(self, inputs: Batch) -> Batch:
        """`prediction` and `target` (B, M, D) at the places, and what is `taught` of all (B, N, D)."""
        tokens, taught = self.masked.read(self.encoder(self.name), inputs), self.targets(inputs)
        places = inputs["places"]
        return {"prediction": self.head(take(tokens, places)), "target": take(taught, places), "taught": taught}

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B, M), a mean over channels."""
        prediction, target = torch.broadcast_tensors(prediction, target)
        if self.beta == 0:
            return (prediction - target).square().mean(2)
        return F.smooth_l1_loss(prediction, target, reduction="none", beta=self.beta).mean(2)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Mean error of the hidden places of the global batch; its ratio to that of a constant; `spread`, see above."""
        target, taught, chosen = outputs["target"].detach(), outputs["taught"].detach(), inputs["chosen"]
        error = self._error(outputs["prediction"], target)
        own, constant = ((one * chosen).sum(1) for one in (error.detach(), self._error(self.mean.value, target)))
        weight = inputs["valid"][:, :, None].to(taught.dtype)
        self.mean.see(taught, inputs["valid"])
        mean = (taught * weight).sum(0) / weight.sum(0).clamp(min=1)
        variance = ((taught - mean).square() * weight).sum() / (weight.sum() * taught.shape[2]).clamp(min=1)
        return {
            "loss": mean_over(error, chosen, inputs["scored"]),
            "relative_error": RunningMean.ratio(own, constant),
            "spread": variance.sqrt(),
        }

    def before_step(self, step: Step) -> None:
        """See `Teacher.begin`."""
        self.teacher.begin(step.number, {"encoder": self.encoder(self.name)})

    def after_step(self, progress: float) -> None:
        """The teacher follows, and the mean of targets moves toward that of those that this step saw."""
        start, end = self.momentum
        momentum = start + (end - start) * min(1.0, progress / PUBLISHED[self.kind].rise)
        self.teacher.follow({"encoder": self.encoder(self.name)}, momentum)
        self.mean.move()

    def concealed(self, inputs: Batch) -> Concealed:
        """What the class of the input says."""
        hidden = self.masked.concealed(self.encoder(self.name), inputs)
        return Concealed(lambda inputs: self.predict(inputs)["prediction"], **hidden)

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The input, what is seen of it, and how far off the predictions are."""
        chosen = inputs["chosen"]
        errors = (self._error(answer, outputs["target"]) for answer in (outputs["prediction"], self.mean.value))
        means = [((one * chosen).sum(1) / chosen.sum(1).clamp(min=1)).tolist() for one in errors]
        said = [
            f"{count} hidden: error {own:.3f}, of a constant {constant:.3f}"
            for count, own, constant in zip(chosen.sum(1).tolist(), *means, strict=True)
        ]
        return [*self.masked.panels(self.encoder(self.name), inputs), Panel("prediction", said)]


def over_time(tokens: Tensor, valid: Tensor) -> Tensor:
    """Each channel of (B, N, D) less its mean over the valid places of a row, over their deviation: instance norm."""
    weight = valid[:, :, None].to(tokens.dtype)
    count = weight.sum(1, keepdim=True).clamp(min=1)
    centered = tokens - (tokens * weight).sum(1, keepdim=True) / count
    variance = (centered.square() * weight).sum(1, keepdim=True) / count
    return centered / (variance + EPS).sqrt()
