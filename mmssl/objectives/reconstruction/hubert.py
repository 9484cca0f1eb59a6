"""HuBERT: of which cluster is the sound in this gap?

Hsu, Bolte, Tsai, Lakhotia, Salakhutdinov & Mohamed 2021, "HuBERT: Self-Supervised Speech Representation Learning by
Masked Prediction of Hidden Units", arXiv 2106.07447. Before the first step k-means sorts the frames of the data into
clusters: of MFCCs and their first two derivatives (first iteration), or of what a layer of the network says of them,
as it starts (`target: layers.5`: second iteration, from the weights of the first). Spans of frames are then hidden as
in wav2vec 2.0, and the network tells the cluster of each by the cosine of its output with a vector of each cluster.

In the paper the second iteration starts from random weights, with targets of the first network; here the network goes
on, and a copy of it that stays as it was makes the targets. MFCCs are torchaudio's, of a window as long as what a frame
is made of; those of the paper are Kaldi's, whose pre-emphasis they lack. Networks may be any of `transformers/hubert`,
`wav2vec2` and `wavlm`.

Known traps. Clusters are numbers of one k-means for all data: another one for a validation set makes its loss
meaningless. Clusters of silence are far more frequent than others: the level to beat is not 1 / K but the histogram;
`relative_error` (chance 1) is the loss over its. There is one target for each frame of the network, of the samples that
the frame is made of: lists of labels at another rate are shifted in silence. The probability of 0.8 hides 56 % of the
frames, because spans overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError, nearest
from mmssl.modules.codebook import Codebook
from mmssl.modules.teacher import Teacher
from mmssl.objectives.base import Chance, Panel, Step
from mmssl.objectives.reconstruction._masked_frames import MaskedFrames
from mmssl.ops.draws import Draws
from mmssl.ops.losses import score_tokens, token_losses
from mmssl.ops.masking import take
from mmssl.ranges import Ratio, Temperature, Weight, Width

CEPSTRA = 13


class Hubert(MaskedFrames):
    """Classify hidden frames by the clusters of their sound.

    Args:
        encoders: holds the encoder, a network of waveforms.
        encoder: its name.
        target: what is clustered: `mfcc`, or the name of a depth of the network, such as `layers.5`.
        codes: number of clusters, K: 100 of MFCCs and 500 of a layer in the paper.
        mask_probability: share of the frames that would be hidden if no two spans met.
        mask_length: of a span, in frames.
        unmasked: weight of a frame that is seen, where one that is hidden has 1.
        temperature: divides the cosine.
        width: of the space where outputs and clusters are compared.
    """

    divisors = ("scored_frames", "prior_surprise")

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "audio",
        target: str = "mfcc",
        codes: Annotated[int, Ge(2)] = 100,
        mask_probability: Ratio = 0.8,
        mask_length: Annotated[int, Ge(2), Le(1000)] = 10,
        unmasked: Weight = 0.0,
        temperature: Temperature = 0.1,
        width: Width = 256,
    ) -> None:
        super().__init__(encoders, encoder, mask_probability, mask_length)
        self.target, self.unmasked, self.temperature = target, unmasked, temperature
        depths = ("embeddings", *(f"layers.{i}" for i in range(len(self.waves.net.encoder.layers))))
        if target not in ("mfcc", *depths):
            raise RecipeError(f"hubert: target = '{target}' is neither mfcc nor a depth{nearest(target, depths)}")
        self.teacher: Teacher | None = None
        self.cepstra: Cepstra | None = None
        if target == "mfcc":
            self.cepstra = Cepstra(self.network.rate, self.waves.reach, self.waves.stride)
        else:
            self.teacher = Teacher({encoder: self.network})
        self.codebook = Codebook(codes, self.waves.dim if self.cepstra is None else 3 * CEPSTRA)
        self.projection = nn.Linear(self.network.dim, width)
        self.clusters = nn.Parameter(torch.rand(codes, width))

    def chance(self, rows: int) -> Chance:
        """Of the loss any cluster; of `relative_error` the histogram."""
        codes = len(self.clusters)
        return Chance(math.log(codes), {"accuracy": 1 / codes, "relative_error": 1.0})

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        """Before the first, cluster the frames of as many batches as that takes."""
        if step.number or self.codebook.counts.any():
            return
        if self.teacher is not None:
            step.need_whole_weights("target")
            self.teacher.follow({self.name: self.network}, 0.0)
        self.codebook.fit(self.vectors(batch) for batch in step.data())
        if int((self.codebook.counts > 0).sum()) < 2:
            raise RecipeError("hubert: all frames of the data are alike, and there is nothing to tell apart")

    def vectors(self, batch: Batch) -> Tensor:
        """What is clustered, (B * N, D); NaN where a frame is padding."""
        audio, mask = batch["audio"], batch.get("audio_mask")
        found = self.described(audio, mask)
        if mask is not None:
            found = found.masked_fill(~self.network.valid_frames(mask)[..., None], math.nan)
        return found.flatten(0, 1)

    def described(self, audio: Tensor, mask: Tensor | None) -> Tensor:
        """Frames of sounds (B, S) by what is clustered, (B, N, D)."""
        if self.cepstra is not None:
            return cast(Tensor, self.cepstra(audio))
        teacher = cast(AudioEncoder, cast(Teacher, self.teacher)[self.name]).eval()
        return teacher.layers(audio, mask)[self.target].tokens

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`audio` (B, S) -> the same, which frames are `hidden` (B, N), and the clusters.

        `places` (B, M), of which the `chosen` ones count, by their `weight` (B, M), and their `target`.
        """
        inputs, valid = self.hide(batch, draws)
        hidden = inputs["hidden"]
        counted = valid if self.unmasked else hidden
        slots = hidden.shape[1] if self.unmasked else self.most_hidden(hidden.shape[1])
        places = counted.long().argsort(dim=1, descending=True, stable=True)[:, :slots]
        chosen = counted.gather(1, places)
        target = self.codebook(take(self.described(batch["audio"], batch.get("audio_mask")), places))
        weight = torch.where(hidden.gather(1, places), 1.0, self.unmasked) * chosen
        return inputs | {
            "places": places,
            "chosen": chosen,
            "weight": weight,
            "target": target,
            "scored_frames": weight.sum(),
            "prior_surprise": (-self.codebook.log_shares()[target] * weight).sum(),
        }

    def logits(self, inputs: Batch) -> Tensor:
        """Of all N chosen frames, row by row, (N, K)."""
        tokens = take(self.read(inputs)[1], inputs["places"])[inputs["chosen"]]
        answers = self.projection(tokens)
        answers = answers.to(torch.promote_types(answers.dtype, torch.float32))
        clusters = self.clusters.to(answers.dtype)
        return F.normalize(answers, dim=1) @ F.normalize(clusters, dim=1).T / self.temperature

    def predict(self, inputs: Batch) -> Batch:
        """See `score_tokens`: of each frame (B, M)."""
        return score_tokens(self.logits(inputs), inputs["target"], inputs["chosen"])

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """See `token_losses`; also the codebook's perplexity."""
        found = token_losses(
            outputs, len(self.clusters), inputs["weight"], inputs["scored_frames"], inputs["prior_surprise"]
        )
        return found | {"perplexity": self.codebook.perplexity()}

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """The sound, what is seen of it, and the clusters of hidden frames: as told, and as they are."""
        chosen, target = inputs["chosen"], inputs["target"]
        told = torch.full_like(target, -1).masked_scatter(chosen, self.logits(inputs).argmax(1))
        order = inputs["places"].argsort(dim=1)

        def texts(codes: Tensor) -> list[Tensor | str]:
            rows = codes.masked_fill(~chosen, -1).gather(1, order).tolist()
            return [" ".join(str(code) for code in row if code >= 0) for row in rows]

        return [*self.sounds(inputs), Panel("prediction", texts(told)), Panel("target", texts(target))]


class Cepstra(nn.Module):
    """Waveforms (B, S) -> 13 mel-frequency cepstral coefficients with their first and second derivatives, (B, N, 39).

    One vector for each frame of a network, of the samples that the frame is made of; derivatives are over five
    steps of half a stride, 10 ms for the published networks, as torchaudio's.

    Args:
        rate: of the sound, in Hz.
        reach: samples that a frame is made of.
        stride: samples from frame to frame.
    """

    def __init__(self, rate: int, reach: int, stride: int) -> None:
        super().__init__()
        from torchaudio.transforms import MFCC

        self.step = 2 if stride % 2 == 0 else 1
        mel = {"n_fft": reach, "hop_length": stride // self.step, "n_mels": 23, "center": False}
        self.mfcc = MFCC(rate, CEPSTRA, log_mels=True, melkwargs=mel)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        from torchaudio.functional import compute_deltas

        cepstra = self.mfcc(x.to(self.mfcc.dct_mat.dtype))
        first = compute_deltas(cepstra)
        found: Tensor = torch.cat([cepstra, first, compute_deltas(first)], dim=1)
        return found[:, :, :: self.step].mT
