"""What tasks share that hide spans of frames of a sound from a transformer on waveforms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Objective, Panel
from mmssl.ops.draws import Draws
from mmssl.ops.masking import mask_spans, most_spans

if TYPE_CHECKING:
    from mmssl.encoders.backbones._transformers_waves import WaveTransformer


class MaskedFrames(Objective):
    """Hide spans of frames, and read what is left.

    Args:
        encoders: holds the encoder.
        encoder: its name.
        mask_probability: see `mask_spans`.
        mask_length: of a span, in frames.
    """

    needs = ("audio",)

    def __init__(
        self, encoders: Mapping[str, Encoder], encoder: str, mask_probability: float, mask_length: int
    ) -> None:
        super().__init__(encoders)
        self.name, self.mask_probability, self.mask_length = encoder, mask_probability, mask_length
        self.encoder(encoder, "audio")
        self.mask_token = nn.Parameter(torch.rand(self.waves.dim))

    @property
    def network(self) -> AudioEncoder:
        """The encoder."""
        return cast(AudioEncoder, self.encoder(self.name))

    @property
    def waves(self) -> WaveTransformer:
        """Its network."""
        return self.network.waves

    @torch.no_grad()
    def hide(self, batch: Batch, draws: Draws) -> tuple[Batch, Tensor]:
        """See `hide_frames`."""
        return hide_frames(self.network, batch, self.mask_probability, self.mask_length, draws)

    def most_hidden(self, frames: int) -> int:
        """See the function of that name."""
        return most_hidden(frames, self.mask_probability, self.mask_length)

    def read(self, inputs: Batch) -> tuple[Tensor, Tensor]:
        """See `read_frames`."""
        return read_frames(self.network, inputs, self.mask_token)

    def sounds(self, inputs: Batch) -> list[Panel]:
        """See `sound_panels`."""
        return sound_panels(self.network, inputs)


def hide_frames(
    network: AudioEncoder, batch: Batch, probability: float, length: int, draws: Draws
) -> tuple[Batch, Tensor]:
    """`audio` (B, S), with `audio_mask` where the batch has it, and `hidden` (B, N); and the valid frames (B, N).

    Args:
        network: of waveforms.
        batch: of sounds.
        probability: see `mask_spans`.
        length: of a span, in frames.
        draws: source of randomness.

    Raises:
        RecipeError: for sounds of fewer frames than a span.
    """
    audio = batch["audio"]
    mask = batch.get("audio_mask", torch.ones_like(audio, dtype=torch.bool))
    shortest = network.waves.reach + (length - 1) * network.waves.stride
    if audio.shape[1] < shortest:
        raise RecipeError(
            f"a span of mask_length = {length} frames is {shortest} samples, and the sounds have "
            f"{audio.shape[1]}; raise data.audio.seconds or lower mask_length"
        )
    valid = network.valid_frames(mask)
    inputs = {key: batch[key] for key in ("audio", "audio_mask") if key in batch}
    return inputs | {"hidden": mask_spans(valid, probability, length, draws)}, valid


def most_hidden(frames: int, probability: float, length: int) -> int:
    """How many of so many frames are hidden at most."""
    return min(frames, length * most_spans(frames, probability, length))


def read_frames(network: AudioEncoder, inputs: Batch, mask_token: Tensor) -> tuple[Tensor, Tensor]:
    """The frames (B, N, C) of all of a sound, and what the transformer makes of those not hidden, (B, N, D)."""
    frames, valid = network.frames(inputs["audio"], inputs.get("audio_mask"))
    tokens = network.embed(frames, inputs["hidden"], mask_token)
    return frames, network.encode(tokens, valid).tokens


def sound_panels(network: AudioEncoder, inputs: Batch) -> list[Panel]:
    """The sound, and what is seen of it: silence where no frame is seen."""
    audio, samples = inputs["audio"], inputs["audio"].shape[1]
    seen = (~inputs["hidden"]).repeat_interleave(network.waves.stride, dim=1)
    seen = F.pad(seen, (0, max(0, samples - seen.shape[1])), value=True)[:, :samples]
    scale = network.scale(audio[0])
    return [Panel("sound", list(audio), scale=scale), Panel("seen", list(audio * seen), scale=scale)]
