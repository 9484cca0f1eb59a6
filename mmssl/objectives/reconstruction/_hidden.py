"""One side of a masked pair: what of it is hidden, and the head that says what was there."""

from __future__ import annotations

import math
from typing import TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.encoders.image import ImageEncoder
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.objectives.base import Panel
from mmssl.objectives.reconstruction._patches import patchify, read_picture, unpatchify
from mmssl.ops.clustering import Codebook
from mmssl.ops.draws import Draws
from mmssl.ops.gather import process_share, total
from mmssl.ops.losses import mean_over
from mmssl.ops.masking import choose_places, corrupt_tokens, mask_blocks, take

SMALLEST_BLOCK = 16 / 196
TOKENS_COUNTED = 32  # for each entry of the vocabulary


class Crop(TypedDict):
    """See `read_picture`."""

    area: tuple[float, float] | None
    flip: float
    size: int | None


def _guessing(target: Tensor, chosen: Tensor, log_shares: Tensor) -> Batch:
    """Targets, their number, and the cross-entropy of a histogram."""
    return {
        "chosen": chosen,
        "target": target,
        "hidden_places": chosen.sum(),
        "prior_surprise": -(log_shares[target] * chosen).sum(),
    }


def _scores(outputs: Batch, inputs: Batch, classes: int) -> dict[str, Tensor]:
    """Cross-entropy, that over the histogram's, and the share of right answers."""
    chosen, count, surprise = inputs["chosen"], inputs["hidden_places"], math.log(classes) - outputs["gain"]
    return {
        "loss": mean_over(surprise, chosen, count),
        "relative_error": mean_over(surprise.detach(), chosen, inputs["prior_surprise"]),
        "right": mean_over(outputs["right"], chosen, count),
    }


class HiddenPatches(nn.Module):
    """Blocks of patches behind a mask token, and a classifier over the codes of a codebook.

    Args:
        network: of images or sound; it stays outside of this module.
        width: of the tokens that the head reads.
        codes: entries of the codebook.
    """

    divisors = ("hidden_places", "prior_surprise", "constant_mistakes")

    def __init__(self, network: Encoder, width: int, codes: int) -> None:
        super().__init__()
        if network.modality not in ("image", "audio") or not network.subsets or network.patch_size is None:
            raise RecipeError(
                f"masked_pair hides patches of images or sound, and {network.spec['model']} has none; take a plain "
                "vision transformer, such as timm/vit_tiny_patch16_224, or set rate_a: 0"
            )
        if codes < 2:
            raise RecipeError(f"masked_pair: codes = {codes} should be 2 or more")
        self.classes, self.patch = codes, network.patch_size
        self.codebook = Codebook(codes, (3 if network.modality == "image" else 1) * self.patch[0] * self.patch[1])
        self.mask_token = nn.Parameter(torch.zeros(network.width or network.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, codes))

    def vectors(self, network: Encoder, batch: Batch, number: int, crop: Crop) -> Tensor:
        """What the codebook learns from: patches (n, d) of the batch, cropped as for training; NaN where padding is."""
        share, shares = process_share()
        rows, device = len(batch[network.modality]), self.mask_token.device
        draws = Draws(int(self.codebook.seed), number, rows, share=share, shares=shares, device=device)
        _, pixels, valid = read_picture(network, batch, draws, **crop)
        patches = patchify(pixels, self.patch)
        if valid is not None:
            patches = patches.masked_fill(~valid[:, :, None], math.nan)
        return patches.flatten(0, 1)

    def hide(self, network: Encoder, batch: Batch, draws: Draws, rate: float, crop: Crop) -> Batch:
        """What is `seen`, `valid` where it is no padding, and what is hidden, a share `rate` of the patches.

        `hidden` bool (B, N), in the grid of patches; `places` (B, M), of which the `chosen` ones count, with the
        `target` codes. `constant_mistakes` is the number of mistakes of the most frequent code.
        """
        picture, pixels, valid = read_picture(network, batch, draws, **crop)
        grid = (pixels.shape[2] // self.patch[0], pixels.shape[3] // self.patch[1])
        if min(grid) < 2:
            raise RecipeError(f"masked_pair: blocks cannot be hidden in a grid of {grid[0]} x {grid[1]} patches")
        number = grid[0] * grid[1]
        slots = max(1, round(rate * number))
        hidden = mask_blocks(grid, slots, draws, smallest=max(1, round(SMALLEST_BLOCK * number)))
        inputs = {"seen": picture, "hidden": hidden}
        if valid is not None:
            inputs["valid"] = valid
            hidden = hidden & valid
        inputs["places"] = hidden.long().argsort(dim=1, descending=True, stable=True)[:, :slots]
        chosen = hidden.gather(1, inputs["places"])
        target = self.codebook(take(patchify(pixels, self.patch), inputs["places"]))
        inputs["constant_mistakes"] = ((target != self.codebook.counts.argmax()) & chosen).sum()
        return inputs | _guessing(target, chosen, self.codebook.log_shares())

    def forward(self, tokens: Tensor, inputs: Batch) -> Tensor:
        """Logits (N, K) at all N hidden places, row by row."""
        logits: Tensor = self.head(take(tokens, inputs["places"])[inputs["chosen"]])
        return logits

    def scores(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """See `_scores`; also the mistakes over those of the most frequent code, and the codebook's perplexity."""
        mistakes = mean_over(1 - outputs["right"], inputs["chosen"], inputs["constant_mistakes"])
        found = {"relative_mistakes": mistakes, "perplexity": self.codebook.perplexity()}
        return _scores(outputs, inputs, self.classes) | found

    def panels(self, network: Encoder, inputs: Batch, logits: Tensor) -> list[Panel]:
        """What is seen; answer and target, as the mean patches of codes; the picture."""
        picture, places, chosen = inputs["seen"], inputs["places"], inputs["chosen"]
        pixels, scale, shift = picture[:, None], picture.new_ones(()), picture.new_zeros(())
        if network.modality == "image":
            normalize = cast(ImageEncoder, network).normalize
            pixels, scale, shift = normalize(picture), normalize.std[:, None, None], normalize.mean[:, None, None]
        patches = patchify(pixels, self.patch)
        decoded = self.codebook.decode(self.codebook(patches))
        codes = inputs["target"].masked_scatter(chosen, logits.argmax(-1))

        def put(values: Tensor, into: Tensor) -> list[Tensor | str]:
            kept = torch.where(chosen[:, :, None], values.to(into.dtype), take(into, places))
            whole = into.scatter(1, places[:, :, None].expand_as(kept), kept)
            image = unpatchify(whole, self.patch, (picture.shape[-2], picture.shape[-1])) * scale + shift
            return list(image if network.modality == "image" else image[:, 0])

        return [
            Panel("input", put(pixels.mean().expand(1, 1, patches.shape[2]), patches)),
            Panel("prediction", put(self.codebook.decode(codes), decoded)),
            Panel("target in codes", put(take(decoded, places), decoded)),
            Panel("original", put(take(patches, places), patches)),
        ]


class HiddenWords(nn.Module):
    """Tokens masked as in masked_language, and a classifier tied to the embedding of the text encoder.

    Args:
        network: of texts; it stays outside of this module.
        width: of the tokens that the head reads.
    """

    divisors = ("hidden_places", "prior_surprise")
    special: Tensor
    vocabulary: Tensor
    counts: Tensor

    def __init__(self, network: Encoder, width: int) -> None:
        super().__init__()
        if network.modality != "text":
            raise RecipeError(f"masked_pair: b is text, and {network.spec['model']} reads {network.modality}")
        text = cast(TextEncoder, network)
        self.tokenizer = text.tokenizer
        if self.tokenizer.mask_id is None:
            raise RecipeError(
                "masked_pair needs a mask token, and the tokenizer of the text encoder has none; "
                "take a masked model's tokenizer, or train:8000 for one made from the texts"
            )
        self.mask_id = self.tokenizer.mask_id
        special = torch.zeros(self.tokenizer.vocab_size, dtype=torch.bool)
        special[sorted(self.tokenizer.special_ids)] = True
        self.classes, embedding = text.token_embedding.shape
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("vocabulary", (~special).nonzero()[:, 0], persistent=False)
        self.register_buffer("counts", torch.zeros(self.classes, dtype=torch.long))
        self.head = nn.Sequential(nn.Linear(width, embedding), nn.GELU(), nn.LayerNorm(embedding))
        self.bias = nn.Parameter(torch.zeros(self.classes))

    def _maskable(self, batch: Batch) -> Tensor:
        """Bool (B, L), True for tokens that are neither padding nor special."""
        text = batch["text"]
        return batch.get("text_mask", torch.ones_like(text, dtype=torch.bool)) & ~self.special[text]

    def count(self, batch: Batch) -> None:
        """Add the words of a batch to the histogram, those of all processes."""
        self.counts += total(torch.bincount(batch["text"][self._maskable(batch)], minlength=self.classes))

    def enough(self) -> bool:
        """Whether so many words are counted that more say little."""
        return int(self.counts.sum()) >= TOKENS_COUNTED * self.classes

    def hide(self, batch: Batch, draws: Draws, rate: float) -> Batch:
        """What is `seen`, where it is `valid`; `places` (B, M), of which the `chosen` ones count, and `target` tokens.

        Of a text of n tokens max(1, round(rate * n)) are chosen.
        """
        text = batch["text"]
        mask = batch.get("text_mask", torch.ones_like(text, dtype=torch.bool))
        count_of = [max(1, round(rate * n)) for n in range(text.shape[1] + 1)]
        counts = torch.tensor(count_of, device=text.device)[mask.sum(1)]
        places, chosen = choose_places(self._maskable(batch), counts, max(count_of), draws)
        seen = corrupt_tokens(text, places, chosen, draws, mask_id=self.mask_id, vocabulary=self.vocabulary)
        smoothed = (self.counts + 1).to(self.bias.dtype)
        guessing = _guessing(text.gather(1, places), chosen, (smoothed / smoothed.sum()).log())
        return {"seen": seen, "valid": mask, "places": places, **guessing}

    def forward(self, tokens: Tensor, inputs: Batch, embedding: Tensor) -> Tensor:
        """Logits (N, V) at all N chosen places, row by row."""
        return F.linear(self.head(take(tokens, inputs["places"])[inputs["chosen"]]), embedding, self.bias)

    def scores(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """See `_scores`."""
        return _scores(outputs, inputs, self.classes)

    def panels(self, inputs: Batch, logits: Tensor) -> list[Panel]:
        """The corrupted text, the network's choices filled in, the original."""
        text, places, chosen = inputs["seen"], inputs["places"], inputs["chosen"]
        seen = text.gather(1, places)

        def texts(tokens: Tensor) -> list[Tensor | str]:
            filled = text.scatter(1, places, seen.masked_scatter(chosen, tokens))
            return [self.tokenizer.decode(ids[kept]) for ids, kept in zip(filled, inputs["valid"], strict=True)]

        return [
            Panel("input", texts(seen[chosen])),
            Panel("prediction", texts(logits.argmax(-1))),
            Panel("target", texts(inputs["target"][chosen])),
        ]
