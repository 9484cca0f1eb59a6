"""SimCLR: which two views come from the same image, or the same sound?

Chen, Kornblith, Norouzi & Hinton 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
arXiv 2002.05709. Two random views of each row are drawn together and those of all other rows pushed apart, over the
whole global batch. Images are cropped, mirrored, recoloured and blurred as in the paper. Sounds give two windows of the
same recording (COLA, arXiv 2010.10915), softer and with noise, whose log-mel spectrograms are cropped and resized in
frequency and time (BYOL-A, arXiv 2103.06695). BYOL-A mixes other recordings in; white noise stands for them here, so
that no row depends on which others share its process.

Known traps. A view's similarity with itself is masked, not subtracted (its gradient must go too). Negatives come from
all processes, with gradient. For 32-pixel images the paper leaves out the blur and halves the colour distortion:
`blur: 0, strength: 0.5`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.augment import random_views
from mmssl.ops.augment_audio import random_stretch, random_windows
from mmssl.ops.draws import Draws
from mmssl.ops.losses import nt_xent

VIEWS = 2


class SimCLR(Objective):
    """Contrast two views of a row with those of all other rows.

    Args:
        encoders: holds the encoder.
        encoder: its name; whether it reads images or sound decides the views.
        width: of the projection.
        hidden: width of the projection's hidden layer; that of the encoder where left out.
        temperature: divides the cosine similarity.
        size: of an image view, in pixels; that of the image where left out.
        area: smallest and largest share of the image that a view covers.
        flip: probability that an image view is mirrored.
        jitter: probability of colour jitter.
        strength: of colour jitter, s in the paper.
        grayscale: probability.
        blur: probability.
        window: length of a sound view, as a share of the recording.
        attenuation: of a sound view, at most, in dB.
        noise: range of a sound view's ratio of signal to noise, in dB; None for no noise.
        stretch: smallest and largest crop of a view's spectrogram, relative to its size, in frequency and time.
    """

    coupled = True

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        width: int = 128,
        hidden: int | None = None,
        temperature: float = 0.1,
        size: int | None = None,
        area: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
        jitter: float = 0.8,
        strength: float = 1.0,
        grayscale: float = 0.2,
        blur: float = 0.5,
        window: float = 0.5,
        attenuation: float = 6.0,
        noise: tuple[float, float] | None = (10.0, 40.0),
        stretch: tuple[float, float] = (0.6, 1.5),
    ) -> None:
        super().__init__(encoders)
        self.name, self.temperature, self.size, self.window = encoder, temperature, size, window
        self.picture: dict[str, Any] = {
            "area": area,
            "flip": flip,
            "jitter": jitter,
            "strength": strength,
            "grayscale": grayscale,
            "blur": blur,
        }
        self.attenuation, self.noise, self.stretch = attenuation, noise, stretch
        self.modality = self.encoder(encoder).modality
        if self.modality not in ("image", "audio"):
            raise RecipeError(f"simclr has views of image and audio, and the encoder '{encoder}' reads {self.modality}")
        self.needs = (self.modality,)
        dim = self.encoder(encoder).dim
        self.projection = nn.Sequential(
            nn.Linear(dim, hidden or dim), nn.ReLU(), nn.Linear(hidden or dim, width, bias=False)
        )

    def chance(self, rows: int) -> Chance:
        """One partner among the 2N - 1 other views."""
        others = VIEWS * rows - 1
        return Chance(math.log(others), {"accuracy": 1 / others})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, W) -> `views` (B, 2, 3, h, h); `audio` (B, S) -> `views` (B, 2, M, T) with `views_mask`."""
        if self.modality == "image":
            images = batch["image"]
            return {"views": random_views(images, draws, VIEWS, self.size or min(images.shape[-2:]), **self.picture)}
        audio = batch["audio"]
        size = max(1, round(self.window * audio.shape[1]))
        windows, inside = random_windows(
            audio, batch.get("audio_mask"), draws, VIEWS, size, attenuation=self.attenuation, noise=self.noise
        )
        encoder = cast(AudioEncoder, self.encoder(self.name))
        spectrograms = encoder.spectrogram(windows.flatten(0, 1)).unflatten(0, (-1, VIEWS))
        frames = encoder.frame_mask(inside.flatten(0, 1)).unflatten(0, (-1, VIEWS))
        frames = F.pad(frames, (0, spectrograms.shape[-1] - frames.shape[-1]))
        views, mask = random_stretch(spectrograms, frames, draws, self.stretch)
        return {"views": views, "views_mask": mask}

    def predict(self, inputs: Batch) -> Batch:
        """`z` (B, 2, width), unit vectors; both views of a row in one pass."""
        mask = inputs["views_mask"].flatten(0, 1) if "views_mask" in inputs else None
        pooled = self.encoder(self.name)(inputs["views"].flatten(0, 1), mask).pooled
        return {"z": F.normalize(self.projection(pooled), dim=-1).unflatten(0, (-1, VIEWS))}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """NT-Xent over the global batch; accuracy: how often the partner is the nearest view."""
        first, second = outputs["z"].unbind(1)
        loss, accuracy = nt_xent(first, second, self.temperature)
        return {"loss": loss, "accuracy": accuracy}

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Both views, and for each row's first view the row whose second view is nearest."""
        first, second = outputs["z"].unbind(1)
        nearest = (first @ second.T).argmax(1)
        return [
            Panel("view 1", list(inputs["views"][:, 0])),
            Panel("view 2", list(inputs["views"][:, 1])),
            Panel("nearest view 2", list(inputs["views"][nearest, 1])),
        ]
