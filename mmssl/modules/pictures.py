"""What a network of patches sees: an image, cropped, or the spectrogram of a sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders._network import NetworkEncoder
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder, places
from mmssl.errors import RecipeError
from mmssl.modules.views import Crop
from mmssl.ops.draws import Draws


def check_patches(task: str, network: Encoder) -> tuple[int, ...]:
    """Extent of the patches of a network, any of which can be left out.

    Raises:
        RecipeError: where it has none, naming the task.
    """
    if not network.subsets or network.patch_size is None:
        raise RecipeError(
            f"{task} hides patches, and {network.spec['model']} does not read patch by patch, or its patches overlap; "
            "take a plain vision transformer, such as timm/vit_tiny_patch16_224"
        )
    return network.patch_size


def cut(task: str, extents: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Numbers of patches along each side of a picture of so many pixels.

    Raises:
        RecipeError: where some pixels are left over, naming the task.
    """
    if any(extent % size for extent, size in zip(extents, patch, strict=True)):
        raise RecipeError(
            f"{task}: {' x '.join(map(str, extents))} pixels cannot be cut into patches of "
            f"{' x '.join(map(str, patch))}"
        )
    return tuple(extent // size for extent, size in zip(extents, patch, strict=True))


def channels_first(picture: Tensor, modality: str) -> Tensor:
    """What an encoder reads, image, clip or spectrogram, -> (B, C, h, w), or (B, C, T, h, w) of a clip."""
    return picture[:, None] if modality == "audio" else picture.transpose(1, -3)


def as_read(pixels: Tensor, modality: str) -> Tensor:
    """The inverse of `channels_first`."""
    return pixels[:, 0] if modality == "audio" else pixels.transpose(1, -3)


def read_picture(encoder: Encoder, batch: Batch, draws: Draws, crop: Crop) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images or clips, cropped and mirrored, or the spectrograms of sounds.

    Args:
        encoder: of images, clips or sound, a network of patches.
        batch: has `image` or `video`, or `audio` and perhaps `audio_mask`.
        draws: source of randomness.
        crop: of images and clips.

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
    # Places are drawn afterwards: by the same numbers whether or not pictures are mirrored.
    aspect = batch.get(f"{encoder.modality}_aspect")
    pictures = replace(crop, flip=crop.flip or 0.0)(batch[encoder.modality], draws, aspect)
    return pictures, cast(NetworkEncoder, encoder).prepare(pictures)[0], None
