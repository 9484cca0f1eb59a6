"""Random views of one row, of images, clips and sounds.

A task names the published settings of each of its views, and a recipe what differs from them: `views: {blur: 0}` for
all views alike, `views: [{blur: 0}, {solarize: 0.5}]` for each in turn. A new kind of view is a class here with the
modality that it reads, and every task of the family then has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Self, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.ops.augment import (
    Interpolation,
    draw_crops,
    random_squares,
    random_views,
    resized_crop,
    squares_of_squeezed,
)
from mmssl.ops.augment_audio import mix_others, random_stretch, random_windows
from mmssl.ops.clips import draw_clip
from mmssl.ops.draws import Draws
from mmssl.ranges import AboveZero, BelowOne, Decibels, Part, Pixels, Positive, Share, Weight
from mmssl.registry import check_keywords

NO_SIZE = (
    "views: size, in pixels, is needed where data.image.fit is squeeze, about half of data.image.size; "
    "else nearly every crop is enlarged"
)

Given = dict[str, Any] | list[dict[str, Any]] | None
"""What a recipe may say of a task's views."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """One random crop of a picture, the only change that many tasks make before their own; a recipe calls it `views`.

    Of a picture that was squeezed (`data.image.fit: squeeze`) it is in the right shape, whatever is set here.

    Attributes:
        area: smallest and largest share of the picture that it covers, before it is resized; None for no resizing.
        flip: probability that it is mirrored; None for never.
        size: side of the square in pixels; that of the picture's short side where left out. Without an `area`, that of
            a square at a random place, and None for the whole picture, of a squeezed one the central square.
        interpolation: where it is resized.
        margin: share of each side that no crop sees, up to 0.4: signs in the corners are gone with 0.2, black borders
            with less. Everything above is of what is left.
    """

    area: tuple[Part, Part] | None = None
    flip: Share | None = None
    size: Pixels | None = None
    interpolation: Interpolation = "bilinear"
    margin: Annotated[float, Ge(0), Le(0.4)] = 0.0

    @classmethod
    def of(cls, published: Mapping[str, Any], views: Mapping[str, Any]) -> Self:
        """A task's published settings, with those that differ from them in the recipe.

        Raises:
            RecipeError: for an unknown setting.
        """
        return cls(**check_keywords(cls, {**published, **views}, "views"))

    def side(self, pictures: Tensor, aspect: Tensor | None) -> int:
        """Of the result, in pixels.

        Raises:
            RecipeError: where nobody says it: crops of the size of a squeezed picture would nearly all be enlarged.
        """
        if self.size is None and self.area is not None and aspect is not None:
            raise RecipeError(NO_SIZE)
        return self.size or min(self.inside(pictures).shape[-2:])

    def inside(self, pictures: Tensor) -> Tensor:
        """Without the margin, (..., h, w); a view of the same memory."""
        down, across = (round(self.margin * extent) for extent in pictures.shape[-2:])
        return pictures[..., down : pictures.shape[-2] - down, across : pictures.shape[-1] - across]

    def __call__(self, pictures: Tensor, draws: Draws, aspect: Tensor | None = None, *, square: bool = False) -> Tensor:
        """Images (B, 3, H, W), or clips (B, T, 3, H, W) with one crop for all frames, uint8 or floats in [0, 1].

        Args:
            pictures: what is cropped.
            draws: source of randomness.
            aspect: (B,), `image_aspect` of the batch where the pictures were squeezed.
            square: whether both directions are resized alike; else their ratio is drawn from 3/4 to 4/3.

        Returns:
            The same, cropped: floats in [0, 1] where they are resized.
        """
        side, boxes = self.side(pictures, aspect), None
        pictures = self.inside(pictures) if self.margin else pictures
        clips = pictures if pictures.ndim == 5 else pictures[:, None]
        height, width = clips.shape[-2:]
        if self.area is None and aspect is not None:
            boxes = squares_of_squeezed(pictures, aspect, side, None if self.size is None else draws)
        elif self.area is None and self.size is not None:
            clips = random_squares(clips, self.size, draws)
        mirrored = None if self.flip is None else draws.chance(self.flip)
        if self.area is not None:
            ratio = {"ratio": (1.0, 1.0)} if square else {}
            boxes = draw_crops(draws, 1, height, width, area=self.area, aspect=aspect, **ratio)[:, 0]
        if boxes is not None:
            flip = torch.zeros(len(clips), dtype=torch.bool, device=clips.device) if mirrored is None else mirrored
            cut = resized_crop(clips.flatten(1, 2), boxes, side, flip, self.interpolation)
            clips = cut.unflatten(1, clips.shape[1:3])
        elif self.flip and mirrored is not None:
            clips = torch.where(mirrored[:, None, None, None, None], clips.flip(-1), clips)
        elif self.size is None:
            return pictures
        return clips if pictures.ndim == 5 else clips[:, 0]


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """A crop, mirrored, recolored and blurred; the defaults are SimCLR's for ImageNet (arXiv 2002.05709, appendix A).

    Of a clip all frames alike, so that motion stays what it is (CVRL, arXiv 2008.03800, section 3.2).

    Attributes:
        frames: of a clip, how many a view takes in a row, each view from a moment of its own: two moments are then as
            far apart as CVRL draws them, less often the farther. All of the clip's, the same ones, where left out.
        size: in pixels, or below 1 as a share of that of the image, to the nearest whole number of the encoder's
            patches; that of the image where left out.
        area: smallest and largest share of the image that the crop covers.
        flip: probability that it is mirrored.
        jitter: probability of color jitter.
        strength: of color jitter, s in the paper; 0.5 for pictures of 32 pixels, which are not blurred either.
        saturation: reach of its jitter at strength 1.
        grayscale: probability.
        blur: probability.
        solarize: probability.
        interpolation: of the crop.
    """

    frames: Positive | None = None
    size: Annotated[float, Gt(0), Le(2**13)] | None = None
    area: tuple[Part, Part] = (0.08, 1.0)
    flip: Share = 0.5
    jitter: Share = 0.8
    strength: Share = 1.0
    saturation: Share = 0.8
    grayscale: Share = 0.2
    blur: Share = 0.5
    solarize: Share = 0.0
    interpolation: Interpolation = "bilinear"

    def draw(self, batch: Batch, draws: Draws, count: int, encoder: Encoder) -> list[Tensor]:
        """`image` (B, 3, H, W) -> [(B, count, 3, size, size)], `video` likewise; floats in [0, 1].

        Raises:
            RecipeError: for a squeezed image without a size, or a clip with fewer frames than a view takes.
        """
        settings, pictures = asdict(self), batch[encoder.modality]
        aspect = batch.get(f"{encoder.modality}_aspect")
        if aspect is not None and (self.size is None or self.size < 1):
            raise RecipeError(NO_SIZE)
        side, size, frames = min(pictures.shape[-2:]), settings.pop("size"), settings.pop("frames")
        if size is not None:
            patch = encoder.patch_size[-2] if encoder.patch_size else 1
            side = max(1, round((size * side if size < 1 else size) / patch)) * patch
        if frames is None:
            return [random_views(pictures, draws, count, side, aspect=aspect, **settings)]
        if frames > pictures.shape[1]:
            raise RecipeError(
                f"views: {frames} frames are more than a row's {pictures.shape[1]}; raise data.video.frames"
            )
        moments = [draw_clip(pictures, frames, draws) for _ in range(count)]
        return [torch.cat([random_views(one, draws, 1, side, aspect=aspect, **settings) for one in moments], dim=1)]


@dataclass(frozen=True, kw_only=True)
class AudioView:
    """A window, softer and with noise, whose log-mel spectrogram is cropped and resized in frequency and time.

    Two windows of one recording are COLA's pair (arXiv 2010.10915), the rest is BYOL-A's (arXiv 2103.06695). BYOL-A
    mixes other recordings in, by up to 0.4; white noise takes their place here unless `mix` is above 0. BYOL-A takes
    them from a memory of the last 2048 inputs. Here they are other rows of the same batch, over all processes: equally
    random, and nothing to be saved, where the size of a memory would not be known before there are data. As in the
    published code, normalized levels are mixed, which are nearer to each other than powers, so that a loud recording
    does not cover a soft one. An encoder of waveforms is given the window itself, with noise.

    Attributes:
        window: its length, as a share of the recording.
        attenuation: at most, in dB.
        noise: range of the ratio of signal to noise, in dB; None for no noise.
        mix: largest share of another recording that is mixed into the spectrogram; see `mix_others`.
        stretch: smallest and largest crop of the spectrogram, relative to its size, in frequency and time.
    """

    window: Part = 0.5
    attenuation: Weight = 6.0
    noise: tuple[Decibels, Decibels] | None = (10.0, 40.0)
    mix: BelowOne = 0.0
    stretch: tuple[AboveZero, AboveZero] = (0.6, 1.5)

    def draw(self, batch: Batch, draws: Draws, count: int, encoder: Encoder) -> list[Tensor]:
        """`audio` (B, S) -> [(B, count, M, T) spectrograms, bool (B, count, T), True for valid frames].

        For an encoder of waveforms [(B, count, W) samples, bool (B, count, W)].
        """
        audio, hearing = batch["audio"], cast(AudioEncoder, encoder)
        size = max(1, round(self.window * audio.shape[1]))
        windows, inside = random_windows(
            audio, batch.get("audio_mask"), draws, count, size, attenuation=self.attenuation, noise=self.noise
        )
        if not hearing.has_spectrogram:
            return [windows, inside]
        spectrograms = hearing.spectrogram(windows.flatten(0, 1)).unflatten(0, (-1, count))
        frames = hearing.valid_frames(inside.flatten(0, 1)).unflatten(0, (-1, count))
        frames = F.pad(frames, (0, spectrograms.shape[-1] - frames.shape[-1]))
        if self.mix:
            spectrograms = mix_others(spectrograms, frames, draws, self.mix)
        return list(random_stretch(spectrograms, frames, draws, self.stretch))


KINDS: dict[str, type[ImageView] | type[AudioView]] = {"image": ImageView, "video": ImageView, "audio": AudioView}


# BYOL's (arXiv 2006.07733, appendix B), which Barlow Twins and VICReg took over.
BYOL_VIEWS = (
    {"strength": 0.5, "saturation": 0.4, "blur": 1.0},
    {"strength": 0.5, "saturation": 0.4, "blur": 0.1, "solarize": 0.2},
)


class Views:
    """The random views of one task.

    Args:
        encoder: its modality decides the kind of view.
        given: by the recipe: settings for all views alike, or one mapping a view.
        count: number of views, V.
        **published: modality -> the settings of each view that differ from the defaults; fewer than V are repeated.
            Those of images are for clips, too.

    Attributes:
        needs: batch keys.
        mixes: whether a view of one row has something of another row in it.

    Raises:
        RecipeError: for a modality without views, an unknown setting, a wrong number of views, mixed waveforms, or
            frames of a picture.
    """

    def __init__(
        self, encoder: Encoder, given: Given, count: int = 2, **published: Sequence[Mapping[str, Any]]
    ) -> None:
        modality = encoder.modality
        if modality not in KINDS:
            raise RecipeError(f"there are views of {' and '.join(KINDS)}, and the encoder reads {modality}")
        if isinstance(given, list) and len(given) != count:
            raise RecipeError(f"views: {len(given)} are given, and the task has {count}")
        own = published.get("image" if modality == "video" else modality) or ({},)
        kind = KINDS[modality]
        each = [{**own[i % len(own)], **((given[i] if isinstance(given, list) else given) or {})} for i in range(count)]
        self.settings = [kind(**check_keywords(kind, one, "views")) for one in each]
        self.needs = (modality,)
        self.mixes = any(isinstance(one, AudioView) and one.mix > 0 for one in self.settings)
        if self.mixes and not cast(AudioEncoder, encoder).has_spectrogram:
            raise RecipeError(
                f"views: mix is of spectrograms, and {encoder.spec['model']} reads waveforms; leave it out"
            )
        if modality == "image" and any(isinstance(one, ImageView) and one.frames for one in self.settings):
            raise RecipeError("views: frames are of clips, and the encoder reads images; leave it out")

    def __call__(self, batch: Batch, draws: Draws, encoder: Encoder) -> list[Tensor]:
        """The views (B, V, ...), and of sounds the valid frames (B, V, T): what `encode_views` takes after the encoder.

        Raises:
            RecipeError: for views of several sizes.
        """
        parts, start = [], 0
        for i in range(1, len(self.settings) + 1):  # neighbors of equal settings are drawn together
            if i == len(self.settings) or self.settings[i] != self.settings[start]:
                parts.append(self.settings[start].draw(batch, draws, i - start, encoder))
                start = i
        shapes = {tuple(part[0].shape[2:]) for part in parts}
        if len(shapes) > 1:
            raise RecipeError(f"views: all need one size, these have {' and '.join(map(str, sorted(shapes)))}")
        return [torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True)]


def encode_views(encoder: nn.Module, views: Tensor, valid: Tensor | None = None) -> Tensor:
    """Pooled vectors (B, V, D) of views (B, V, ...): all of them in one pass, so that BatchNorm sees all."""
    inside = None if valid is None else valid.flatten(0, 1)
    pooled: Tensor = encoder(views.flatten(0, 1), inside).pooled
    return pooled.unflatten(0, views.shape[:2])
