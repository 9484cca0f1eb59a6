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

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.modules.decoders import PatchDecoder, check_decoder
from mmssl.modules.pictures import read_picture
from mmssl.modules.views import Crop
from mmssl.objectives._concealed import Concealed
from mmssl.objectives.base import Chance, Objective, Panel
from mmssl.objectives.reconstruction._pixels import HiddenPixels
from mmssl.ops.draws import Draws
from mmssl.ops.masking import take
from mmssl.ranges import Pixels, Positive, Ratio, Width

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

    divisors = HiddenPixels.divisors

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
        self.name, self.form = encoder, form
        self.pixels = HiddenPixels(
            "masked_autoencoder",
            encoder,
            network,
            form=form,
            mask_ratio=mask_ratio,
            block=block,
            tube=tube,
            norm_pix=norm_pix,
        )
        self.modality = network.modality
        self.needs = (self.modality,)
        self.crop = Crop.of(VIEWS, views)
        if form != "simmim":
            check_decoder("masked_autoencoder", decoder_width, decoder_heads)
            sizes = network.dim, self.pixels.values, decoder_depth, decoder_width, decoder_heads
            self.decoder = PatchDecoder(*sizes, pooled=form == "mae", in_a_row=form == "videomae")
        else:
            self.mask_token = nn.Parameter(torch.zeros(network.width or network.dim))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
            self.head = nn.Linear(network.dim, self.pixels.values)

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
        return self.pixels.hide(*read_picture(self.encoder(self.name), batch, draws, self.crop), draws)

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
            return {"pixels": self.decoder(features, seen, hidden, self.pixels.grid(picture))}
        number = seen.shape[1] + hidden.shape[1]
        shown = torch.zeros(len(hidden), number, dtype=torch.bool, device=hidden.device).scatter_(1, hidden, True)
        features = encoder.encode(encoder.embed(picture, shown, self.mask_token))
        return {"pixels": self.head(take(features.tokens, hidden))}

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """Error of the hidden patches, and its ratio to that of the mean; see `chance`."""
        return self.pixels.scores(outputs["pixels"], inputs)

    def concealed(self, inputs: Batch) -> Concealed:
        """The pixels of hidden patches, and what is made of them."""
        return Concealed(lambda inputs: self.predict(inputs)["pixels"], self.pixels.concealed(inputs))

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """What is seen, what the network makes of it, and what was there; normalized if the task is."""
        return self.pixels.panels(outputs["pixels"], inputs)
