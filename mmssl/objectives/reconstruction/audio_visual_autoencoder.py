"""Audio-visual autoencoding: what do the hidden patches of picture and sound look like, and do the two belong together?

Gong et al. 2023, "Contrastive Audio-Visual Masked Autoencoder", arXiv 2210.07839 (CAV-MAE). Three quarters of the
patches of a picture, and of the spectrogram of its sound, are left out. Each modality's encoder reads what is left of
it; a joint layer reads the tokens of both together, and a decoder predicts the hidden patches of both, normalized each.
Contrast, with a weight of 0.01: the same joint layer reads the tokens of each modality alone, with norms of its own for
each, and the means of these, at unit length, find each other in the batch. `frame` takes the picture from the row's
video, at any moment, as published: what is seen need not be of the moment that is heard.

Here the encoders leave the run, and the joint layer stays with the task. They are the library's plain transformers:
their last norm is before the joint layer, which the paper's is not, and their positions are what the library makes
them. The paper has no class token; vision transformers of timm have none with `class_token: false, global_pool: avg,
fc_norm: false`. The published encoders start from an MAE of ImageNet.

Known traps. With more than one joint layer the published code hands the first one's input to each of them where a
modality is alone, so that only the last one counts; here they follow each other. The published contrast is
one-directional, from picture to sound; `symmetric` is both. The mean is of visible tokens in training and of all
afterwards. Padding after the end of a sound is attended to by none, belongs to no mean, and is never scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.batch import Batch, prefixed, sub_batch
from mmssl.encoders.base import Encoder, Features, masked_mean
from mmssl.errors import RecipeError
from mmssl.modules.decoders import check_decoder
from mmssl.modules.joint import TOGETHER, JointDecoder, JointLayers, Shown
from mmssl.modules.pictures import read_picture
from mmssl.modules.views import Crop
from mmssl.objectives._concealed import Concealed
from mmssl.objectives.base import Chance, Meets, Objective, Pair, Panel
from mmssl.objectives.reconstruction._pixels import HiddenPixels
from mmssl.ops.draws import Draws
from mmssl.ops.masking import take
from mmssl.ops.pairs import info_nce
from mmssl.ranges import Positive, Ratio, Temperature, Weight, Width

SIDES = ("visual", "audio")


class AudioVisualAutoencoder(Objective):
    """Regress the hidden patches of picture and sound from what is left of both, and tell which two belong together.

    Args:
        encoders: holds both encoders, transformers of one width whose tokens are patches.
        visual: name of the encoder of pictures.
        audio: name of the audio encoder.
        frame: whether the picture is one frame of the row's video, at random, and not its image.
        mask_ratio: share of the patches of each that is hidden.
        norm_pix: whether a patch is predicted less its mean, over its standard deviation.
        contrastive: weight of the contrast; 0 for none, and for no space in which the two are compared.
        temperature: divides the cosine.
        symmetric: whether sounds look for their pictures, too, and not pictures for their sounds alone.
        views: of pictures: how they are cropped, see `Crop`.
        joint_depth: layers that read both.
        joint_heads: their attention heads.
        decoder_depth: blocks of the decoder.
        decoder_width: their width.
        decoder_heads: their attention heads.
    """

    divisors = tuple(f"{key}/{name}" for key in SIDES for name in HiddenPixels.divisors)
    meets: Meets = "loss"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        visual: str = "image",
        audio: str = "audio",
        frame: bool = False,
        mask_ratio: Ratio = 0.75,
        norm_pix: bool = True,
        contrastive: Weight = 0.01,
        temperature: Temperature = 0.05,
        symmetric: bool = False,
        views: dict[str, Any] | None = None,
        joint_depth: Positive = 1,
        joint_heads: Positive = 12,
        decoder_depth: Positive = 8,
        decoder_width: Width = 512,
        decoder_heads: Positive = 16,
    ) -> None:
        super().__init__(encoders)
        task = "audio_visual_autoencoder"
        self.names = {"visual": visual, "audio": audio}
        seen, heard = self.encoder(visual, "image"), self.encoder(audio, "audio")
        self.pixels = {
            key: HiddenPixels(task, self.names[key], network, mask_ratio=mask_ratio, norm_pix=norm_pix)
            for key, network in (("visual", seen), ("audio", heard))
        }
        if seen.dim != heard.dim:
            raise RecipeError(
                f"{task}: a joint layer reads tokens of one width, and '{visual}' has {seen.dim} and '{audio}' "
                f"{heard.dim}; give them one, for instance the same embed_dim"
            )
        if seen.dim % joint_heads:
            raise RecipeError(
                f"{task}: the width of the encoders, {seen.dim}, is no multiple of joint_heads = {joint_heads}"
            )
        check_decoder(task, decoder_width, decoder_heads)
        self.frame, self.needs = frame, ("video" if frame else "image", "audio")
        self.contrastive, self.temperature, self.symmetric = contrastive, temperature, symmetric
        if not contrastive:
            self.meets = "nowhere"
        self.crop = Crop.of({}, views or {})
        self.joint = JointLayers(seen.dim, joint_depth, joint_heads, (TOGETHER, *SIDES) if contrastive else (TOGETHER,))
        values = {key: one.values for key, one in self.pixels.items()}
        self.decoder = JointDecoder(seen.dim, values, decoder_depth, decoder_width, decoder_heads)

    def chance(self, rows: int) -> Chance:
        """Of each modality the error of the mean, see `MaskedAutoencoder.chance`; of the contrast one among B."""
        levels = {f"{name}/relative_error": 1.0 for name in self.names.values()}
        if self.contrastive:
            visual, audio = self.names.values()
            levels |= {f"accuracy_{visual}_to_{audio}": 1 / rows, f"accuracy_{audio}_to_{visual}": 1 / rows}
            levels["contrastive"] = math.log(rows)
        return Chance(None, levels)

    @torch.no_grad()
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """`image` (B, 3, H, W), or `video` (B, T, 3, H, W), and `audio` (B, S) -> of each side what `hide` makes of it.

        As `visual/...` and `audio/...`, see `HiddenPixels`; also `audio/valid` (B, K), False where a visible patch is
        padding, where the batch has a mask.
        """
        read = {"visual": self._frame(batch, draws) if self.frame else batch, "audio": batch}
        inputs: Batch = {}
        for key, own in read.items():
            picture, pixels, valid = read_picture(self.encoder(self.names[key]), own, draws, self.crop)
            hidden = self.pixels[key].hide(picture, pixels, valid, draws)
            if valid is not None:
                hidden["valid"] = valid.gather(1, hidden["seen"])
            inputs |= prefixed(key, hidden)
        return inputs

    def _frame(self, batch: Batch, draws: Draws) -> Batch:
        """One frame of each clip, as an image."""
        video = batch["video"]
        chosen = video[torch.arange(len(video), device=video.device), draws.integers(video.shape[1])]
        aspect = batch.get("video_aspect")
        return {"image": chosen} | ({} if aspect is None else {"image_aspect": aspect})

    def predict(self, inputs: Batch) -> Batch:
        """Of each side `visual/pixels` (B, M, d) of the hidden patches; `visual` and `audio` (B, D), unit vectors."""
        sides = {key: sub_batch(inputs, key) for key in SIDES}
        features = {key: self._features(key, own) for key, own in sides.items()}
        valid = None
        if any("valid" in own for own in sides.values()):
            each = [own.get("valid", torch.ones_like(own["seen"], dtype=torch.bool)) for own in sides.values()]
            valid = torch.cat(each, dim=1)
        tokens = [one.tokens for one in features.values()]
        both = self.joint(torch.cat(tokens, dim=1), TOGETHER, valid).split([one.shape[1] for one in tokens], dim=1)
        shown = {
            key: Shown(
                part, own["seen"], own["hidden"], self.pixels[key].grid(self._picture(key, own)), own.get("valid")
            )
            for part, (key, own) in zip(both, sides.items(), strict=True)
        }
        outputs = {f"{key}/pixels": pixels for key, pixels in self.decoder(shown).items()}
        return outputs | ({key: self.embed(key, features[key]) for key in SIDES} if self.contrastive else {})

    def _picture(self, key: str, own: Batch) -> Tensor:
        return own[self.pixels[key].modality]

    def _features(self, key: str, own: Batch) -> Features:
        """What the encoder makes of the visible patches."""
        encoder = self.encoder(self.names[key])
        return encoder.encode(take(encoder.embed(self._picture(key, own)), own["seen"]), own.get("valid"))

    def embed(self, side: str, features: Features) -> Tensor:
        """Unit vectors (B, D), of side `visual` or `audio`: the mean of what the joint layer makes of it alone."""
        return F.normalize(masked_mean(self.joint(features.tokens, side, features.valid), features.valid), dim=-1)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Picture and sound, by the cosine of what is contrasted."""
        if not self.contrastive:
            return ()
        visual, audio = self.names.values()
        return (Pair(visual, audio, embed=(partial(self.embed, "visual"), partial(self.embed, "audio"))),)

    def loss(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """The errors of both sides, and the weighted contrast; each, and others, under the name of its encoder."""
        scores = {key: self.pixels[key].scores(outputs[f"{key}/pixels"], sub_batch(inputs, key)) for key in SIDES}
        loss = scores["visual"]["loss"] + scores["audio"]["loss"]
        logs: dict[str, Tensor] = {}
        for key, own in scores.items():
            logs |= prefixed(self.names[key], own)
        if self.contrastive:
            a, b = outputs["visual"], outputs["audio"]
            scale = a.new_full((), 1 / self.temperature)  # made where it is used: no upload
            contrast, to_audio, to_visual = info_nce(a, b, scale, back=self.symmetric)
            visual, audio = self.names.values()
            loss = loss + self.contrastive * contrast
            logs |= {f"accuracy_{visual}_to_{audio}": to_audio, f"accuracy_{audio}_to_{visual}": to_visual}
            logs["contrastive"] = contrast
        return {"loss": loss, **logs}

    def concealed(self, inputs: Batch) -> Concealed:
        """The pixels of hidden patches, and all that is made of what is left."""

        def answers(inputs: Batch) -> Tensor:
            return torch.cat([output.flatten(1) for output in self.predict(inputs).values()], dim=1)

        hidden = {key: self.pixels[key].concealed(sub_batch(inputs, key)) for key in SIDES}
        return Concealed(answers, {f"{key}/{name}": mask for key, own in hidden.items() for name, mask in own.items()})

    def preview(self, inputs: Batch, outputs: Batch) -> list[Panel]:
        """Of each side what is seen, what the network makes of it, and what was there."""
        return [
            panel._replace(title=f"{self.names[key]}: {panel.title}")
            for key in SIDES
            for panel in self.pixels[key].panels(outputs[f"{key}/pixels"], sub_batch(inputs, key))
        ]
