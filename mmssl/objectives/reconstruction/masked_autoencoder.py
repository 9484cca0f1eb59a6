"""Masked autoencoding: what do the hidden patches of this image, this clip or this sound's spectrogram look like?

He, Chen, Xie, Li, Dollár & Girshick 2021, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377 (form
`mae`): three quarters of the patches are left out, the encoder reads the rest, and a small transformer, which is thrown
away afterwards, predicts the pixels of the hidden ones from that and a shared mask token. Of a spectrogram, AudioMAE
(arXiv 2207.06405) hides 80 % and predicts levels as they are: `mask_ratio: 0.8, norm_pix: false`; its decoder of local
windows is not followed. Of a clip, Tong, Song, Wang & Wang 2022, "VideoMAE", arXiv 2203.12602 (form `videomae`), hide
90 % of the patches, the same places in all frames; each color of a patch is predicted less its own mean, over its own
standard deviation, and the decoder sees no pooled vector. Feichtenhofer et al. 2022 (arXiv 2205.09113) draw places
anywhere in space and time: `mask_ratio: 0.9` in the form `mae`. Xie et al. 2021, "SimMIM", arXiv 2111.09886 (form
`simmim`): blocks of 32 pixels are replaced by a mask token before positions are added, the encoder reads all places,
and a linear layer predicts the pixels.

The encoder stays the library's plain transformer. MAE freezes its positions at sines and cosines; here those of the
encoder are what its library makes them, learned, so that pretrained ones stay and other tasks may share it. The
decoder's are fixed. Where MAE hands the class token to the decoder, the pooled vector goes: for a network that pools by
its class token that is the same, and in any other its pooling is trained as well. SimMIM trains no pooling: an encoder
with weights there (a norm after an average, an attention pool) cannot learn them from it, and neither does VideoMAE.

Known traps. The loss is of hidden patches alone; visible ones are not predicted, and look bad where they are. The mean
and variance of `norm_pix` are the target's own: a picture that is scaled back by them shows what the network was not
told, so that normalized patches are drawn as they are. Hiding is by rank of noise, the same number in each row. Padding
after the end of a sound may be seen, as silence, and is never scored. Crops are resized bilinearly, not bicubically.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.encoders.image import ImageEncoder
from mmssl.encoders.video import VideoEncoder
from mmssl.errors import RecipeError
from mmssl.modules.decoders import PatchDecoder
from mmssl.modules.pictures import read_picture
from mmssl.modules.views import Crop
from mmssl.objectives._concealed import Concealed
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.ops.color import as_floats
from mmssl.ops.draws import Draws
from mmssl.ops.losses import mean_over
from mmssl.ops.masking import take
from mmssl.ops.patches import patchify, standardize, standardize_colors, unpatchify
from mmssl.ranges import Pixels, Positive, Ratio, Width

MASK_RATIO = {"mae": 0.75, "videomae": 0.9, "simmim": 0.6}
SIMMIM_BLOCK = 32
VIEWS = {"area": (0.2, 1.0), "flip": 0.5}


class MaskedAutoencoder(Objective):
    """Regress the pixels of hidden patches.

    Args:
        encoders: holds the encoder, a transformer whose tokens are patches.
        encoder: its name; whether it reads images, clips or sound decides what a patch is.
        form: `mae`, `videomae`, or `simmim`.
        mask_ratio: share of the patches that is hidden; 0.75 (mae), 0.9 (videomae) or 0.6 (simmim) where left out.
        block: side in pixels of what is hidden together; 32 (simmim) or one patch where left out.
        tube: of clips, whether the same places are hidden in all frames; in videomae where left out.
        norm_pix: whether a patch (videomae: each of its colors) is predicted less its mean, over its standard
            deviation; in mae and videomae where left out.
        views: of images and clips: how they are cropped, see `Crop` (simmim: with an area from 0.67).
        decoder_depth: blocks of the decoder of mae and videomae.
        decoder_width: their width.
        decoder_heads: their attention heads.
    """

    divisors = ("scored_patches", "constant_error")

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        encoder: str = "image",
        form: Literal["mae", "videomae", "simmim"] = "mae",
        mask_ratio: Ratio | None = None,
        block: Pixels | None = None,
        tube: bool | None = None,
        norm_pix: bool | None = None,
        views: dict[str, Any] = VIEWS,
        decoder_depth: Positive = 8,
        decoder_width: Width = 512,
        decoder_heads: Positive = 16,
    ) -> None:
        super().__init__(encoders)
        network = self.encoder(encoder)
        self.modality = network.modality
        if self.modality not in ("image", "audio", "video"):
            raise RecipeError(
                f"masked_autoencoder reads images, clips and sound, and the encoder '{encoder}' reads {self.modality}"
            )
        if (tube or form == "videomae") and self.modality != "video":
            raise RecipeError(
                "masked_autoencoder: tube is for clips, whose frames hide the same places, and so is videomae"
            )
        if not network.subsets or network.patch_size is None:
            raise RecipeError(
                f"masked_autoencoder hides patches, and {network.spec['model']} does not read patch by patch, or its "
                "patches overlap; "
                "take a plain vision transformer, such as timm/vit_tiny_patch16_224"
            )
        self.needs = (self.modality,)
        self.name, self.form, self.patch = encoder, form, network.patch_size
        self.mask_ratio = MASK_RATIO[form] if mask_ratio is None else mask_ratio
        self.norm_pix = form != "simmim" if norm_pix is None else norm_pix
        self.crop = Crop.of(VIEWS, views)
        self.tube = form == "videomae" if tube is None else tube
        sides = (block, block) if block else (SIMMIM_BLOCK, SIMMIM_BLOCK) if form == "simmim" else self.patch[-2:]
        if any(side % patch for side, patch in zip(sides, self.patch[-2:], strict=True)):
            raise RecipeError(
                f"masked_autoencoder: block = {sides[0]} pixels is not a multiple of the patch, {self.patch[-2:]}"
            )
        self.block = tuple(side // patch for side, patch in zip(sides, self.patch[-2:], strict=True))
        pixels = (1 if self.modality == "audio" else 3) * math.prod(self.patch)
        if form != "simmim":
            if decoder_width % 4 or decoder_width % decoder_heads:
                raise RecipeError(
                    f"masked_autoencoder: decoder_width = {decoder_width} should be a multiple of 4 and of "
                    f"decoder_heads = {decoder_heads}"
                )
            self.decoder = PatchDecoder(
                network.dim, pixels, decoder_depth, decoder_width, decoder_heads, pooled=form == "mae"
            )
        else:
            self.mask_token = nn.Parameter(torch.zeros(network.width or network.dim))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
            self.head = nn.Linear(network.dim, pixels)

    def chance(self, rows: int) -> Chance:
        """The error of the mean: of each patch with `norm_pix`, of a row's hidden patches without.

        With `norm_pix` the loss of the mean is (d - 1) / d for patches of d pixels (videomae: of d pixels a color),
        because their variance is the unbiased one; that of a patch of one color is 0, so that a level of the loss
        depends on the pictures.
        """
        return Chance(None, {"relative_error": 1.0})

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, W), `video` (B, T, 3, H, W) or `audio` (B, S) -> what is read, what of it is seen, targets.

        `image` (B, 3, h, w) or `video` (B, T, 3, h, w) in [0, 1], or `audio` (B, mels, frames); `seen` (B, K) and
        `hidden` (B, M) places in the grid of patches; `target` (B, M, d), and `scored` (B, M), False for padding.
        """
        picture, pixels, valid = read_picture(self.encoder(self.name), batch, draws, self.crop)
        grid = self._grid(pixels.shape[2:])
        time = grid[:-2] if self.tube else (1,) * len(grid[:-2])
        unit = (*time, *self.block)
        block = tuple(n * size for n, size in zip(unit, self.patch, strict=True))
        if any(extent % size for extent, size in zip(pixels.shape[2:], block, strict=True)):
            raise RecipeError(
                f"masked_autoencoder: {' x '.join(map(str, pixels.shape[2:]))} pixels cannot be cut into blocks of "
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
                f"masked_autoencoder: mask_ratio = {self.mask_ratio} leaves {keep} of {number} blocks visible, and "
                "some should be and some not; change mask_ratio, or take larger pictures or smaller patches"
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

    def _grid(self, extents: Sequence[int]) -> tuple[int, ...]:
        return tuple(extent // size for extent, size in zip(extents, self.patch, strict=True))

    def _channels_first(self, picture: Tensor) -> Tensor:
        """What the encoder reads -> (B, C, h, w), or (B, C, T, h, w)."""
        return picture[:, None] if self.modality == "audio" else picture.transpose(1, -3)

    def _error(self, pixels: Tensor, target: Tensor) -> Tensor:
        """(B, M): squared error, or absolute (simmim), a mean over the pixels of each patch."""
        difference = pixels - target
        return (difference.abs() if self.form == "simmim" else difference.square()).mean(2)

    def _normalized(self, patches: Tensor) -> Tensor:
        """(..., d) less their mean, over their deviation: of all of a patch, or (videomae) of each of its colors."""
        return standardize_colors(patches) if self.form == "videomae" else standardize(patches)

    def predict(self, inputs: Batch) -> Batch:
        """`pixels` (B, M, d) of the hidden patches."""
        encoder, picture, seen, hidden = (
            self.encoder(self.name),
            inputs[self.modality],
            inputs["seen"],
            inputs["hidden"],
        )
        if self.form != "simmim":
            features = encoder.encode(take(encoder.embed(picture), seen))
            grid = self._grid(self._channels_first(picture).shape[2:])
            return {"pixels": self.decoder(features, seen, hidden, grid)}
        number = seen.shape[1] + hidden.shape[1]
        shown = torch.zeros(len(hidden), number, dtype=torch.bool, device=hidden.device).scatter_(1, hidden, True)
        features = encoder.encode(encoder.embed(picture, shown, self.mask_token))
        return {"pixels": self.head(take(features.tokens, hidden))}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Error of the hidden patches, and its ratio to that of the mean; see `chance`."""
        scored = inputs["scored"]
        error = self._error(outputs["pixels"], inputs["target"])
        return {
            "loss": mean_over(error, scored, inputs["scored_patches"]),
            "relative_error": mean_over(error.detach(), scored, inputs["constant_error"]),
        }

    def concealed(self, inputs: Batch) -> Concealed:
        """The pixels of hidden patches, and what is made of them."""
        picture, hidden, target = inputs[self.modality], inputs["hidden"], inputs["target"]
        extents = tuple(self._channels_first(picture).shape[2:])
        patches = target.new_zeros(len(target), math.prod(self._grid(extents)), target.shape[2])
        mask = unpatchify(patches.scatter(1, hidden[:, :, None].expand_as(target), 1.0), self.patch, extents) > 0
        mask = mask[:, 0] if self.modality == "audio" else mask.transpose(1, -3)
        return Concealed(
            lambda inputs: self.predict(inputs)["pixels"],
            {self.modality: mask, "target": torch.ones_like(target, dtype=torch.bool)},
        )

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What is seen, what the network makes of it, and what was there; normalized if the task is."""
        picture, hidden = inputs[self.modality], inputs["hidden"]
        original = self._channels_first(picture)
        if self.modality == "audio":
            pixels, scale, shift = original, original.new_tensor(1.0), original.new_tensor(0.0)
        else:
            encoder = cast(ImageEncoder | VideoEncoder, self.encoder(self.name))
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
            f"{kind}prediction": put(outputs["pixels"], patches) * scale + shift,
            f"{kind}target": put(inputs["target"], patches) * scale + shift,
        }
        if self.norm_pix:
            pictures["original"] = original
        seen = {name: p[:, 0] if self.modality == "audio" else p.transpose(1, -3) for name, p in pictures.items()}
        axes = self.encoder(self.name).scale(seen["input"][0])
        return [Panel(name, list(p), scale=axes) for name, p in seen.items()]
