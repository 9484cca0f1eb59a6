"""Which patches of a picture, clip or spectrogram are hidden, and how far off is what is said of their pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.encoders.image import ImageEncoder
from mmssl.encoders.video import VideoEncoder
from mmssl.errors import RecipeError
from mmssl.modules.pictures import as_read, channels_first, check_patches
from mmssl.objectives.base import Panel
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over
from mmssl.ops.masking import take
from mmssl.ops.patches import patchify, standardize, standardize_colors, unpatchify

MASK_RATIO = {"mae": 0.75, "videomae": 0.9, "simmim": 0.6}
SIMMIM_BLOCK = 32


class HiddenPixels:
    """Patches of what one encoder reads that are hidden, and the error of their pixels; see `masked_autoencoder`.

    Args:
        task: its name, for errors.
        name: of the encoder.
        network: the encoder, whose parameters are the task's.
        form: `mae`, `videomae` or `simmim`.
        mask_ratio: share of the patches that is hidden; the form's where left out.
        block: side in pixels of what is hidden together; the form's where left out.
        tube: of clips, whether the same places are hidden in all frames; the form's where left out.
        norm_pix: whether a patch is predicted less its mean, over its standard deviation; the form's where left out.

    Attributes:
        values: d, numbers in a patch.

    Raises:
        RecipeError: for an encoder without patches, or settings that do not fit it.
    """

    divisors = ("scored_patches", "constant_error")

    def __init__(
        self,
        task: str,
        name: str,
        network: Encoder,
        *,
        form: Literal["mae", "videomae", "simmim"] = "mae",
        mask_ratio: float | None = None,
        block: int | None = None,
        tube: bool | None = None,
        norm_pix: bool | None = None,
    ) -> None:
        self.task, self.network, self.form, self.modality = task, network, form, network.modality
        if self.modality not in ("image", "audio", "video"):
            raise RecipeError(f"{task} reads images, clips and sound, and the encoder '{name}' reads {self.modality}")
        if (tube or form == "videomae") and self.modality != "video":
            raise RecipeError(f"{task}: tube is for clips, whose frames hide the same places, and so is videomae")
        self.patch = check_patches(task, network)
        self.mask_ratio = MASK_RATIO[form] if mask_ratio is None else mask_ratio
        self.norm_pix = form != "simmim" if norm_pix is None else norm_pix
        self.tube = form == "videomae" if tube is None else tube
        sides = (block, block) if block else (SIMMIM_BLOCK, SIMMIM_BLOCK) if form == "simmim" else self.patch[-2:]
        if any(side % patch for side, patch in zip(sides, self.patch[-2:], strict=True)):
            raise RecipeError(f"{task}: block = {sides[0]} pixels is not a multiple of the patch, {self.patch[-2:]}")
        self.block = tuple(side // patch for side, patch in zip(sides, self.patch[-2:], strict=True))
        self.values = (1 if self.modality == "audio" else 3) * math.prod(self.patch)

    def hide(self, picture: Tensor, pixels: Tensor, valid: Tensor | None, draws: Draws) -> Batch:
        """What `read_picture` returns -> what is read, what of it is seen, targets.

        `image`, `video` or `audio`, the picture; `seen` (B, K) and `hidden` (B, M) places in the grid of patches;
        `target` (B, M, d), and `scored` (B, M), False for padding; the divisors.
        """
        grid = self._cut(pixels.shape[2:])
        time = grid[:-2] if self.tube else (1,) * len(grid[:-2])
        unit = (*time, *self.block)
        block = tuple(n * size for n, size in zip(unit, self.patch, strict=True))
        if any(extent % size for extent, size in zip(pixels.shape[2:], block, strict=True)):
            raise RecipeError(
                f"{self.task}: {' x '.join(map(str, pixels.shape[2:]))} pixels cannot be cut into blocks of "
                f"{' x '.join(map(str, block))}"
            )
        # Which patches make a block: what `patchify` makes of their numbers.
        patches = patchify(torch.arange(math.prod(grid), device=pixels.device).view(1, 1, *grid), unit)[0]
        number = len(patches)
        # MAE's code rounds down what is seen, VideoMAE's what is hidden: 20 places of 196, not 19.
        hide = int(number * self.mask_ratio)
        keep = number - hide if self.form == "videomae" else int(number * (1 - self.mask_ratio))
        if not 0 < keep < number:
            raise RecipeError(
                f"{self.task}: mask_ratio = {self.mask_ratio} leaves {keep} of {number} blocks visible, and some "
                "should be and some not; change mask_ratio, or take larger pictures or smaller patches"
            )
        order = draws.uniform(number).argsort(dim=1, stable=True)
        seen, hidden = patches[order[:, :keep]].flatten(1), patches[order[:, keep:]].flatten(1)
        target = take(patchify(pixels, self.patch), hidden)
        if self.norm_pix:
            target = self._normalized(target)
        scored = torch.ones_like(hidden, dtype=torch.bool) if valid is None else valid.gather(1, hidden)
        weight = scored[:, :, None].to(target.dtype)
        mean = (target * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        constant = torch.zeros_like(mean) if self.norm_pix else mean
        return {
            self.modality: picture,
            "seen": seen,
            "hidden": hidden,
            "target": target,
            "scored": scored,
            "scored_patches": scored.sum(),
            # What relative_error divides by; like the number of patches, it is one of the whole batch.
            "constant_error": (self._error(constant, target) * scored).sum(),
        }

    def grid(self, picture: Tensor) -> tuple[int, ...]:
        """Numbers of patches of what the encoder reads."""
        return self._cut(channels_first(picture, self.modality).shape[2:])

    def scores(self, pixels: Tensor, inputs: Batch) -> dict[str, Tensor]:
        """Error of the hidden patches `pixels` (B, M, d), and its ratio to that of the mean."""
        scored = inputs["scored"]
        error = self._error(pixels, inputs["target"])
        return {
            "loss": mean_over(error, scored, inputs["scored_patches"]),
            "relative_error": mean_over(error.detach(), scored, inputs["constant_error"]),
        }

    def concealed(self, inputs: Batch) -> dict[str, Tensor]:
        """What of the inputs no answer may depend on; see `Concealed`."""
        picture, hidden, target = inputs[self.modality], inputs["hidden"], inputs["target"]
        extents = tuple(channels_first(picture, self.modality).shape[2:])
        patches = target.new_zeros(len(target), math.prod(self._cut(extents)), target.shape[2])
        mask = unpatchify(patches.scatter(1, hidden[:, :, None].expand_as(target), 1.0), self.patch, extents) > 0
        return {self.modality: as_read(mask, self.modality), "target": torch.ones_like(target, dtype=torch.bool)}

    def panels(self, answer: Tensor, inputs: Batch) -> list[Panel]:
        """What is seen, the answer (B, M, d), and what was there; normalized if the task is."""
        picture, hidden = inputs[self.modality], inputs["hidden"]
        original = channels_first(picture, self.modality)
        if self.modality == "audio":
            pixels, scale, shift = original, original.new_tensor(1.0), original.new_tensor(0.0)
        else:
            encoder = cast(ImageEncoder | VideoEncoder, self.network)
            pixels, original = encoder.prepare(picture)[0], as_floats(original)
            constants = (encoder.normalize.std, encoder.normalize.mean)
            scale, shift = (values.view(-1, *[1] * len(self.patch)) for values in constants)
        patches, visible = patchify(pixels, self.patch), patchify(original, self.patch)
        if self.norm_pix:
            patches, scale, shift = self._normalized(patches), scale.new_tensor(0.2), scale.new_tensor(0.5)

        def put(values: Tensor, into: Tensor) -> Tensor:
            whole = into.scatter(1, hidden[:, :, None].expand_as(values), values.to(into.dtype))
            return unpatchify(whole, self.patch, tuple(original.shape[2:]))

        blank = torch.full_like(take(visible, hidden), float(original.float().mean()))
        kind = "normalized " if self.norm_pix else ""
        pictures = {
            "input": put(blank, visible),
            f"{kind}prediction": put(answer, patches) * scale + shift,
            f"{kind}target": put(inputs["target"], patches) * scale + shift,
        }
        if self.norm_pix:
            pictures["original"] = original
        seen = {name: as_read(pixels, self.modality) for name, pixels in pictures.items()}
        axes = self.network.scale(seen["input"][0])
        return [Panel(name, list(p), scale=axes) for name, p in seen.items()]

    def _cut(self, extents: Sequence[int]) -> tuple[int, ...]:
        return tuple(extent // size for extent, size in zip(extents, self.patch, strict=True))

    def _error(self, pixels: Tensor, target: Tensor) -> Tensor:
        """(B, M): squared error, or absolute (simmim), a mean over the pixels of each patch."""
        difference = pixels - target
        return (difference.abs() if self.form == "simmim" else difference.square()).mean(2)

    def _normalized(self, patches: Tensor) -> Tensor:
        """(..., d) less their mean, over their deviation: of all of a patch, or (videomae) of each of its colors."""
        return standardize_colors(patches) if self.form == "videomae" else standardize(patches)
