"""wav2vec 2.0: which of these quantized frames belongs in the gap of this sound?

Baevski, Zhou, Mohamed & Auli 2020, "wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations",
arXiv 2006.11477. Convolutions make a frame of every 20 ms of a waveform; spans of frames are replaced by a mask token
before the transformer. A quantizer says of each hidden frame which code of each of two codebooks it is, and the
transformer's output there has to be nearer to that than to 100 others, drawn from the other hidden frames of the same
sound. A second loss keeps the codes in use. Of networks, `transformers/wav2vec2`, `hubert` and `wavlm` will do.

Not followed: the penalty on the convolutions' activations and their gradient over ten, with which the paper trains on
the smaller of its two corpora; layers that are dropped as a whole; rows of one batch that hide the same number of
frames.

Known traps. Negatives are hidden frames of the same sound, never seen ones, and never the frame itself; one with the
very codes of the right answer is none, and is left out. So a codebook that collapses makes the loss fall to nothing,
and any accuracy rise: read `ranking`, which a tie leaves at one half, and `perplexity`, which falls to 1. The
probability that the configurations call 0.65 hides 49 % of the frames, because spans overlap. The diversity loss is of
the mean code over the whole batch, and its share of the loss does not depend on the number of frames. The frames that
are quantized are those before the mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Chance, Panel
from mmssl.objectives.reconstruction._masked_frames import MaskedFrames
from mmssl.ops.draws import Draws
from mmssl.ops.gather import gather
from mmssl.ops.losses import mean_over
from mmssl.ops.masking import take
from mmssl.ranges import Positive, Ratio, Temperature, Weight, Width


class Wav2Vec2(MaskedFrames):
    """Contrast the quantized frame of each hidden place with those of other hidden places.

    Args:
        encoders: holds the encoder, a network of waveforms.
        encoder: its name.
        mask_probability: share of the frames that would be hidden if no two spans met.
        mask_length: of a span, in frames.
        negatives: for each hidden frame, with replacement.
        temperature: divides the cosine.
        groups: of the quantizer, each with codes of its own.
        codes: of a group.
        width: of quantized frames, and of the space where they are compared.
        diversity: weight of the loss that keeps codes in use.
        gumbel: temperature of the choice of codes, at the first step and at the last.
        gumbel_decay: factor by which it falls from step to step.
    """

    meets = "loss"  # in the mean code
    divisors = ("hidden_frames",)

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "audio",
        mask_probability: Ratio = 0.65,
        mask_length: Annotated[int, Ge(2), Le(1000)] = 10,
        negatives: Positive = 100,
        temperature: Temperature = 0.1,
        groups: Positive = 2,
        codes: Annotated[int, Ge(2)] = 320,
        width: Width = 256,
        diversity: Weight = 0.1,
        gumbel: tuple[Temperature, Temperature] = (2.0, 0.5),
        gumbel_decay: Ratio = 0.999995,
    ) -> None:
        super().__init__(encoders, encoder, mask_probability, mask_length)
        if width % groups:
            raise RecipeError(f"wav2vec2: width = {width} is not a multiple of groups = {groups}")
        self.negatives, self.temperature, self.diversity = negatives, temperature, diversity
        self.quantizer = Quantizer(self.waves.frame_width, groups, codes, width, gumbel, gumbel_decay)
        self.answer, self.question = nn.Linear(width, width), nn.Linear(self.network.dim, width)

    def chance(self, rows: int) -> Chance:
        """Any of the candidates, and every code used alike."""
        level = math.log(1 + self.negatives)
        return Chance(level, {"contrastive": level, "ranking": 0.5})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`audio` (B, S) -> the same, which frames are `hidden` (B, N), and the noise of the choice of codes.

        `places` (B, M) of hidden frames, of which the `chosen` ones count; of each the `negatives` (B, M, K), which of
        the M they are; `noise` (B, M, G, V).
        """
        inputs, _ = self.hide(batch, draws)
        hidden = inputs["hidden"]
        slots = self.most_hidden(hidden.shape[1])
        places = hidden.long().argsort(dim=1, descending=True, stable=True)[:, :slots]
        others = (hidden.sum(1) - 1).clamp(min=1)[:, None, None]
        negatives = (draws.uniform(slots, self.negatives) * others).long().minimum(others - 1)
        itself = torch.arange(slots, device=places.device)[:, None]
        uniform = draws.uniform(slots, *self.quantizer.codebooks.shape[:2])
        return inputs | {
            "places": places,
            "chosen": hidden.gather(1, places),
            "negatives": negatives + (negatives >= itself),
            "noise": -(-uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log()).log(),
            "hidden_frames": hidden.sum(),
        }

    def predict(self, inputs: Batch) -> Batch:
        """Of each hidden frame its `log_likelihood_ratio` to a guess and its `ranking`, (B, M); 0 where none is chosen.

        Also `usage` (B, G, V), the sum over a row's hidden frames of how much likelier each code is than 1 / V.
        """
        chosen = inputs["chosen"]
        frames, tokens = self.read(inputs)
        quantized, codes, shares = self.quantizer(take(frames, inputs["places"]), inputs["noise"])
        answers = F.normalize(_full(self.answer(quantized)), dim=-1)
        questions = F.normalize(_full(self.question(take(tokens, inputs["places"]))), dim=-1)
        cosine = questions @ answers.mT
        right, wrong = cosine.diagonal(dim1=1, dim2=2)[..., None], cosine.gather(2, inputs["negatives"])
        equal = (codes[:, :, None] == codes[:, None]).all(3).gather(2, inputs["negatives"])
        logits = torch.cat([right, wrong.masked_fill(equal, -math.inf)], dim=2) / self.temperature
        ratio = logits.log_softmax(2)[..., 0] + math.log(logits.shape[2])
        above = (right > wrong).to(ratio.dtype) + (right == wrong).to(ratio.dtype) / 2
        return {
            "log_likelihood_ratio": ratio * chosen,
            "ranking": above.masked_fill(equal, 0.5).mean(2) * chosen,
            "usage": ((shares - 1 / shares.shape[3]) * chosen[..., None, None]).sum(1),
        }

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The contrastive loss, a mean over the hidden frames of the global batch, and the diversity loss.

        `perplexity` is that of the codes of a group, a mean over the groups: V where all are used alike, 1 where each
        group has one code for all frames. Published curves show the sum over the groups.
        """
        chosen, count = inputs["chosen"], inputs["hidden_frames"]
        codes = outputs["usage"].shape[2]
        number = gather(chosen.sum(1)).sum().clamp(min=1)
        share = gather(outputs["usage"], exact=True).sum(0) / number + 1 / codes
        # A code that no frame has is a rounding away from 0, above or below; the logarithm of either is finite.
        share = share.clamp(min=torch.finfo(torch.float32).tiny)
        perplexity = (-torch.xlogy(share, share).sum(1)).exp().mean()
        contrastive = mean_over(math.log(1 + self.negatives) - outputs["log_likelihood_ratio"], chosen, count)
        return {
            "loss": contrastive + self.diversity * (1 - perplexity / codes),
            "contrastive": contrastive.detach(),
            "ranking": mean_over(outputs["ranking"].detach(), chosen, count),
            "perplexity": perplexity.detach(),
        }

    def after_step(self, progress: float) -> None:
        """The choice of codes gets colder."""
        self.quantizer.steps += 1

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The sound, what is seen of it, and how well the hidden frames are told from others."""
        number = inputs["chosen"].sum(1).clamp(min=1)
        means = [(outputs[key].sum(1) / number).tolist() for key in ("ranking", "log_likelihood_ratio")]
        said = [
            f"of {n} frames: above {ranking:.0%} of others, loss {math.log(1 + self.negatives) - ratio:.2f}"
            for n, ranking, ratio in zip(number.tolist(), *means, strict=True)
        ]
        return [*self.sounds(inputs), Panel("prediction", said)]


class Quantizer(nn.Module):
    """Frames -> one of V codes in each of G groups, and what these stand for, with a gradient through the choice.

    Jang, Gu & Poole 2016, arXiv 1611.01144: the code with the largest logit plus Gumbel noise; the gradient is that of
    the softmax of these. Without noise in evaluation.

    Args:
        frame_width: C.
        groups: G.
        codes: V.
        width: D of what the codes of all groups stand for together.
        temperature: of the softmax, first and last.
        decay: factor from step to step.

    Attributes:
        steps: int64 0-dim, how many steps were made.
    """

    steps: Tensor

    def __init__(
        self, frame_width: int, groups: int, codes: int, width: int, temperature: tuple[float, float], decay: float
    ) -> None:
        super().__init__()
        self.temperature, self.decay = temperature, decay
        self.codebooks = nn.Parameter(torch.rand(groups, codes, width // groups))
        self.logits = nn.Linear(frame_width, groups * codes)
        nn.init.normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (B, M, C) and noise (B, M, G, V) -> (B, M, D), codes int64 (B, M, G), their shares (B, M, G, V)."""
        logits = _full(self.logits(frames)).unflatten(2, self.codebooks.shape[:2])
        first, last = self.temperature
        cold = (first * self.decay ** self.steps.double()).clamp(min=last).to(logits.dtype)
        noisy = logits + noise if self.training else logits
        codes = noisy.argmax(3)
        soft = (noisy / cold).softmax(3)
        # Exactly one and zeros forward, the gradient of the softmax backward.
        hard = torch.zeros_like(soft).scatter(3, codes[..., None], 1.0) + (soft - soft.detach())
        vectors = torch.einsum("bmgv,gvd->bmgd", hard.to(self.codebooks.dtype), self.codebooks)
        return vectors.flatten(2), codes, logits.softmax(3)


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
