"""What a network of patches sees: an image, cropped, or the spectrogram of a sound."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders._network import NetworkEncoder
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder, places
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
    """Images or clips, cropped and mirrored, or the spectrograms of sounds.

    Args:
        encoder: of images, clips or sound, a network of patches.
        batch: has `image` or `video`, or `audio` and perhaps `audio_mask`.
        draws: source of randomness.
        area: smallest and largest share of an image that its crop covers, the same one in all frames of a clip; None
            for no crop.
        flip: probability that an image or a clip is mirrored.
        size: of a crop, in pixels; the image's short side where None.

    Returns:
        What the encoder reads, image (B, 3, h, w), clip (B, T, 3, h, w) or spectrogram (B, mels, frames); its pixels as
        the network sees them, (B, C, h, w) or (B, C, T, h, w); and bool (B, N), False for places that are padding, or
        None where there is none.
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
    images = batch[encoder.modality]
    height, width = images.shape[-2:]
    mirrored = draws.chance(flip)
    if area is None:
        images = torch.where(mirrored.view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)
    else:
        boxes = draw_crops(draws, 1, height, width, area=area)[:, 0]
        number = images.shape[1] if images.ndim == 5 else 1  # frames
        each = (boxes.repeat_interleave(number, 0), size or min(height, width), mirrored.repeat_interleave(number, 0))
        images = resized_crop(images.flatten(0, -4), *each).reshape(*images.shape[:-2], each[1], each[1])
    return images, cast(NetworkEncoder, encoder).prepare(images)[0], None
