"""Which places of an input a task hides that predicts tokens of a network, not the input: patches, words or frames.

Each class here does for one kind of input what the task asks for: hide some of it, read what is left, hand the whole to
a teacher. The encoder stays outside of it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mmssl.batch import Batch, valid_tokens
from mmssl.encoders.audio import AudioEncoder
from mmssl.encoders.base import Encoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.modules.pictures import check_patches, cut, read_picture
from mmssl.modules.views import Crop
from mmssl.modules.vocabulary import Vocabulary
from mmssl.objectives.base import Panel
from mmssl.objectives.reconstruction._masked_frames import hide_frames, most_hidden, read_frames, sound_panels
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.masking import KEPT, SMALLEST_BLOCK, mask_blocks
from mmssl.ops.patches import unpatchify
from mmssl.ops.words import as_places


class MaskedPatches(nn.Module):
    """Blocks of patches of images or spectrograms under a mask token: BEiT's (arXiv 2106.08254, algorithm 1).

    Args:
        task: its name, for errors.
        network: of images or sound, a plain vision transformer.
        mask_ratio: share of the patches that is hidden.
        crop: of images.
    """

    def __init__(self, task: str, network: Encoder, mask_ratio: float, crop: Crop) -> None:
        super().__init__()
        self.task, self.mask_ratio, self.crop, self.patch = task, mask_ratio, crop, check_patches(task, network)
        self.mask_token = nn.Parameter(torch.zeros(network.width or network.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def hide(self, network: Encoder, batch: Batch, draws: Draws) -> Batch:
        """The picture, which of its places are `hidden` (B, N), and `valid`, see `Data2Vec.transform`."""
        picture, pixels, valid = read_picture(network, batch, draws, self.crop)
        grid = cast(tuple[int, int], cut(self.task, pixels.shape[2:], self.patch))
        if min(grid) < 2:
            raise RecipeError(f"{self.task}: blocks cannot be hidden in a grid of {grid[0]} x {grid[1]} patches")
        number = grid[0] * grid[1]
        total = max(1, round(self.mask_ratio * number))
        hidden = mask_blocks(grid, total, draws, smallest=max(1, round(SMALLEST_BLOCK * number)))
        valid = torch.ones_like(hidden) if valid is None else valid
        places, chosen = as_places(hidden & valid, total)
        return {
            network.modality: picture,
            "hidden": hidden,
            "valid": valid,
            "places": places,
            "chosen": chosen,
            "scored": chosen.sum(),
        }

    def read(self, network: Encoder, inputs: Batch) -> Tensor:
        """What the network makes of all places, (B, N, D), where some are hidden."""
        return network.encode(network.embed(inputs[network.modality], inputs["hidden"], self.mask_token)).tokens

    def whole(self, network: Encoder, inputs: Batch) -> tuple[Tensor, Tensor | None]:
        """What a teacher reads; padding is silence that may be seen."""
        return inputs[network.modality], None

    def concealed(self, network: Encoder, inputs: Batch) -> dict[str, Any]:
        """For `Concealed`: the pixels of hidden patches."""
        return {"hidden": {network.modality: self._pixels(network, inputs)}}

    def _pixels(self, network: Encoder, inputs: Batch) -> Tensor:
        """Bool like the picture, True where it is hidden."""
        picture, hidden = inputs[network.modality], inputs["hidden"]
        channels = 1 if network.modality == "audio" else picture.shape[-3]
        patches = hidden[:, :, None].expand(-1, -1, channels * self.patch[0] * self.patch[1]).float()
        mask = unpatchify(patches, self.patch, (picture.shape[-2], picture.shape[-1])) > 0
        return mask[:, 0] if network.modality == "audio" else mask

    def panels(self, network: Encoder, inputs: Batch) -> list[Panel]:
        """The picture, and what is seen of it."""
        picture, scale = inputs[network.modality], network.scale(inputs[network.modality][0])
        shown = picture if network.modality == "audio" else as_floats(picture)
        gray = shown.mean() if network.modality == "audio" else 0.5
        seen = torch.where(self._pixels(network, inputs), gray, shown)
        return [Panel("original", list(shown), scale=scale), Panel("seen", list(seen), scale=scale)]


class MaskedWords(nn.Module):
    """Tokens of a text as BERT hides them, a tenth of which stays as it is.

    Args:
        task: its name, for errors.
        network: of texts, whose tokenizer has a mask token.
        name: its name in the recipe, for errors.
        mask_ratio: share of a text's tokens.
    """

    def __init__(self, task: str, network: TextEncoder, name: str, mask_ratio: float) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.vocabulary = Vocabulary(network, name, task)

    def hide(self, network: Encoder, batch: Batch, draws: Draws) -> Batch:
        """`text` as it is seen (B, L), as it was, `whole`, and what is `valid` of it."""
        text, valid = batch["text"], valid_tokens(batch)
        places, chosen = self.vocabulary.choose(text, valid, self.mask_ratio, draws)
        seen = self.vocabulary.corrupt(text, places, chosen, draws)
        return {"text": seen, "whole": text, "valid": valid, "places": places, "chosen": chosen, "scored": chosen.sum()}

    def read(self, network: Encoder, inputs: Batch) -> Tensor:
        """See `MaskedPatches`."""
        return cast(Tensor, network(inputs["text"], inputs["valid"]).tokens)

    def whole(self, network: Encoder, inputs: Batch) -> tuple[Tensor, Tensor | None]:
        """See `MaskedPatches`."""
        return inputs["whole"], inputs["valid"]

    def concealed(self, network: Encoder, inputs: Batch) -> dict[str, Any]:
        """For `Concealed`: the text as it was."""
        chosen, whole = inputs["chosen"], inputs["whole"]
        kept = (inputs["text"] == whole).gather(1, inputs["places"])[chosen]
        return {"hidden": {"whole": torch.ones_like(whole, dtype=torch.bool)}, "shown": kept, "allowed": KEPT}

    def panels(self, network: Encoder, inputs: Batch) -> list[Panel]:
        """The text, and what is seen of it."""
        decode = self.vocabulary.tokenizer.decode

        def texts(ids: Tensor) -> list[Tensor | str]:
            return [decode(row[kept]) for row, kept in zip(ids, inputs["valid"], strict=True)]

        return [Panel("original", texts(inputs["whole"])), Panel("seen", texts(inputs["text"]))]


class MaskedWaves(nn.Module):
    """Spans of frames of a waveform under a mask token, as wav2vec 2.0 hides them.

    Args:
        network: of waveforms.
        mask_probability: see `mask_spans`.
        mask_length: of a span, in frames.
    """

    def __init__(self, network: AudioEncoder, mask_probability: float, mask_length: int) -> None:
        super().__init__()
        self.mask_probability, self.mask_length = mask_probability, mask_length
        self.mask_token = nn.Parameter(torch.rand(network.waves.dim))

    def hide(self, network: Encoder, batch: Batch, draws: Draws) -> Batch:
        """`audio` (B, S), with `audio_mask` where the batch has it, which frames are `hidden` (B, N), and `valid`."""
        hearing = cast(AudioEncoder, network)
        inputs, valid = hide_frames(hearing, batch, self.mask_probability, self.mask_length, draws)
        slots = most_hidden(valid.shape[1], self.mask_probability, self.mask_length)
        places, chosen = as_places(inputs["hidden"], slots)
        return inputs | {"valid": valid, "places": places, "chosen": chosen, "scored": chosen.sum()}

    def read(self, network: Encoder, inputs: Batch) -> Tensor:
        """See `MaskedPatches`."""
        return read_frames(cast(AudioEncoder, network), inputs, self.mask_token)[1]

    def whole(self, network: Encoder, inputs: Batch) -> tuple[Tensor, Tensor | None]:
        """See `MaskedPatches`."""
        return inputs["audio"], inputs.get("audio_mask")

    def concealed(self, network: Encoder, inputs: Batch) -> dict[str, Any]:
        """For `Concealed`: nothing that could be named, since frames that are seen overlap those that are not."""
        return {}

    def panels(self, network: Encoder, inputs: Batch) -> list[Panel]:
        """The sound, and what is seen of it."""
        return sound_panels(cast(AudioEncoder, network), inputs)


Masked = MaskedPatches | MaskedWords | MaskedWaves
