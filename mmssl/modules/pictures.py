"""What a network of patches sees: an image, cropped, or the spectrogram of a sound."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder, places
from mmssl.encoders.image import ImageEncoder
from mmssl.ops.augment import draw_crops, resized_crop
from mmssl.ops.draws import Draws


def read_picture(
    encoder: Encoder,
    batch: Batch,
    draws: Draws,
    *,
    area: tuple[float, float] | None,
    flip: float,
    size: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images, cropped and mirrored, or the spectrograms of sounds.

    Args:
        encoder: of images or sound, a network of patches.
        batch: has `image`, or `audio` and perhaps `audio_mask`.
        draws: source of randomness.
        area: smallest and largest share of an image that its crop covers; None for no crop.
        flip: probability that an image is mirrored.
        size: of a crop, in pixels; the image's short side where None.

    Returns:
        What the encoder reads, image (B, 3, h, w) or spectrogram (B, mels, frames); its pixels as the network sees them
        (B, C, h, w); and bool (B, N), False for places that are padding, or None where there is none.
    """
    if encoder.modality == "audio":
        hearing = cast(AudioEncoder, encoder)
        assert hearing.patch_size is not None  # checked when a task is built
        picture = hearing.spectrogram(batch["audio"])
        if "audio_mask" not in batch:
            return picture, picture[:, None], None
        frames = hearing.valid_frames(batch["audio_mask"])
        frames = nn.functional.pad(frames, (0, picture.shape[2] - frames.shape[1]))
        grid = (picture.shape[1] // hearing.patch_size[0], picture.shape[2] // hearing.patch_size[1])
        return picture, picture[:, None], places(frames, grid)
    images = batch["image"]
    height, width = images.shape[-2:]
    mirrored = draws.chance(flip)
    if area is None:
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    else:
        boxes = draw_crops(draws, 1, height, width, area=area)[:, 0]
        images = resized_crop(images, boxes, size or min(height, width), mirrored)
    return images, cast(ImageEncoder, encoder).normalize(images), None
